// Matrix products of rows with weights [outputs, dim], plain or packed; or of several groups of rows,
// each with a matrix of its own. Threads take tiles as they come free: some outputs of all rows of a
// group. Weights that are packed or need a conversion are converted once a tile, to a cache of the
// processor.
#pragma once

#include <algorithm>

#include "arithmetic.h"
#include "narrow.h"
#include "product_parts.h"

namespace {

template <class T, class Ops, class Source>
class Tile {
  using Element = typename Ops::Element;
  using Query = typename Ops::Query;

 public:
  // The inputs of row r of those held are at `x` + r * `x_stride`.
  Tile(const Products& p, const Query* x, long x_stride, long most_rows)
      : p_(p), x_(x), x_stride_(x_stride), depth_(depth_of(p.dim)), source_(p, depth_),
        sums_(depth_ < p.dim ? (most_rows / kRows + kRows) * 2 * kOutputs / kWeights : 0) {}

  // Multiplies the rows of a span with the weights of some outputs.
  void multiply(const Part& part) {
    const Span& span = part.span;
    const Matrix<T> matrix(p_, span.group);
    const bool is_small = span.count * p_.dim * long(sizeof(Query)) <= kKeptInputs;
    // Few rows of inputs stay in the cache: whole rows of weights pass by, as they are in memory.
    const bool is_whole = is_few(span) && is_small;
    const long step = is_whole ? kWeights : kOutputs;
    for (long from = 0; from < part.count; from += step) {
      first_ = part.first + from, count_ = std::min(step, part.count - from);
      bias_ = p_.biases ? static_cast<const T*>(p_.biases[span.group]) + first_ : nullptr;
      for (long d = 0; d < p_.dim; d += depth_) {
        const long size = std::min(depth_, p_.dim - d);
        if (fetches(span)) set_lead(span, is_whole ? p_.dim : size, is_whole ? d : 0);
        source_.take(matrix, first_, count_, d, size, weights_);
        for (long w = count_; w % kWeights; ++w) weights_[w] = weights_[count_ - 1];
        is_first_ = d == 0, is_last_ = d + size == p_.dim;
        sum_ = sums_.data();
        multiply_rows(matrix, span, d, size);
      }
    }
  }

 private:
  // What a block of rows fetches: for its weights from `first` to `past`, the line that comes `ahead`
  // bytes after the current one. From byte `until` on, that line is in later rows: `later` bytes after.
  struct Lead { long first, past, ahead, later, until; };

  static bool fetches(const Span& span) { return Source::kIsInPlace && span.count >= kFetching; }
  static bool is_few(const Span& span) {
    return span.count <= kSharedRows && (fetches(span) || !Source::kIsInPlace);
  }

  // Sets the lead where `run` elements of kWeights rows of weights are multiplied before those of the
  // next rows, from the d-th element on.
  void set_lead(const Span& span, long run, long d) {
    // The second block of rows fetches its share after the first is done: two need a longer lead.
    if (span.count > kRows) {
      lead_.ahead = lead_.later = kAhead * p_.weight_stride;
      return;
    }
    const long bytes = run * long(sizeof(Element)), skipped = kLead / bytes;
    const long step = kWeights * p_.weight_stride - bytes;
    lead_.ahead = skipped * step + kLead, lead_.later = lead_.ahead + step;
    lead_.until = (skipped + 1) * bytes - kLead - d * long(sizeof(Element));
  }

  // The first rows are multiplied with each weight while later weights are fetched: each block of rows
  // fetches a share. The others find all weights in the second-level cache.
  void multiply_rows(const Matrix<T>& matrix, const Span& span, long d, long size) {
    const long shared = fetches(span) ? std::min(span.count, kSharedRows) : 0;
    const long blocks = (shared + kRows - 1) / kRows;
    if constexpr (Source::kIsInPlace) {
      for (long w = 0; shared && w < count_; w += kWeights) {
        long block = 0;
        multiply_blocks(shared, 0, [&](auto rows, long row) INLINE {
          if (blocks <= kWaiting) {
            lead_.first = kWeights * block / blocks, lead_.past = kWeights * ++block / blocks;
            return multiply_block<rows.value, true>(span, row, d, size, w, w + kWeights);
          }
          const long first = size * block / blocks, past = size * ++block / blocks;
          for (long i = 0; i < kWeights; ++i)
            matrix.fetch(first_ + w + kAhead + i, d + first, past - first);
          multiply_block<rows.value, false>(span, row, d, size, w, w + kWeights);
        });
      }
    }
    multiply_blocks(span.count, shared, [&](auto rows, long row) INLINE {
      multiply_block<rows.value, false>(span, row, d, size, 0, count_);
    });
  }

  template <class F>
  INLINE static void multiply_blocks(long past, long row, F multiply) {
    for (; past - row >= kRows; row += kRows) multiply(std::integral_constant<long, kRows>(), row);
    multiply_last<kRows - 1>(past - row, row, multiply);
  }
  // Multiplies the `left` rows from one on, kCount at most, in one block.
  template <long kCount, class F>
  INLINE static void multiply_last(long left, long row, F& multiply) {
    if constexpr (kCount > 0) {
      if (left == kCount) return multiply(std::integral_constant<long, kCount>(), row);
      multiply_last<kCount - 1>(left, row, multiply);
    }
  }

