// Matrix products of rows with weights [outputs, dim], plain or packed; or of several groups of rows,
// each with a matrix of its own. Threads take tiles as they come free: some outputs of all rows of a
// group. Weights that need a conversion are converted once a tile, to a cache of the processor.
#pragma once

#include <algorithm>
#include <vector>

#include "narrow.h"
#include "packed_pairs.h"
#include "product_weights.h"

namespace {

// The rows of a group within a window.
struct Span {
  long group, first, count;
};
inline std::vector<Span> spans_of(const Products& p, long begin, long end) {
  std::vector<Span> spans;
  for (long g = 0; g < p.groups; ++g) {
    const long first = std::max(begin, p.starts[g]), past = std::min(end, p.starts[g + 1]);
    if (first < past) spans.push_back({g, first, past - first});
  }
  return spans;
}

template <class T, class Ops, class Source>
class Tile {
  using Element = typename Ops::Element;
  using Query = typename Ops::Query;
  // Packed weights are looked up by the number of their dimension: rows are taken from their start.
  static constexpr bool kIsPacked = std::is_same_v<Element, uint8_t>;

 public:
  // Row r's inputs are at `x` + r * `x_stride`.
  Tile(const Products& p, const Query* x, long x_stride, long most_rows)
      : p_(p), x_(x), x_stride_(x_stride), depth_(depth_of(p.dim)), source_(p, depth_),
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
  // With few blocks of rows, each weight is multiplied with all of them while later weights are
  // fetched. The rows then stay in the first-level cache. More rows would be read again for every
  // weight. A single block needs no fetch: the processor's own is early enough.
  void multiply_rows(const Span& span, long d, long size) {
    const bool is_few = kRows < span.count && span.count <= kSharedRows;
    const long step = is_few ? kWeights : count_, parts = (span.count + kRows - 1) / kRows;
    for (long w = 0; w < count_; w += step) {
      long row = 0, part = 0;
      const auto block = [&](auto rows) INLINE {
        if (is_few) fetch_next(w + 2 * kWeights, size, part++, parts);
        multiply_block<rows.value>(d, size, span.first + row, w, std::min(count_, w + step));
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
  }

  // Fetches one of several parts of the weights from the `w`th on.
  void fetch_next(long w, long size, long part, long parts) const {
    if constexpr (Source::kIsInPlace && !kIsPacked) {
      const long bytes = size * sizeof(Element);
      const long first = bytes * part / parts & -64, past = bytes * (part + 1) / parts;
      for (const long end = std::min(count_, w + kWeights); w < end; ++w)
        fetch(reinterpret_cast<const char*>(weights_[w]) + first, past - first);
    }
  }

  template <long kCount>
  void multiply_block(long d, long size, long row, long w, long past) {
    constexpr long kSums = (kCount + 3) / 4;
    const long first = kIsPacked ? d : 0;
    const Query* x = x_ + row * x_stride_ + d - first;
    for (; w < past; w += kWeights) {
      Floats sums[kSums];
      products<kCount>(weights_ + w, x, x_stride_, first, first + size, p_.dim, sums);
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

  // Sums the products of kCount rows and kWeights weights, from dimension `d` to `end` of `dim`. A
  // function of its own, so that registers hold what its loop needs.
  template <long kCount>
  __attribute__((noinline)) static void products(const Element* const* weights, const Query* x,
                                                 long stride, long d, long end,
                                                 [[maybe_unused]] long dim, Floats* sums) {
#if defined(__AVX512F__)
    Floats dots[kCount * kWeights] = {};
    // What is left of the dimensions is then known to be a whole vector.
    for (; d + Ops::kKeyDims <= end; d += Ops::kKeyDims)
      Ops::template multiply<kCount, kWeights>(weights, x, stride, d,
                                               kIsPacked ? dim - d : Ops::kKeyDims, dots);
    if (d < end)
      Ops::template multiply<kCount, kWeights>(weights, x, stride, d, end - d, dots);
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
    narrow_products<kCount, kWeights>(weights, x, stride, end - d, kept);
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

// Outputs of a tile, fewer than `width` where there are not enough tiles for all threads.
inline long tile_width(const Products& p, long spans, int threads, long width = kOutputs) {
  while (width > kWeights && (p.outputs + width - 1) / width * spans < kTiles * threads) width /= 2;
  return width;
}

template <class T, class Ops, class Source>
void multiply_window(const Products& p, long begin, long end, int threads) {
  using Query = typename Ops::Query;
  const std::vector<Span> spans = spans_of(p, begin, end);
  long most = 0;
  for (const Span& span : spans) most = std::max(most, span.count);
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
