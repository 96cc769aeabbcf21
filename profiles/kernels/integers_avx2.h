// Products in integers with AVX2.
#pragma once

#include <algorithm>

#include "reductions.h"

namespace {

constexpr long kPanels = 1, kMostRows = 6;
constexpr long kQuadRuns = 2;

// Calls an intrinsic with the halves of vectors.
template <class F, class... V>
INLINE inline Ints by_halves(F f, V... v) {
  return {(NarrowInts)f((__m256i)v.low...), (NarrowInts)f((__m256i)v.high...)};
}
INLINE inline Ints joined(__m256i low, __m256i high) { return {(NarrowInts)low, (NarrowInts)high}; }
INLINE inline Ints broadcast(int x) { return joined(_mm256_set1_epi32(x), _mm256_set1_epi32(x)); }
INLINE inline Ints nearest(Floats v) {
  return joined(_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high));
}
INLINE inline Floats fused(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
INLINE inline int sum_of(Ints v) {
  const NarrowInts both = v.low + v.high;
  int sum = 0;
  for (long i = 0; i < 8; ++i) sum += both[i];
  return sum;
}
template <long kCount, class Vector>
INLINE inline uint32_t largest_bits(Vector vector) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (long i = 0; i < kCount; ++i) {
    const Floats v = vector(i);
    most = _mm256_max_epu32(most, _mm256_and_si256((__m256i)v.low, magnitude));
    most = _mm256_max_epu32(most, _mm256_and_si256((__m256i)v.high, magnitude));
  }
  uint32_t largest = 0;
  for (long i = 0; i < 8; ++i) largest = std::max(largest, ((NarrowBits)most)[i]);
  return largest;
}
INLINE inline __m256i sixteen_shorts(Ints v) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32((__m256i)v.low, (__m256i)v.high), 0xd8);
}
INLINE inline void store_shorts(int16_t* to, Ints v) {
  _mm256_store_si256((__m256i*)to, sixteen_shorts(v));
}
INLINE inline void store_bytes(int8_t* to, Ints v) {
  const __m256i shorts = sixteen_shorts(v);
  _mm_store_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(shorts),
                                                _mm256_extracti128_si256(shorts, 1)));
}

INLINE inline Ints shorts_of(__m256i bytes) {
  return joined(_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)),
                _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1)));
}
INLINE inline Ints signed_shorts_of(__m256i bytes) {
  return joined(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
                _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1)));
}
template <int kBits>
INLINE inline Ints shifted(Ints v) {
  return by_halves([](__m256i x) INLINE {
    return kBits < 0 ? _mm256_slli_epi16(x, -kBits) : _mm256_srli_epi16(x, kBits);
  }, v);
}
template <int kBits>
INLINE inline Ints bits_of(Ints v, short mask) {
  const __m256i all = _mm256_set1_epi16(mask);
  return shifted<kBits>(v) & joined(all, all);
}
INLINE inline Ints less(Ints v, short by) {
  return by_halves([&](__m256i x) INLINE { return _mm256_sub_epi16(x, _mm256_set1_epi16(by)); }, v);
}
INLINE inline Ints times(Ints a, Ints b) {
  return by_halves([](__m256i x, __m256i y) INLINE { return _mm256_mullo_epi16(x, y); }, a, b);
}

// In memory, a factor is spread over a vector when it is loaded.
struct alignas(32) Factors { int16_t of[16]; };
INLINE inline Factors factors_of(__m128i bytes, short by = 0) {
  Factors kept;
  const __m256i all = _mm256_sub_epi16(_mm256_cvtepi8_epi16(bytes), _mm256_set1_epi16(by));
  _mm256_store_si256((__m256i*)kept.of, all);
  return kept;
}
template <long kFirst, long kSecond>
INLINE inline Ints two_factors(const Factors& v) {
  return joined(_mm256_set1_epi16(v.of[kFirst]), _mm256_set1_epi16(v.of[kSecond]));
}
template <long kAt>
INLINE inline Ints one_factor(const Factors& v) { return two_factors<kAt, kAt>(v); }

