// The vectors of integers.h as registers of AVX-512.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace {

typedef __m512i Integers;
typedef __m512 Singles;

// Vectors of weights, and rows of inputs, whose products are summed at once.
constexpr long kPanels = 2, kMostRows = 12;
// Runs of quads whose products are summed before they are widened: all of a group.
constexpr long kQuadRuns = 1;

INLINE inline Integers no_integers() { return _mm512_setzero_si512(); }
INLINE inline Integers load_integers(const void* from) { return _mm512_load_si512(from); }
INLINE inline void store_integers(void* to, Integers v) { _mm512_store_si512(to, v); }
INLINE inline Integers spread_integer(int x) { return _mm512_set1_epi32(x); }

INLINE inline Singles load_singles(const float* from) { return _mm512_loadu_ps(from); }
INLINE inline Singles load_singles(const Bfloat16* from) { return (__m512)load(from); }
INLINE inline void store_singles(float* to, Singles v) { _mm512_storeu_ps(to, v); }
INLINE inline Singles spread_single(float x) { return _mm512_set1_ps(x); }
INLINE inline Singles singles_of(Integers v) { return _mm512_cvtepi32_ps(v); }
INLINE inline Integers bits_of(Singles v) { return (__m512i)v; }
INLINE inline Integers nearest(Singles v) { return _mm512_cvtps_epi32(v); }
INLINE inline Singles product(Singles a, Singles b) { return _mm512_mul_ps(a, b); }
// a * b + c, rounded once.
INLINE inline Singles fused(Singles a, Singles b, Singles c) { return _mm512_fmadd_ps(a, b, c); }

INLINE inline Integers plus(Integers a, Integers b) { return _mm512_add_epi32(a, b); }
INLINE inline int sum_of(Integers v) { return _mm512_reduce_add_epi32(v); }
// The bits of the largest magnitude of kCount vectors of floats; `vector` gives the i-th.
template <long kCount, class Vector>
INLINE inline uint32_t largest_bits(Vector vector) {
  __m512i most = _mm512_setzero_si512();
  for (long i = 0; i < kCount; ++i)
    most = _mm512_max_epu32(most, _mm512_and_si512((__m512i)vector(i), _mm512_set1_epi32(0x7fffffff)));
  return _mm512_reduce_max_epu32(most);
}
// Each integer as a byte, or as one of 16 bits.
INLINE inline void store_bytes(int8_t* to, Integers v) {
  _mm_store_si128((__m128i*)to, _mm512_cvtepi32_epi8(v));
}
INLINE inline void store_shorts(int16_t* to, Integers v) {
  _mm256_store_si256((__m256i*)to, _mm512_cvtsepi32_epi16(v));
}

// Thirty-two bytes, as integers of 16 bits.
INLINE inline Integers shorts_of(__m256i bytes) { return _mm512_cvtepu8_epi16(bytes); }
INLINE inline Integers signed_shorts_of(__m256i bytes) { return _mm512_cvtepi8_epi16(bytes); }
// Bits of integers of 16 bits, moved to the right.
template <int kBits>
INLINE inline Integers shifted(Integers v) {
  return kBits < 0 ? _mm512_slli_epi16(v, -kBits) : _mm512_srli_epi16(v, kBits);
}
INLINE inline Integers masked(Integers v, short mask) {
  return _mm512_and_si512(v, _mm512_set1_epi16(mask));
}
INLINE inline Integers either(Integers a, Integers b) { return _mm512_or_si512(a, b); }
INLINE inline Integers less(Integers v, short by) {
  return _mm512_sub_epi16(v, _mm512_set1_epi16(by));
}
INLINE inline Integers times(Integers a, Integers b) { return _mm512_mullo_epi16(a, b); }

