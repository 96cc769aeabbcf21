// Products of few rows with packed weights, straight from how they lie: some weights are unpacked to
// the first-level cache and multiplied with all rows before the next. For a single block of rows they
// are looked up in registers instead, where the machine can.
#pragma once

#include <algorithm>
#include <vector>

#include "arithmetic.h"
#include "groups.h"

namespace {

template <class T>
struct Factors {
  const T* x;  // [rows, dim], dense.
  long rows;
  const uint8_t* packed;  // [outputs, bytes of a row]
  long outputs, packed_stride;
  const T* bias;  // [outputs], or null.
  T* out;         // [rows, outputs]
  long out_stride;
};

// Weights and rows of x whose products are summed at once, in one register each.
constexpr long kWeights = 4, kRows = kLanes / kWeights;

template <class T, class Ops>
class Product {
 public:
  Product(const Factors<T>& f, const Packing& p, const typename Ops::Query* x)
      : f_(f), p_(p), x_(x), width_(Ops::padded(p.dim)),
        unpacked_(kIsPacked ? 0 : kWeights * width_) {}

  // Multiplies all rows with the weights from `first` on.
  void multiply(long first) {
    count_ = std::min(kWeights, f_.outputs - first);
    for (long w = 0; w < kWeights; ++w)
      take(w, f_.packed + (first + std::min(w, count_ - 1)) * f_.packed_stride);
    if (f_.bias) {
      const Floats b = load_part(f_.bias + first, count_);
      bias_ = __builtin_shufflevector(b, b, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3);
    }
    long row = 0;
    for (; row + kRows <= f_.rows; row += kRows) block<kRows>(first, row);
    if (f_.rows - row == 3) block<3>(first, row);
    if (f_.rows - row == 2) block<2>(first, row);
    if (f_.rows - row == 1) block<1>(first, row);
  }

 private:
  using Element = typename Ops::Element;
  // Weights are looked up as they lie.
  static constexpr bool kIsPacked = std::is_same_v<Element, uint8_t>;

  void take(long w, const uint8_t* packed) {
    fetch(packed + kWeights * f_.packed_stride, p_.row_bytes());
    if constexpr (kIsPacked) {
      weights_[w] = packed;
    } else {
      weights_[w] = unpacked_.data() + w * width_;
      unpack_row(p_, packed, unpacked_.data() + w * width_);
    }
  }

  template <long kCount>
  void block(long first, long row) {
    Floats dots[kLanes] = {};
    for (long d = 0; d < p_.dim; d += Ops::kKeyDims)
      Ops::template multiply<kCount, kWeights>(weights_, x_ + row * width_, d, p_.dim, dots);
    T sums[kLanes];
    store(sums, sums_of(dots) + bias_);
    T* out = f_.out + row * f_.out_stride + first;
    for (long r = 0; r < kCount; ++r, out += f_.out_stride)
      if (count_ == kWeights)
        std::memcpy(out, sums + r * kWeights, kWeights * sizeof(T));
      else
        std::memcpy(out, sums + r * kWeights, count_ * sizeof(T));
  }

  const Factors<T>& f_;
  const Packing p_;
  const typename Ops::Query* x_;
  const long width_;
  long count_ = 0;
  Floats bias_{};  // Of kWeights outputs, once for each row of a block.
  const Element* weights_[kWeights];
  LineAligned<T> unpacked_;
};

template <class T, class Ops>
void multiply_rows(const Factors<T>& f, const Packing& p, int threads) {
  std::vector<typename Ops::Query> kept(f.rows * Ops::padded(p.dim));
  const typename Ops::Query* x = Ops::queries(f.x, f.rows, p.dim, kept.data());
#pragma omp parallel num_threads(threads)
  {
    Product<T, Ops> product(f, p, x);
#pragma omp for schedule(static)
    for (long first = 0; first < f.outputs; first += kWeights) product.multiply(first);
  }
}

}  // namespace
