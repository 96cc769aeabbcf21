// Products in integers with AVX-512, and VNNI where the processor has it.
#pragma once

#include "reductions.h"

namespace {

constexpr long kPanels = 2, kMostRows = 12;
#if defined(__AVX512VNNI__)
constexpr long kQuadRuns = 1;
#else
constexpr long kQuadRuns = 2;
#endif

INLINE inline Ints broadcast(int x) { return (Ints)_mm512_set1_epi32(x); }
INLINE inline Ints nearest(Floats v) { return (Ints)_mm512_cvtps_epi32((__m512)v); }
INLINE inline Floats fused(Floats a, Floats b, Floats c) {
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
INLINE inline int sum_of(Ints v) { return _mm512_reduce_add_epi32((__m512i)v); }
template <long kCount, class Vector>
INLINE inline uint32_t largest_bits(Vector vector) {
  __m512i most = _mm512_setzero_si512();
  for (long i = 0; i < kCount; ++i)
    most = _mm512_max_epu32(most, (__m512i)((Bits)vector(i) & 0x7fffffffu));
  return _mm512_reduce_max_epu32(most);
}
INLINE inline void store_bytes(int8_t* to, Ints v) {
  _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8((__m512i)v));
}
INLINE inline void store_shorts(int16_t* to, Ints v) {
  _mm256_store_si256((__m256i*)to, _mm512_cvtsepi32_epi16((__m512i)v));
}

INLINE inline Ints shorts_of(__m256i bytes) { return (Ints)_mm512_cvtepu8_epi16(bytes); }
INLINE inline Ints signed_shorts_of(__m256i bytes) { return (Ints)_mm512_cvtepi8_epi16(bytes); }
template <int kBits>
INLINE inline Ints shifted(Ints v) {
  const __m512i x = (__m512i)v;
  return (Ints)(kBits < 0 ? _mm512_slli_epi16(x, -kBits) : _mm512_srli_epi16(x, kBits));
}
template <int kBits>
INLINE inline Ints bits_of(Ints v, short mask) {
  return shifted<kBits>(v) & (Ints)_mm512_set1_epi16(mask);
}
INLINE inline Ints less(Ints v, short by) {
  return (Ints)_mm512_sub_epi16((__m512i)v, _mm512_set1_epi16(by));
}
INLINE inline Ints times(Ints a, Ints b) {
  return (Ints)_mm512_mullo_epi16((__m512i)a, (__m512i)b);
}

typedef __m512i Factors;
INLINE inline Factors factors_of(__m128i bytes, short by = 0) {
  const Factors all = _mm512_castsi256_si512(_mm256_cvtepi8_epi16(bytes));
  return by ? _mm512_sub_epi16(all, _mm512_set1_epi16(by)) : all;
}
template <long kFirst, long kSecond>
INLINE inline Ints two_factors(const Factors& of) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi16(kFirst)),
                                          _mm256_set1_epi16(kSecond), 1);
  return (Ints)_mm512_permutexvar_epi16(both, of);
}
template <long kAt>
INLINE inline Ints one_factor(const Factors& of) {
  return (Ints)_mm512_permutexvar_epi16(_mm512_set1_epi16(kAt), of);
}

INLINE inline Ints load_bytes(const uint8_t* from, bool is_whole) {
  return (Ints)_mm512_maskz_loadu_epi64(is_whole ? 0xff : 0x0f, from);
}
INLINE inline Ints low_nibbles(Ints v) { return v & (Ints)_mm512_set1_epi8(15); }
INLINE inline Ints high_nibbles(Ints v) { return low_nibbles(shifted<4>(v)); }

#if defined(__AVX512VNNI__)
// GCC 12 would copy the sums of the intrinsics, and run out of registers.
INLINE inline void add_pairs(Ints& sums, Ints weights, Ints inputs) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
}
INLINE inline void add_quads(Ints& sums, Ints weights, Ints inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
}
INLINE inline Ints widened_quads(Ints sums) { return sums; }
#else
INLINE inline void add_pairs(Ints& sums, Ints weights, Ints inputs) {
  sums += (Ints)_mm512_madd_epi16((__m512i)weights, (__m512i)inputs);
}
INLINE inline void add_quads(Ints& sums, Ints weights, Ints inputs) {
  const __m512i products = _mm512_maddubs_epi16((__m512i)weights, (__m512i)inputs);
  sums = (Ints)_mm512_add_epi16((__m512i)sums, products);
}
INLINE inline Ints widened_quads(Ints sums) {
  return (Ints)_mm512_madd_epi16((__m512i)sums, _mm512_set1_epi16(1));
}
#endif

INLINE inline void half_sums_of(const Ints* rows, Ints* first, Ints* second) {
  Ints four[4];
  repeat<4>([&](auto i) INLINE {
    const Ints* v = rows + 4 * i;
    four[i] = fold<1>(fold<0>(v[0], v[1]), fold<0>(v[2], v[3]));
  });
  // Each has the sums of eight rows, those of both halves in turns of four.
  const Ints a = fold<2>(four[0], four[1]), b = fold<2>(four[2], four[3]);
  *first = (Ints)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0x88);
  *second = (Ints)_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
}

template <class From>
INLINE inline void take_four(From from, long held, Ints* to) {
  const __mmask8 mask = __mmask8((1 << held) - 1);
  const auto row = [&, mask](long i) INLINE { return _mm_maskz_loadu_epi32(mask, from(i)); };
  __m512i rows[4];
  repeat<4>([&](auto i) INLINE {
    __m512i four = _mm512_castsi128_si512(row(i));
    four = _mm512_inserti32x4(four, row(4 + i), 1);
    four = _mm512_inserti32x4(four, row(8 + i), 2);
    rows[i] = _mm512_inserti32x4(four, row(12 + i), 3);
  });
  const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]);
  const __m512i b = _mm512_unpacklo_epi32(rows[2], rows[3]);
  const __m512i c = _mm512_unpackhi_epi32(rows[0], rows[1]);
  const __m512i d = _mm512_unpackhi_epi32(rows[2], rows[3]);
  to[0] = (Ints)_mm512_unpacklo_epi64(a, b), to[1] = (Ints)_mm512_unpackhi_epi64(a, b);
  to[2] = (Ints)_mm512_unpacklo_epi64(c, d), to[3] = (Ints)_mm512_unpackhi_epi64(c, d);
}

INLINE inline void transpose(const Ints* from, Ints* to) {
  __m512i a[16], b[16];
  const auto v = [&](long i) INLINE { return (__m512i)from[i]; };
  repeat<8>([&](auto i) INLINE {
    a[2 * i] = _mm512_unpacklo_epi32(v(2 * i), v(2 * i + 1));
    a[2 * i + 1] = _mm512_unpackhi_epi32(v(2 * i), v(2 * i + 1));
  });
  repeat<4>([&](auto i) INLINE {
    repeat<2>([&](auto j) INLINE {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    });
  });
  repeat<4>([&](auto i) INLINE {
    a[i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0x88);
    a[4 + i] = _mm512_shuffle_i32x4(b[i], b[4 + i], 0xdd);
    a[8 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0x88);
    a[12 + i] = _mm512_shuffle_i32x4(b[8 + i], b[12 + i], 0xdd);
  });
  repeat<4>([&](auto i) INLINE {
    to[i] = (Ints)_mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
    to[4 + i] = (Ints)_mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88);
    to[8 + i] = (Ints)_mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
    to[12 + i] = (Ints)_mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd);
  });
}

}  // namespace
