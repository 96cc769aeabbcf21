// The vectors of integers.h as two registers of AVX2 each.
#pragma once

#include <immintrin.h>

#include "vectors.h"

namespace {

struct Integers { __m256i low, high; };
struct Singles { __m256 low, high; };

// Vectors of weights, and rows of inputs, whose products are summed at once: in 12 of 16 registers.
constexpr long kPanels = 1, kMostRows = 6;
// Runs of quads whose products are summed before they are widened. Pairs of a quad are summed in 16
// bits, which hold eight times two products of codes up to 15 with inputs up to 127.
constexpr long kQuadRuns = 2;

INLINE inline Integers no_integers() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
INLINE inline Integers load_integers(const void* from) {
  const auto* at = static_cast<const __m256i*>(from);
  return {_mm256_load_si256(at), _mm256_load_si256(at + 1)};
}
INLINE inline void store_integers(void* to, Integers v) {
  auto* at = static_cast<__m256i*>(to);
  _mm256_store_si256(at, v.low), _mm256_store_si256(at + 1, v.high);
}
INLINE inline Integers spread_integer(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }

INLINE inline Singles load_singles(const float* from) {
  return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
}
INLINE inline __m256 eight_singles(const Bfloat16* from) {
  return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw<__m128i>(from)), 16);
}
INLINE inline Singles load_singles(const Bfloat16* from) {
  return {eight_singles(from), eight_singles(from + 8)};
}
INLINE inline void store_singles(float* to, Singles v) {
  _mm256_storeu_ps(to, v.low), _mm256_storeu_ps(to + 8, v.high);
}
INLINE inline Singles spread_single(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE inline Singles singles_of(Integers v) {
  return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)};
}
INLINE inline Integers bits_of(Singles v) { return {(__m256i)v.low, (__m256i)v.high}; }
INLINE inline Integers nearest(Singles v) {
  return {_mm256_cvtps_epi32(v.low), _mm256_cvtps_epi32(v.high)};
}
INLINE inline Singles product(Singles a, Singles b) {
  return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
// a * b + c, rounded once.
INLINE inline Singles fused(Singles a, Singles b, Singles c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

INLINE inline Integers plus(Integers a, Integers b) {
  return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
}
INLINE inline int sum_of(Integers v) {
  int lanes[8], sum = 0;
  _mm256_storeu_si256((__m256i*)lanes, _mm256_add_epi32(v.low, v.high));
  for (int lane : lanes) sum += lane;
  return sum;
}
// The bits of the largest magnitude of kCount vectors of floats; `vector` gives the i-th.
template <long kCount, class Vector>
INLINE inline uint32_t largest_bits(Vector vector) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_setzero_si256();
  for (long i = 0; i < kCount; ++i) {
    const Singles v = vector(i);
    most = _mm256_max_epu32(most, _mm256_and_si256((__m256i)v.low, magnitude));
    most = _mm256_max_epu32(most, _mm256_and_si256((__m256i)v.high, magnitude));
  }
  uint32_t lanes[8], largest = 0;
  _mm256_storeu_si256((__m256i*)lanes, most);
  for (uint32_t lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}
// Each integer as one of 16 bits, and as a byte.
INLINE inline __m256i sixteen_shorts(Integers v) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(v.low, v.high), 0xd8);
}
INLINE inline void store_shorts(int16_t* to, Integers v) {
  _mm256_store_si256((__m256i*)to, sixteen_shorts(v));
}
INLINE inline void store_bytes(int8_t* to, Integers v) {
  const __m256i shorts = sixteen_shorts(v);
  _mm_store_si128((__m128i*)to, _mm_packs_epi16(_mm256_castsi256_si128(shorts),
                                                _mm256_extracti128_si256(shorts, 1)));
}

