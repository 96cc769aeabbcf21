// What the lanes of vectors make together: of one vector, or of as many as one has lanes.
#pragma once

#include "vectors.h"

namespace {

// Halves are combined with halves until one lane is left.
#if defined(__AVX512F__)
template <class F>
INLINE inline float reduce(Floats v, F combine) {
  v = combine(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
  return v[0];
}
#else
template <class F>
INLINE inline float reduce(Narrow v, F combine) {
#if defined(USES_AVX2)
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1));
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0));
#else
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 1, 0));
#endif
  return v[0];
}
template <class V, class F>
INLINE inline float reduce(Split<V> v, F combine) { return reduce(combine(v.low, v.high), combine); }
#endif
template <class V>
INLINE inline V larger(V a, V b) { return select(a > b, a, b); }
INLINE inline float sum(Floats v) {
  return reduce(v, [](auto a, auto b) INLINE { return a + b; });
}
INLINE inline float largest(Floats v) {
  return reduce(v, [](auto a, auto b) INLINE { return larger(a, b); });
}

bool any_above(Floats v, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  return largest(v) > limit;
#endif
}

#if defined(__AVX512F__)
// Vectors a and b: their partial sums, interleaved. Four steps make of 16 vectors their 16 sums.
template <int kStep, class V>
INLINE inline V fold(V a, V b) {
  if constexpr (kStep == 0)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  else if constexpr (kStep == 1)
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
template <class V>
INLINE inline V sums_of(const V* v) {
  V four[4];
  for (long i = 0; i < 4; ++i, v += 4)
    four[i] = fold<1>(fold<0>(v[0], v[1]), fold<0>(v[2], v[3]));
  return fold<2>(fold<2>(four[0], four[1]), fold<2>(four[2], four[3]));
}
// The sums of four vectors, added in the same order.
INLINE inline Floats four_sums_of(const Floats* v) {
  const Floats both = fold<2>(fold<1>(fold<0>(v[0], v[1]), fold<0>(v[2], v[3])), Floats{});
  return fold<2>(both, Floats{});
}
#else
// The sums of as many vectors as one has lanes, each in one lane.
#if defined(USES_AVX2)
INLINE inline NarrowInts sums_of(const NarrowInts* v) {
  const auto four = [](const NarrowInts* of) INLINE {
    return _mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)of[0], (__m256i)of[1]),
                             _mm256_hadd_epi32((__m256i)of[2], (__m256i)of[3]));
  };
  const __m256i a = four(v), b = four(v + 4);
  return (NarrowInts)_mm256_permute2x128_si256(a, b, 0x20) +
         (NarrowInts)_mm256_permute2x128_si256(a, b, 0x31);
}
#endif
INLINE inline Narrow sums_of(const Narrow* v) {
#if defined(USES_AVX2)
  const auto four = [](const Narrow* of) INLINE {
    return _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
  };
  const __m256 a = four(v), b = four(v + 4);
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
#else
  const auto two = [](Narrow a, Narrow b) INLINE {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  };
  const Narrow a = two(v[0], v[1]), b = two(v[2], v[3]);
  return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}
template <class V>
INLINE inline Split<V> sums_of(const Split<V>* v) {
  constexpr long kHalf = Split<V>::kCount / 2;
  V halves[2 * kHalf];
  repeat<2 * kHalf>([&](auto i) INLINE { halves[i] = v[i].low + v[i].high; });
  return {sums_of(halves), sums_of(halves + kHalf)};
}
#endif

}  // namespace
