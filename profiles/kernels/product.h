// Matrix products of rows with weights [outputs, dim], plain or packed; or of several groups of rows,
// each with a matrix of its own. Threads take tiles as they come free: some outputs of all rows of a
// group. Weights that need a conversion are converted once a tile, to a cache of the processor.
#pragma once

#include <algorithm>
#include <vector>

#include "arithmetic.h"
#include "groups.h"
#include "narrow.h"
#include "packed_pairs.h"

namespace {

// As profiles/kernels/products.py lays it out.
struct Products {
  const void* x;  // [rows, dim]
  long x_stride;
  const void* const* weights;  // Of each group, [outputs, dim] or [outputs, bytes of a row].
  const void* const* biases;   // Of each group, [outputs]; or null.
  const long* starts;          // The first row of each group, and the number of rows.
  long groups, outputs, dim, weight_stride;  // The stride in bytes.
  long group_size;
  int bits;  // 0: the weights are plain.
  void* out;  // [rows, outputs]
  long out_stride;
  int adds;  // Each result, once it is rounded, is added to what is there.
};

// Weights and rows whose products are summed at once, in registers.
#if defined(__AVX512F__)
constexpr long kWeights = 4, kRows = 6;
#else
constexpr long kWeights = 4, kRows = 3;
#endif
// Outputs of a tile, and dimensions that are summed before the next weights are taken.
constexpr long kOutputs = 64, kDepth = 1024;
// Rows whose inputs are held in another form at once.
constexpr long kWindow = 512;
// So few rows take 16-bit weights as they are, where one instruction converts a vector.
#if defined(__AVX512F__)
constexpr long kFewRows = 12;
#else
constexpr long kFewRows = 0;
#endif
// So few elements are converted by one thread.
constexpr long kFewElements = 1 << 18;
// Tiles for each thread: who loses its core holds up the rest for a part of one.
constexpr long kTiles = 8;

// Elements from one row to the next such that rows do not compete for the same lines of a cache.
template <class E>
long apart(long size) { return size + (size * sizeof(E) % 1024 ? 0 : 64 / sizeof(E)); }

// Weights of a matrix, plain elements of T or packed.
template <class T>
class Matrix {
 public:
  Matrix(const Products& p, long group)
      : packing_{p.dim, p.group_size, p.bits}, group_(group),
        from_(static_cast<const char*>(p.weights[group])), stride_(p.weight_stride) {}
  long group() const { return group_; }
  // The row of an output; of plain elements, from one on.
  const char* row(long output, long d) const {
    return from_ + output * stride_ + (packing_.bits ? 0 : d * sizeof(T));
  }
  void unpack(long output, long d, long size, T* to) const {
    unpack_part(packing_, reinterpret_cast<const uint8_t*>(row(output, 0)), d, size, to);
  }

 private:
  const Packing packing_;
  const long group_;
  const char* from_;
  const long stride_;
};

// Weights that are multiplied where they are.
template <class T, class E>
class InPlace {
 public:
  InPlace(const Products&, long) {}
  static long most_outputs(long) { return kOutputs; }
  void take(const Matrix<T>& matrix, long first, long count, long d, long, const E** rows) {
    for (long w = 0; w < count; ++w)
      rows[w] = reinterpret_cast<const E*>(matrix.row(first + w, d));
  }
};

// Weights that are converted to E.
template <class T, class E>
class Converted {
 public:
  static long most_outputs(long) { return kOutputs; }
  Converted(const Products& p, long depth)
      : is_packed_(p.bits), stride_(apart<E>(depth)), row_(depth), kept_(kOutputs * stride_) {}
  void take(const Matrix<T>& matrix, long first, long count, long d, long size, const E** rows) {
    for (long w = 0; w < count; ++w) {
      E* to = kept_.data() + w * stride_;
      rows[w] = to;
      if constexpr (std::is_same_v<T, E>) {
        matrix.unpack(first + w, d, size, to);
      } else if (is_packed_) {
        matrix.unpack(first + w, d, size, row_.data());
        convert(row_.data(), size, to);
      } else {
        convert(reinterpret_cast<const T*>(matrix.row(first + w, d)), size, to);
      }
    }
  }

 private:
  static void convert(const T* from, long size, E* to) {
#if !defined(__AVX512F__)
    // Compilers make vectors of what they have of this loop.
    if constexpr (std::is_same_v<T, Bfloat16>) {
      for (long d = 0; d < size; ++d) to[d] = widened(from[d]);
      return;
    }
#endif
    for (long d = 0; d < size; d += kLanes) store(to + d, load_part(from + d, size - d));
  }