// Thirty-two bytes, as integers of 16 bits.
INLINE inline Integers shorts_of(__m256i bytes) {
  return {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(bytes)),
          _mm256_cvtepu8_epi16(_mm256_extracti128_si256(bytes, 1))};
}
INLINE inline Integers signed_shorts_of(__m256i bytes) {
  return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes)),
          _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1))};
}
// Bits of integers of 16 bits, moved to the right.
template <int kBits>
INLINE inline __m256i shifted(__m256i v) {
  return kBits < 0 ? _mm256_slli_epi16(v, -kBits) : _mm256_srli_epi16(v, kBits);
}
template <int kBits>
INLINE inline Integers shifted(Integers v) { return {shifted<kBits>(v.low), shifted<kBits>(v.high)}; }
INLINE inline Integers masked(Integers v, short mask) {
  const __m256i bits = _mm256_set1_epi16(mask);
  return {_mm256_and_si256(v.low, bits), _mm256_and_si256(v.high, bits)};
}
INLINE inline Integers either(Integers a, Integers b) {
  return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
}
INLINE inline Integers less(Integers v, short by) {
  const __m256i all = _mm256_set1_epi16(by);
  return {_mm256_sub_epi16(v.low, all), _mm256_sub_epi16(v.high, all)};
}
INLINE inline Integers times(Integers a, Integers b) {
  return {_mm256_mullo_epi16(a.low, b.low), _mm256_mullo_epi16(a.high, b.high)};
}

// Sixteen factors of 16 bits: in memory, each is spread over a vector when it is loaded.
struct alignas(32) Factors { int16_t of[16]; };
INLINE inline Factors factors_of(__m128i bytes) {
  Factors kept;
  _mm256_store_si256((__m256i*)kept.of, _mm256_cvtepi8_epi16(bytes));
  return kept;
}
INLINE inline Factors less_factors(Factors v, short by) {
  for (int16_t& factor : v.of) factor = int16_t(factor - by);
  return v;
}
// One factor 16 times and another one 16 times; or one 32 times.
template <long kFirst, long kSecond>
INLINE inline Integers two_factors(const Factors& v) {
  return {_mm256_set1_epi16(v.of[kFirst]), _mm256_set1_epi16(v.of[kSecond])};
}
template <long kAt>
INLINE inline Integers one_factor(const Factors& v) { return two_factors<kAt, kAt>(v); }
INLINE inline Singles singles_of_bytes(__m128i bytes) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
          _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

// Sixty-four bytes from anywhere, or the first half of them and zeros.
INLINE inline Integers load_bytes(const uint8_t* from, bool is_whole) {
  return {load_raw<__m256i>(from), is_whole ? load_raw<__m256i>(from + 32) : _mm256_setzero_si256()};
}
INLINE inline Integers low_nibbles(Integers v) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(v.low, mask), _mm256_and_si256(v.high, mask)};
}
INLINE inline Integers high_nibbles(Integers v) { return low_nibbles(shifted<4>(v)); }

// Adds products of pairs of 16 bits.
INLINE inline void add_pairs(Integers& sums, Integers weights, Integers inputs) {
  sums.low = _mm256_add_epi32(sums.low, _mm256_madd_epi16(weights.low, inputs.low));
  sums.high = _mm256_add_epi32(sums.high, _mm256_madd_epi16(weights.high, inputs.high));
}
// Adds products of quads: of bytes up to 15 with signed bytes. The two pairs of each stay apart.
INLINE inline void add_quads(Integers& sums, Integers weights, Integers inputs) {
  sums.low = _mm256_add_epi16(sums.low, _mm256_maddubs_epi16(weights.low, inputs.low));
  sums.high = _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(weights.high, inputs.high));
}
// The sums of quads, as they are added to others.
INLINE inline Integers widened_quads(Integers sums) {
  const __m256i one = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(sums.low, one), _mm256_madd_epi16(sums.high, one)};
}

// The sum of each of eight vectors in its lane.
INLINE inline __m256i eight_sums_of(const __m256i* v) {
  const auto four = [](const __m256i* of) INLINE {
    return _mm256_hadd_epi32(_mm256_hadd_epi32(of[0], of[1]), _mm256_hadd_epi32(of[2], of[3]));
  };
  const __m256i a = four(v), b = four(v + 4);
  return _mm256_add_epi32(_mm256_permute2x128_si256(a, b, 0x20),
                          _mm256_permute2x128_si256(a, b, 0x31));
}
// Of each vector, the sums of its first and of its second half: lane i of both is of the i-th.
INLINE inline void half_sums_of(const Integers* rows, Integers* first, Integers* second) {
  __m256i low[16], high[16];
  repeat<16>([&](auto i) INLINE { low[i] = rows[i].low, high[i] = rows[i].high; });
  *first = {eight_sums_of(low), eight_sums_of(low + 8)};
  *second = {eight_sums_of(high), eight_sums_of(high + 8)};
}
// The sum of each vector in its lane.
INLINE inline Integers row_sums_of(const Integers* rows) {
  __m256i both[16];
  repeat<16>([&](auto i) INLINE { both[i] = _mm256_add_epi32(rows[i].low, rows[i].high); });
  return {eight_sums_of(both), eight_sums_of(both + 8)};
}
INLINE inline __m256 eight_sums_of(const __m256* v) {
  const auto four = [](const __m256* of) INLINE {
    return _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
  };
  const __m256 a = four(v), b = four(v + 4);
  return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}
