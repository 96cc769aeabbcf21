// Attention of one decode step over a cache as it lies. A row is one key head of one sequence, and
// is attended by one thread, tile of tokens by tile: its keys are scored against all queries that
// share them, then its values are added with the sums in registers. Results depend neither on the
// number of threads nor on strides. Fastest where the tokens of a row lie side by side.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

// Tokens whose scores are known before their values are added: one vector of scores for a query.
constexpr long kTile = kLanes;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The next tile is fetched beside the arithmetic of this one, to the second-level cache: the first
// is not asked for more than it can wait for at once.
template <class T>
void fetch(const T* from, long count) {
  for (long d = 0; d < count; d += 64 / long(sizeof(T))) __builtin_prefetch(from + d, 0, 2);
}

// Keys or values of some tokens of one row, `stride` apart; past the last one, it stands in.
template <class T>
struct Tokens {
  const T* first;
  long stride, last;
  const T* operator[](long t) const { return first + std::min(t, last) * stride; }
};

// The arithmetic of attention, in float32.
template <class T>
struct Wide {
  using Query = float;
  using Share = float;
  static constexpr long kDims = kLanes;  // The sums of so many dimensions are kept together.
  static constexpr long kTogether = 1;   // Tokens whose values are added by one instruction.
  static constexpr long kVectors = 1;    // Vectors of sums for them.

  static long padded(long dim) { return (dim + kLanes - 1) / kLanes * kLanes; }
  static const float* queries(const T* q, long group, long dim, float* kept) {
    for (long g = 0; g < group; ++g)
      for (long d = 0; d < dim; d += kLanes)
        store(kept + g * padded(dim) + d, load_part(q + g * dim + d, dim - d));
    return kept;
  }
  // Adds kDims dimensions of the products of kTokens keys and kQueries queries to their sums.
  template <long kQueries, long kTokens>
  INLINE static void multiply(const T* const* keys, const float* q, long d, long dim,
                              Floats* dots) {
    repeat<kTokens>([&](auto t) INLINE {
      const Floats key = load_part(keys[t] + d, dim - d);
      repeat<kQueries>([&](auto g) INLINE {
        dots[g * kTokens + t] += key * load(q + g * padded(dim) + d);
      });
    });
  }
  static void keep(float* to, Floats shares) { store(to, shares); }
  template <long kQueries>
  INLINE static void add(const T* value, const T*, long d, long dim, const float* shares,
                         Floats* sums) {
    const Floats v = load_part(value + d, dim - d);
    repeat<kQueries>([&](auto g) INLINE { sums[g] += v * shares[g * kTile]; });
  }
  static void finish(const float* sums, float scale, long dim, T* out) {
    for (long d = 0; d < dim; d += kLanes) store_part(out + d, load(sums + d) * scale, dim - d);
  }
};

