// What attention does with keys and values, for each kind of element and machine.
#pragma once

#include "reductions.h"

namespace {

// Tokens whose scores are known before their values are added: one vector of scores for a query.
constexpr long kTile = kLanes;

// The arithmetic of attention, in float32.
template <class T>
struct Wide {
  using Element = T;  // Of the keys, and of weights.
  using Query = float;
  using Share = float;
  static constexpr long kDims = kLanes;  // The sums of so many dimensions are kept together.
  static constexpr long kKeyDims = kLanes;  // Dimensions of a key that are multiplied at once.
  static constexpr long kTogether = 1;   // Tokens whose values are added by one instruction.
  static constexpr long kVectors = 1;    // Vectors of sums for them.

  static long padded(long dim) { return (dim + kLanes - 1) / kLanes * kLanes; }
  static const float* queries(const T* q, long group, long dim, float* kept) {
    for (long g = 0; g < group; ++g)
      for (long d = 0; d < dim; d += kLanes)
        store(kept + g * padded(dim) + d, load_part(q + g * dim + d, dim - d));
    return kept;
  }
  // Adds kKeyDims dimensions, of the `left` from d on, of the products of kTokens keys and kQueries
  // queries to their sums.
  template <long kQueries, long kTokens>
  INLINE static void multiply(const T* const* keys, const float* q, long stride, long d, long left,
                              Floats* dots) {
    repeat<kTokens>([&](auto t) INLINE {
      const Floats key = load_part(keys[t] + d, left);
      repeat<kQueries>([&](auto g) INLINE {
        dots[g * kTokens + t] += key * load(q + g * stride + d);
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
// stay in the order of the interleaving: dimensions 8i to 8i + 3 in one vector, 8i + 4 to 8i + 7 in
// the other.
struct Pairs {
  using Element = Bfloat16;
  using Query = Bfloat16;
  using Share = Bfloat16;
  static constexpr long kDims = 2 * kLanes, kKeyDims = kDims, kTogether = 2, kVectors = 2;

  static long padded(long dim) { return dim; }
  static const Bfloat16* queries(const Bfloat16* q, long, long, Bfloat16*) { return q; }
  template <long kQueries, long kTokens>
  INLINE static void multiply(const Bfloat16* const* keys, const Bfloat16* q, long stride, long d,
                              long, Floats* dots) {
    repeat<kTokens>([&](auto t) INLINE {
      const __m512bh key = load_pairs(keys[t] + d);
      repeat<kQueries>([&](auto g) INLINE {
        Floats& dot = dots[g * kTokens + t];
        dot = (Floats)_mm512_dpbf16_ps((__m512)dot, load_pairs(q + g * stride + d), key);
      });
    });
  }
  static void keep(Bfloat16* to, Floats shares) {
    _mm256_storeu_si256((__m256i*)to, (__m256i)_mm512_cvtneps_pbh((__m512)shares));
  }
  template <long kQueries>
  INLINE static void add(const Bfloat16* value, const Bfloat16* next, long d, long,
                         const Bfloat16* shares, Floats* sums) {
    add<kQueries>(_mm512_loadu_si512(value + d), _mm512_loadu_si512(next + d), shares, sums);
  }
  template <long kQueries>
  INLINE static void add(__m512i a, __m512i b, const Bfloat16* shares, Floats* sums) {
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

}  // namespace