INLINE inline Singles row_sums_of(const Singles* rows) {
  __m256 both[16];
  repeat<16>([&](auto i) INLINE { both[i] = _mm256_add_ps(rows[i].low, rows[i].high); });
  return {eight_sums_of(both), eight_sums_of(both + 8)};
}

// Four integers of each of sixteen rows, of which `held` are stored: `to[i]` has the i-th of each row.
template <class From>
INLINE inline void take_four(From from, long held, Integers* to) {
  const __m128i mask = _mm_cmpgt_epi32(_mm_set1_epi32(int(held)), _mm_setr_epi32(0, 1, 2, 3));
  // Rows that are four apart share a register.
  const auto two = [&](long i) INLINE {
    const auto row = [&](long j) INLINE {
      return held == 4 ? load_raw<__m128i>(from(j)) : _mm_maskload_epi32((const int*)from(j), mask);
    };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(i + 4), 1);
  };
  const auto eight = [&](long i, __m256i* of) INLINE {
    const __m256i rows[] = {two(i), two(i + 1), two(i + 2), two(i + 3)};
    const __m256i a = _mm256_unpacklo_epi32(rows[0], rows[1]);
    const __m256i b = _mm256_unpacklo_epi32(rows[2], rows[3]);
    const __m256i c = _mm256_unpackhi_epi32(rows[0], rows[1]);
    const __m256i d = _mm256_unpackhi_epi32(rows[2], rows[3]);
    of[0] = _mm256_unpacklo_epi64(a, b), of[1] = _mm256_unpackhi_epi64(a, b);
    of[2] = _mm256_unpacklo_epi64(c, d), of[3] = _mm256_unpackhi_epi64(c, d);
  };
  __m256i low[4], high[4];
  eight(0, low), eight(8, high);
  repeat<4>([&](auto i) INLINE { to[i] = {low[i], high[i]}; });
}
// The lower and the upper 16 bits of integers, as the bfloat16 that they are.
INLINE inline Singles low_bfloat16(Integers v) {
  return {(__m256)_mm256_slli_epi32(v.low, 16), (__m256)_mm256_slli_epi32(v.high, 16)};
}
INLINE inline Singles high_bfloat16(Integers v) {
  const __m256i upper = _mm256_set1_epi32(-65536);
  return {(__m256)_mm256_and_si256(v.low, upper), (__m256)_mm256_and_si256(v.high, upper)};
}

// Element j of vector i becomes element i of vector j, of eight.
INLINE inline void transpose_eight(const __m256i* from, __m256i* to) {
  __m256i a[8], b[8];
  repeat<4>([&](auto i) INLINE {
    a[2 * i] = _mm256_unpacklo_epi32(from[2 * i], from[2 * i + 1]);
    a[2 * i + 1] = _mm256_unpackhi_epi32(from[2 * i], from[2 * i + 1]);
  });
  repeat<2>([&](auto i) INLINE {
    repeat<2>([&](auto j) INLINE {
      b[4 * i + 2 * j] = _mm256_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm256_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    });
  });
  repeat<4>([&](auto i) INLINE {
    to[i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x20);
    to[4 + i] = _mm256_permute2x128_si256(b[i], b[4 + i], 0x31);
  });
}
// The same of sixteen, to other vectors.
INLINE inline void transpose(const Integers* from, Integers* to) {
  for (long half = 0; half < 2; ++half) {
    __m256i low[8], high[8], first[8], second[8];
    repeat<8>([&](auto i) INLINE { low[i] = from[8 * half + i].low, high[i] = from[8 * half + i].high; });
    transpose_eight(low, first), transpose_eight(high, second);
    auto* at = reinterpret_cast<__m256i*>(to) + half;
    repeat<8>([&](auto i) INLINE { at[2 * i] = first[i], at[16 + 2 * i] = second[i]; });
  }
}

}  // namespace