  const bool is_packed_;
  const long stride_;
  LineAligned<T> row_;
  LineAligned<E> kept_;
};

// Inputs of T, and weights that were converted to float32.
template <class T>
struct WideInputs : Wide<float> {
  static const float* queries(const T* q, long group, long dim, float* kept) {
    return Wide<T>::queries(q, group, dim, kept);
  }
};

// Dimensions that are summed at once.
inline long depth_of(long dim) {
  const long parts = (dim + kDepth - 1) / kDepth;
  return (dim + parts * kMaxGroup - 1) / (parts * kMaxGroup) * kMaxGroup;
}

// The rows of a group within a window.
struct Span {
  long group, first, count;
};

template <class T, class Ops, class Source>
class Tile {
  using Element = typename Ops::Element;
  using Query = typename Ops::Query;
  // Packed weights are looked up by the number of their dimension.
  static constexpr bool kIsPacked = std::is_same_v<Element, uint8_t>;

 public:
  // Row r's inputs are at `x` + r * `x_stride`.
  Tile(const Products& p, const Query* x, long x_stride, long most_rows)
      : p_(p), x_(x), x_stride_(x_stride), depth_(kIsPacked ? p.dim : depth_of(p.dim)),
        source_(p, depth_),
        sums_(depth_ < p.dim ? (most_rows / kRows + kRows) * 2 * kOutputs / kWeights : 0) {}

  // Multiplies the rows of a span with the weights of some outputs.
  void multiply(const Span& span, long first, long count) {
    const Matrix<T> matrix(p_, span.group);
    first_ = first, count_ = count;
    bias_ = p_.biases ? static_cast<const T*>(p_.biases[span.group]) + first : nullptr;
    for (long d = 0; d < p_.dim; d += depth_) {
      const long size = std::min(depth_, p_.dim - d);
      source_.take(matrix, first, count, kIsPacked ? 0 : d, size, weights_);
      for (long w = count_; w % kWeights; ++w) weights_[w] = weights_[count_ - 1];
      is_first_ = d == 0, is_last_ = d + size == p_.dim;
      sum_ = sums_.data();
      multiply_rows(span, d, size);
    }
  }

 private:
  void multiply_rows(const Span& span, long d, long size) {
    long row = 0;
    const auto block = [&](auto rows) INLINE {
      multiply_block<rows.value>(x_ + (span.first + row) * x_stride_ + d, size, span.first + row);
      row += rows.value;
    };
    while (span.count - row >= kRows) block(std::integral_constant<long, kRows>());
    if constexpr (kRows > 4)
      if (span.count - row >= 4) block(std::integral_constant<long, 4>());
    if constexpr (kRows > 2)
      if (span.count - row >= 2) block(std::integral_constant<long, 2>());
    if constexpr (kRows > 1)
      if (span.count - row >= 1) block(std::integral_constant<long, 1>());
  }

  template <long kCount>
  void multiply_block(const Query* x, long size, long row) {
    constexpr long kSums = (kCount + 3) / 4;
    for (long w = 0; w < count_; w += kWeights) {
      Floats sums[kSums];
      products<kCount>(weights_ + w, x, x_stride_, size, sums);
      repeat<kSums>([&](auto i) INLINE {
        if (!is_first_) sums[i] += *sum_;
        if (is_last_)
          finish<std::min(4L, kCount - 4 * long(decltype(i)::value))>(sums[i], w, row + 4 * i);
        else
          *sum_ = sums[i];
        ++sum_;
      });
    }
  }

  // Sums the products of kCount rows and kWeights weights. A function of its own, so that registers
  // hold what its loop needs.
  template <long kCount>
  __attribute__((noinline)) static void products(const Element* const* weights, const Query* x,
                                                 long stride, long size, Floats* sums) {
#if defined(__AVX512F__)
    Floats dots[kCount * kWeights] = {};
    long d = 0;
    // What is left of the dimensions is then known to be a whole vector.
    for (; d + Ops::kKeyDims <= size; d += Ops::kKeyDims)
      Ops::template multiply<kCount, kWeights>(weights, x, stride, d,
                                               kIsPacked ? size - d : Ops::kKeyDims, dots);
    if (d < size)
      Ops::template multiply<kCount, kWeights>(weights, x, stride, d, size - d, dots);
    repeat<(kCount + 3) / 4>([&](auto i) INLINE {
      Floats part[kLanes];
      repeat<kLanes>([&](auto j) INLINE {
        constexpr long at = decltype(i)::value * kLanes + decltype(j)::value;
        if constexpr (at < kCount * kWeights)
          part[j] = dots[at];
        else
          part[j] = Floats{};
      });
      sums[i] = sums_of(part);
    });
#else
    float kept[kLanes] = {};
    narrow_products<kCount, kWeights>(weights, x, stride, size, kept);
    *sums = load(kept);
#endif
  }