// Sixteen factors of 16 bits.
typedef __m512i Factors;
INLINE inline Factors factors_of(__m128i bytes) {
  return _mm512_castsi256_si512(_mm256_cvtepi8_epi16(bytes));
}
INLINE inline Factors less_factors(Factors v, short by) { return less(v, by); }
// One factor 16 times and another one 16 times; or one 32 times.
template <long kFirst, long kSecond>
INLINE inline Integers two_factors(const Factors& of) {
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_set1_epi16(kFirst)),
                                          _mm256_set1_epi16(kSecond), 1);
  return _mm512_permutexvar_epi16(both, of);
}
template <long kAt>
INLINE inline Integers one_factor(const Factors& of) {
  return _mm512_permutexvar_epi16(_mm512_set1_epi16(kAt), of);
}
INLINE inline Singles singles_of_bytes(__m128i bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}

// Sixty-four bytes from anywhere, or the first half of them and zeros.
INLINE inline Integers load_bytes(const uint8_t* from, bool is_whole) {
  return _mm512_maskz_loadu_epi64(is_whole ? 0xff : 0x0f, from);
}
INLINE inline Integers low_nibbles(Integers v) {
  return _mm512_and_si512(v, _mm512_set1_epi8(15));
}
INLINE inline Integers high_nibbles(Integers v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }

// Adds products of pairs of 16 bits. GCC 12 would copy the sums of the intrinsic, and run out of
// registers.
INLINE inline void add_pairs(Integers& sums, Integers weights, Integers inputs) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
}
// Adds products of quads: of bytes up to 15 with signed bytes. The same holds for the intrinsic.
INLINE inline void add_quads(Integers& sums, Integers weights, Integers inputs) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
}
// The sums of quads, as they are added to others.
INLINE inline Integers widened_quads(Integers sums) { return sums; }

// Of each vector, the sums of its first and of its second half: lane i of both is of the i-th.
INLINE inline void half_sums_of(const Integers* rows, Integers* first, Integers* second) {
  Ints four[4];
  repeat<4>([&](auto i) INLINE {
    const auto v = [&](long j) INLINE { return (Ints)rows[4 * i + j]; };
    four[i] = fold<1>(fold<0>(v(0), v(1)), fold<0>(v(2), v(3)));
  });
  // Each has the sums of eight rows, those of both halves in turns of four.
  const Ints a = fold<2>(four[0], four[1]), b = fold<2>(four[2], four[3]);
  *first = _mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0x88);
  *second = _mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd);
}
// The sum of each vector in its lane.
INLINE inline Integers row_sums_of(const Integers* rows) {
  return (__m512i)sums_of(reinterpret_cast<const Ints*>(rows));
}
INLINE inline Singles row_sums_of(const Singles* rows) {
  return (__m512)sums_of(reinterpret_cast<const Floats*>(rows));
}

// Four integers of each of sixteen rows, of which `held` are stored: `to[i]` has the i-th of each row.
template <class From>
INLINE inline void take_four(From from, long held, Integers* to) {
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
  to[0] = _mm512_unpacklo_epi64(a, b), to[1] = _mm512_unpackhi_epi64(a, b);
  to[2] = _mm512_unpacklo_epi64(c, d), to[3] = _mm512_unpackhi_epi64(c, d);
}
// The lower and the upper 16 bits of integers, as the bfloat16 that they are.
INLINE inline Singles low_bfloat16(Integers v) { return (__m512)_mm512_slli_epi32(v, 16); }
INLINE inline Singles high_bfloat16(Integers v) {
  return (__m512)_mm512_and_si512(v, _mm512_set1_epi32(-65536));
}

// Element j of vector i becomes element i of vector j.
INLINE inline void transpose(const Integers* from, Integers* to) {
  __m512i a[16], b[16];
  repeat<8>([&](auto i) INLINE {
    a[2 * i] = _mm512_unpacklo_epi32(from[2 * i], from[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(from[2 * i], from[2 * i + 1]);
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
    to[i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0x88);
    to[4 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0x88);
    to[8 + i] = _mm512_shuffle_i32x4(a[i], a[8 + i], 0xdd);
    to[12 + i] = _mm512_shuffle_i32x4(a[4 + i], a[12 + i], 0xdd);
  });
}

}  // namespace