  template <long kCount, bool kFetches>
  void multiply_block(const Span& span, long row, long d, long size, long w, long past) {
    constexpr long kSums = (kCount + 3) / 4;
    const Query* x = x_ + (span.at + row) * x_stride_ + d;
    for (; w < past; w += kWeights) {
      Floats sums[kSums];
      products<kCount, kFetches>(weights_ + w, x, x_stride_, size, sums, lead_);
      repeat<kSums>([&](auto i) INLINE {
        if (!is_first_) sums[i] += *sum_;
        if (is_last_)
          finish<std::min(4L, kCount - 4 * long(decltype(i)::value))>(sums[i], w,
                                                                      span.first + row + 4 * i);
        else
          *sum_ = sums[i];
        ++sum_;
      });
    }
  }

  // The sums of kWeights weights, each in one lane. Meanwhile it fetches what `lead` says. A function of
  // its own, so that registers hold what its loop needs.
  template <long kCount, bool kFetches>
  __attribute__((noinline)) static void products(const Element* const* weights, const Query* x,
                                                 long stride, long size, Floats* sums,
                                                 const Lead lead) {
#if defined(__AVX512F__)
    Floats dots[kCount * kWeights] = {};
    constexpr long kDims = Ops::kKeyDims;
    long d = 0;
    // What is left of the dimensions is then known to be a whole vector.
    for (; d + kDims <= size; d += kDims) {
      const long at = d * long(sizeof(Element));
      if (kFetches && at % 64 == 0)
        for (long w = lead.first; w < lead.past; ++w)
          fetch_near(reinterpret_cast<const char*>(weights[w] + d) +
                     (at < lead.until ? lead.ahead : lead.later));
      Ops::template multiply<kCount, kWeights>(weights, x, stride, d, kDims, dots);
    }
    if (d < size) Ops::template multiply<kCount, kWeights>(weights, x, stride, d, size - d, dots);
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
    narrow_products<kCount, kWeights>(weights, x, stride, size, kept, [&](long at) INLINE {
      for (long w = lead.first; kFetches && w < lead.past; ++w)
        fetch_near(reinterpret_cast<const char*>(weights[w]) + at +
                   (at < lead.until ? lead.ahead : lead.later));
    });
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
  Lead lead_{};
  const T* bias_ = nullptr;
  const Element* weights_[kOutputs];
};

template <class T, class Ops, class Source>
void multiply_window(const Products& p, const Spans& spans, bool holds_inputs, int threads) {
  using Query = typename Ops::Query;
  const T* from = static_cast<const T*>(p.x);
  const long stride = holds_inputs ? apart<Query>(Ops::padded(p.dim)) : p.x_stride;
  const std::vector<long> numbers = numbers_of(spans);
  const long rows = long(numbers.size());
  LineAligned<Query> kept(holds_inputs ? rows * stride : 0);
  const Query* x = holds_inputs ? kept.data() : reinterpret_cast<const Query*>(from);
  if (holds_inputs) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (rows * p.dim > kFewElements)
    for (long r = 0; r < rows; ++r)
      Ops::queries(from + numbers[r] * p.x_stride, 1, p.dim, kept.data() + r * stride);
  }
  const std::vector<Part> parts = parts_of(p, spans, threads);
#pragma omp parallel num_threads(threads)
  {
    Tile<T, Ops, Source> tile(p, x, stride, most_rows(spans));
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < parts.size(); ++i) tile.multiply(parts[i]);
  }
}

// Multiplies the groups with `least` to `most` rows.
template <class T, class Ops, class Source>
void multiply_all(const Products& p, int threads, long least = 1, long most = kAnyRows) {
  const bool holds_inputs = !std::is_same_v<T, typename Ops::Query> || p.dim % Ops::kKeyDims != 0;
  for (const Spans& spans : windows_of(p, least, most, holds_inputs))
    multiply_window<T, Ops, Source>(p, spans, holds_inputs, threads);
}

// Few rows take weights as they are; for more, these are converted first.
template <class T>
void multiply_wide(const Products& p, int threads) {
  long least = 1;
  if constexpr (std::is_same_v<T, float>) {
    if (!p.bits) return multiply_all<T, Wide<T>, InPlace<T>>(p, threads);
  } else if constexpr (kFewRows > 0) {
    if (!p.bits) {
      multiply_all<T, Wide<T>, InPlace<T>>(p, threads, least, kFewRows);
      least = kFewRows + 1;
    }
  }
  multiply_all<T, WideInputs<T>, Converted<T, float>>(p, threads, least);
}

void multiply_pairs(const Products& p, int threads) {
#if defined(__AVX512BF16__)
  if (p.dim % 32 == 0 && !p.bits)
    return multiply_all<Bfloat16, Pairs, InPlace<Bfloat16>>(p, threads);
  if (p.dim % 32 == 0)
    return multiply_all<Bfloat16, Pairs, Converted<Bfloat16, Bfloat16>>(p, threads);
#endif
  multiply_wide<Bfloat16>(p, threads);
}

}  // namespace