INLINE inline Ints load_bytes(const uint8_t* from, bool is_whole) {
  return joined(load_raw<__m256i>(from),
                is_whole ? load_raw<__m256i>(from + 32) : _mm256_setzero_si256());
}
INLINE inline Ints low_nibbles(Ints v) {
  return by_halves([](__m256i x) INLINE { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }, v);
}
INLINE inline Ints high_nibbles(Ints v) { return low_nibbles(shifted<4>(v)); }

INLINE inline void add_pairs(Ints& sums, Ints weights, Ints inputs) {
  sums += by_halves([](__m256i w, __m256i x) INLINE { return _mm256_madd_epi16(w, x); }, weights,
                    inputs);
}
INLINE inline void add_quads(Ints& sums, Ints weights, Ints inputs) {
  sums = by_halves([](__m256i s, __m256i w, __m256i x) INLINE {
    return _mm256_add_epi16(s, _mm256_maddubs_epi16(w, x));
  }, sums, weights, inputs);
}
INLINE inline Ints widened_quads(Ints sums) {
  return by_halves([](__m256i x) INLINE { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }, sums);
}

INLINE inline void half_sums_of(const Ints* rows, Ints* first, Ints* second) {
  NarrowInts low[kLanes], high[kLanes];
  repeat<kLanes>([&](auto i) INLINE { low[i] = rows[i].low, high[i] = rows[i].high; });
  *first = {sums_of(low), sums_of(low + 8)};
  *second = {sums_of(high), sums_of(high + 8)};
}

template <class From>
INLINE inline void take_four(From from, long held, Ints* to) {
  const __m128i mask = _mm_cmpgt_epi32(_mm_set1_epi32(int(held)), _mm_setr_epi32(0, 1, 2, 3));
  const auto row = [&](long i) INLINE {
    return held == 4 ? load_raw<__m128i>(from(i)) : _mm_maskload_epi32((const int*)from(i), mask);
  };
  const auto eight = [&](long first, __m256i* of) INLINE {
    __m256i rows[4];
    repeat<4>([&](auto i) INLINE {
      const __m256i one = _mm256_castsi128_si256(row(first + i));
      rows[i] = _mm256_inserti128_si256(one, row(first + i + 4), 1);
    });
    const __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]);
    const __m256i b = _mm256_unpacklo_epi32(rows[2], rows[3]);
    const __m256i c = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const __m256i d = _mm256_unpackhi_epi32(rows[2], rows[3]);
    of[0] = _mm256_unpacklo_epi64(a, b), of[1] = _mm256_unpackhi_epi64(a, b);
    of[2] = _mm256_unpacklo_epi64(c, d), of[3] = _mm256_unpackhi_epi64(c, d);
  };
  __m256i low[4], high[4];
  eight(0, low), eight(8, high);
  repeat<4>([&](auto i) INLINE { to[i] = joined(low[i], high[i]); });
}

// Element j of vector i becomes element i of vector j, of eight.
INLINE inline void transpose_eight(const NarrowInts* from, NarrowInts* to) {
  __m256i a[8], b[8];
  repeat<4>([&](auto i) INLINE {
    const __m256i first = (__m256i)from[2 * i], second = (__m256i)from[2 * i + 1];
    a[2 * i] = _mm256_unpacklo_epi32(first, second);
    a[2 * i + 1] = _mm256_unpackhi_epi32(first, second);
  });
  repeat<2>([&](auto i) INLINE {
    repeat<2>([&](auto j) INLINE {
      b[4 * i + 2 * j] = _mm256_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    });
  });
  repeat<4>([&](auto i) INLINE {
    to[i] = (NarrowInts)_mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
    to[4 + i] = (NarrowInts)_mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
  });
}
INLINE inline void transpose(const Ints* from, Ints* to) {
  for (long half = 0; half < 2; ++half) {
    NarrowInts low[8], high[8], first[8], second[8];
    const Ints* rows = from + 8 * half;
    repeat<8>([&](auto i) INLINE { low[i] = rows[i].low, high[i] = rows[i].high; });
    transpose_eight(low, first), transpose_eight(high, second);
    auto* at = reinterpret_cast<NarrowInts*>(to) + half;
    repeat<8>([&](auto i) INLINE { at[2 * i] = first[i], at[16 + 2 * i] = second[i]; });
  }
}

}  // namespace