#if defined(__AVX512BF16__)
__m512bh load_pairs(const Bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Pairs of bfloat16 are multiplied and added in one instruction: neighbouring dimensions of a key,
// and of the values two tokens interleaved. Needs whole vectors of 32. The sums of 32 dimensions
// lie as the interleaving leaves them: dimensions 8i to 8i + 3 in one vector, 8i + 4 to 8i + 7 in
// the other.
struct Pairs {
  using Query = Bfloat16;
  using Share = Bfloat16;
  static constexpr long kDims = 2 * kLanes, kTogether = 2, kVectors = 2;

  static long padded(long dim) { return dim; }
  static const Bfloat16* queries(const Bfloat16* q, long, long, Bfloat16*) { return q; }
  template <long kQueries, long kTokens>
  INLINE static void multiply(const Bfloat16* const* keys, const Bfloat16* q, long d, long dim,
                              Floats* dots) {
    repeat<kTokens>([&](auto t) INLINE {
      const __m512bh key = load_pairs(keys[t] + d);
      repeat<kQueries>([&](auto g) INLINE {
        Floats& dot = dots[g * kTokens + t];
        dot = (Floats)_mm512_dpbf16_ps((__m512)dot, load_pairs(q + g * dim + d), key);
      });
    });
  }
  static void keep(Bfloat16* to, Floats shares) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)shares));
  }
  template <long kQueries>
  INLINE static void add(const Bfloat16* value, const Bfloat16* next, long d, long,
                         const Bfloat16* shares, Floats* sums) {
    const __m512i a = _mm512_loadu_si512(value + d), b = _mm512_loadu_si512(next + d);
    const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b);
    const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(a, b);
    repeat<kQueries>([&](auto g) INLINE {
      const __m512bh both = (__m512bh)_mm512_set1_epi32(load_raw<int>(shares + g * kTile));
      sums[2 * g] = (Floats)_mm512_dpbf16_ps((__m512)sums[2 * g], low, both);
      sums[2 * g + 1] = (Floats)_mm512_dpbf16_ps((__m512)sums[2 * g + 1], high, both);
    });
  }
  static void finish(const float* sums, float scale, long dim, Bfloat16* out) {
    for (long d = 0; d < dim; d += 32) {
      const Floats l = load(sums + d) * scale, h = load(sums + d + kLanes) * scale;
      store(out + d,
            __builtin_shufflevector(l, h, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
      store(out + d + kLanes, __builtin_shufflevector(l, h, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13,
                                                      14, 15, 28, 29, 30, 31));
    }
  }
};
#endif

// Views are described in elements.
struct Attention {
  const void* q;        // Row r: sequence r / kv_heads, queries (r % kv_heads) * group on.
  long sequence_stride;
  long kv_heads, group, dim;
  const void* context;  // [tokens, 2, rows, dim]: keys, then values.
  long token_stride, value_stride, row_stride;
  long tokens, rows;
  long first_row;       // The context's first row, among those of q.
  const int32_t* lengths;  // Of each sequence's prompt; slots from there to prompt_len are void.
  long prompt_len;
  float scale;
  void* out;            // [rows, group, dim]
};

template <class T, class Ops>
class Row {
 public:
  explicit Row(const Attention& a)
      : a_(a), width_(Ops::padded(a.dim)), kept_(a.group * width_), scores_(a.group * kTile),
        shares_(a.group * kTile), largest_(a.group), sums_(a.group * width_), total_(a.group) {}

  void attend(long row, bool is_last) {
    const long sequence = (a_.first_row + row) / a_.kv_heads;
    const long head = (a_.first_row + row) % a_.kv_heads;
    q_ = Ops::queries(static_cast<const T*>(a_.q) + sequence * a_.sequence_stride +
                          head * a_.group * a_.dim,
                      a_.group, a_.dim, kept_.data());
    const long void_from = a_.lengths ? a_.lengths[sequence] : a_.prompt_len;
    std::fill(largest_.begin(), largest_.end(), kMinusInfinity);
    std::fill(total_.begin(), total_.end(), Floats{});
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    const T* keys = static_cast<const T*>(a_.context) + row * a_.row_stride;
    for (long first = 0; first < a_.tokens; first += kTile) {
      const T* tile = keys + first * a_.token_stride;
      count_ = std::min(kTile, a_.tokens - first);
      keys_ = {tile, a_.token_stride, count_ - 1};
      values_ = {tile + a_.value_stride, a_.token_stride, count_ - 1};
      next_ = first + kTile < a_.tokens ? tile + kTile * a_.token_stride
                                        : keys + (is_last ? 0 : a_.row_stride);
      const Ints slot = kIota + int(first);
      is_seen_ = (kIota < int(count_)) & ((slot < int(void_from)) | (slot >= int(a_.prompt_len)));
      in_blocks([&](auto size, long g) { score<size.value>(g); });
      for (long g = 0; g < a_.group; ++g) share(g);
      in_blocks([&](auto size, long g) { add<size.value>(g); });
    }
    T* out = static_cast<T*>(a_.out) + row * a_.group * a_.dim;
    for (long g = 0; g < a_.group; ++g)
      Ops::finish(&sums_[g * width_], 1.0f / sum(total_[g]), a_.dim, out + g * a_.dim);
  }

 private:
  // Queries are taken eight, four, two and one at a time, so that what belongs to them stays in
  // registers.
  template <class F>
  void in_blocks(F&& work) const {
    long g = 0;
    for (; g + 8 <= a_.group; g += 8) work(std::integral_constant<long, 8>(), g);
    if (a_.group & 4) work(std::integral_constant<long, 4>(), g), g += 4;
    if (a_.group & 2) work(std::integral_constant<long, 2>(), g), g += 2;
    if (a_.group & 1) work(std::integral_constant<long, 1>(), g);
  }

  // Sixteen scores at a time: of kQueries queries and as many tokens as that leaves.
  template <long kQueries>
  void score(long g) {
    constexpr long kTokens = kLanes / kQueries;
    const typename Ops::Query* q = q_ + g * width_;
    for (long t = 0; t < count_; t += kTokens) {
      const T* keys[kTokens];
      repeat<kTokens>([&](auto i) INLINE { keys[i] = keys_[t + i]; });
      for (long i = 0; g == 0 && i < kTokens; ++i)
        fetch(next_ + (t + i) * a_.token_stride, a_.dim);
      Floats dots[kLanes] = {};
      for (long d = 0; d < a_.dim; d += Ops::kDims)
        Ops::template multiply<kQueries, kTokens>(keys, q, d, a_.dim, dots);
      const Floats scores = sums_of(dots) * a_.scale;
      for (long i = 0; i < kQueries; ++i)
        std::memcpy(&scores_[(g + i) * kTile + t],
                    reinterpret_cast<const float*>(&scores) + i * kTokens, kTokens * sizeof(float));
    }
  }

  // Turns the tile's scores of a query into shares. Where one exceeds all before it, what was
  // summed is fitted to it.
  void share(long g) {
    const Floats scores = is_seen_ ? load(&scores_[g * kTile]) : splat(kMinusInfinity);
    if (any_above(scores, largest_[g])) {
      const float before = largest_[g], now = largest(scores);
      const float kept = exp_of(splat(before - now))[0];
      largest_[g] = now;
      total_[g] *= kept;
      for (long d = g * width_; d < (g + 1) * width_; d += kLanes)
        store(&sums_[d], load(&sums_[d]) * kept);
    }
    // Nothing was seen yet where the maximum is still minus infinity.
    const float origin = largest_[g] == kMinusInfinity ? 0.0f : largest_[g];
    const Floats shares = exp_of(scores - origin);
    Ops::keep(&shares_[g * kTile], shares);
    total_[g] += shares;
  }

  // The sums of some dimensions stay in registers for the tile.
  template <long kQueries>
  void add(long g) {
    constexpr long kBlocks = kQueries > 4 ? 1 : kQueries > 2 ? 2 : 4;
    long d = 0;
    for (; d + (kBlocks - 1) * Ops::kDims < a_.dim; d += kBlocks * Ops::kDims)
      add_dims<kQueries, kBlocks>(g, d);
    for (; d < a_.dim; d += Ops::kDims) add_dims<kQueries, 1>(g, d);
  }

  template <long kQueries, long kBlocks>
  void add_dims(long g, long first_dim) {
    constexpr long kVectors = Ops::kVectors;
    constexpr long kSums = kQueries * kVectors;
    Floats sums[kBlocks * kSums];
    const auto home = [&](long i) INLINE {
      const long block = i / kSums, query = g + i % kSums / kVectors;
      return &sums_[query * width_ + first_dim + block * Ops::kDims + i % kVectors * kLanes];
    };
    repeat<kBlocks * kSums>([&](auto i) INLINE { sums[i] = load(home(i)); });
    for (long t = 0; t < count_; t += Ops::kTogether) {
      const T *value = values_[t], *following = values_[t + 1];
      for (long i = 0; g == 0 && i < Ops::kTogether; ++i)
        fetch(next_ + a_.value_stride + (t + i) * a_.token_stride + first_dim,
              kBlocks * Ops::kDims);
      repeat<kBlocks>([&](auto b) INLINE {
        Ops::template add<kQueries>(value, following, first_dim + b * Ops::kDims, a_.dim,
                                    &shares_[g * kTile + t], sums + b * kSums);
      });
    }
    repeat<kBlocks * kSums>([&](auto i) INLINE { store(home(i), sums[i]); });
  }

  const Attention& a_;
  const long width_;
  const typename Ops::Query* q_ = nullptr;
  // The tile: its tokens, those that are not void, keys and values.
  long count_ = 0;
  Ints is_seen_{};
  Tokens<T> keys_{}, values_{};
  const T* next_ = nullptr;  // The keys of the next tile.
  std::vector<typename Ops::Query> kept_;
  std::vector<float> scores_;
  std::vector<typename Ops::Share> shares_;
  std::vector<float> largest_, sums_;
  std::vector<Floats> total_;
};

template <class T, class Ops>
void attend(const Attention& a, int threads) {
#pragma omp parallel num_threads(threads)
  {
    Row<T, Ops> row(a);
#pragma omp for schedule(static)
    for (long r = 0; r < a.rows; ++r) row.attend(r, r + 1 == a.rows);
  }
}

}  // namespace