  // Stores the sums of four rows and four weights each.
  template <long kCount>
  INLINE void finish(Floats sums, long w, long row) const {
    T* out = static_cast<T*>(p_.out) + row * p_.out_stride + first_ + w;
    // The copies of a known size are single instructions.
    if (count_ - w >= kWeights)
      finish<kCount>(sums, bias_ + w, out, kWeights);
    else
      finish<kCount>(sums, bias_ + w, out, count_ - w);
  }
  template <long kCount>
  INLINE void finish(Floats sums, const T* bias, T* out, long weights) const {
    T kept[kLanes] = {};
    if (bias_) {
      for (long r = 0; r < kCount; ++r) std::memcpy(kept + 4 * r, bias, weights * sizeof(T));
      sums += load(kept);
    }
    if (p_.adds) {
      for (long r = 0; r < kCount; ++r)
        std::memcpy(kept + 4 * r, out + r * p_.out_stride, weights * sizeof(T));
      sums = rounded<T>(sums) + load(kept);
    }
    store(kept, sums);
    for (long r = 0; r < kCount; ++r)
      std::memcpy(out + r * p_.out_stride, kept + 4 * r, weights * sizeof(T));
  }

  const Products& p_;
  const Query* x_;
  const long x_stride_, depth_;
  Source source_;
  LineAligned<Floats> sums_;
  Floats* sum_ = nullptr;
  bool is_first_ = true, is_last_ = true;
  long first_ = 0, count_ = 0;
  const T* bias_ = nullptr;
  const Element* weights_[kOutputs];
};

// Outputs of a tile, fewer where there are not enough tiles for all threads.
inline long tile_width(const Products& p, long spans, int threads) {
  long width = kOutputs;
  while (width > kWeights && (p.outputs + width - 1) / width * spans < kTiles * threads) width /= 2;
  return width;
}

template <class T, class Ops, class Source>
void multiply_window(const Products& p, long begin, long end, int threads) {
  using Query = typename Ops::Query;
  std::vector<Span> spans;
  long most = 0;
  for (long g = 0; g < p.groups; ++g) {
    const long first = std::max(begin, p.starts[g]), past = std::min(end, p.starts[g + 1]);
    if (first < past) spans.push_back({g, first, past - first}), most = std::max(most, past - first);
  }
  const T* from = static_cast<const T*>(p.x);
  const bool is_in_place = std::is_same_v<T, Query> && p.dim % Ops::kKeyDims == 0;
  const long stride = is_in_place ? p.x_stride : apart<Query>(Ops::padded(p.dim));
  LineAligned<Query> kept(is_in_place ? 0 : (end - begin) * stride);
  const Query* x = is_in_place ? reinterpret_cast<const Query*>(from) : kept.data() - begin * stride;
  if (!is_in_place) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) \
    if ((end - begin) * p.dim > kFewElements)
    for (long r = begin; r < end; ++r)
      Ops::queries(from + r * p.x_stride, 1, p.dim, kept.data() + (r - begin) * stride);
  }
  const long width =
      std::min(Source::most_outputs(most), tile_width(p, long(spans.size()), threads));
  const long columns = (p.outputs + width - 1) / width, tiles = columns * long(spans.size());
#pragma omp parallel num_threads(threads)
  {
    Tile<T, Ops, Source> tile(p, x, stride, most);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < tiles; ++i) {
      const long first = i % columns * width;
      tile.multiply(spans[i / columns], first, std::min(width, p.outputs - first));
    }
  }
}

template <class T, class Ops, class Source>
void multiply_all(const Products& p, int threads) {
  const long rows = p.starts[p.groups];
  for (long begin = p.starts[0]; begin < rows; begin += kWindow)
    multiply_window<T, Ops, Source>(p, begin, std::min(rows, begin + kWindow), threads);
}

// The most rows of a group.
inline long most_rows(const Products& p) {
  long most = 0;
  for (long g = 0; g < p.groups; ++g) most = std::max(most, p.starts[g + 1] - p.starts[g]);
  return most;
}

// Few rows take weights as they are; for more, these are converted first.
template <class T>
void multiply_wide(const Products& p, int threads) {
  if constexpr (std::is_same_v<T, float>) {
    if (!p.bits) return multiply_all<T, Wide<T>, InPlace<T, T>>(p, threads);
  } else if constexpr (kFewRows > 0) {
    if (!p.bits && most_rows(p) <= kFewRows)
      return multiply_all<T, Wide<T>, InPlace<T, T>>(p, threads);
  }
  multiply_all<T, WideInputs<T>, Converted<T, float>>(p, threads);
}

void multiply_pairs(const Products& p, int threads) {
#if defined(HAS_TABLE)
  if (p.bits && PackedPairs::takes({p.dim, p.group_size, p.bits}) && most_rows(p) <= kFewRows)
    return multiply_all<Bfloat16, PackedPairs, InPlace<Bfloat16, uint8_t>>(p, threads);
#endif
#if defined(__AVX512BF16__)
  if (p.dim % 32 == 0 && !p.bits)
    return multiply_all<Bfloat16, Pairs, InPlace<Bfloat16, Bfloat16>>(p, threads);
  if (p.dim % 32 == 0)
    return multiply_all<Bfloat16, Pairs, Converted<Bfloat16, Bfloat16>>(p, threads);
#endif
  multiply_wide<Bfloat16>(p, threads);
}

}  // namespace
