// Rows of elements in few bits: groups share a scale and a minimum. profiles/packing.py tells the
// layout.
#pragma once

#include <algorithm>
#include <type_traits>

#include "reductions.h"

namespace {

constexpr long kMaxGroup = 128;

struct Packing {
  long dim, group;
  int bits;

  long groups() const { return (dim + group - 1) / group; }
  long elements(long g) const { return std::min(group, dim - g * group); }
  // Where a group's codes, and its scale and minimum, begin in a row.
  long codes_at(long g) const { return g * group * bits / 8; }
  long code_bytes() const { return (dim * bits + 31) / 32 * 4; }
  long shared_at(long g) const { return code_bytes() + g * 2 * long(sizeof(Bfloat16)); }
  long row_bytes() const { return shared_at(groups()); }
  int top() const { return (1 << bits) - 1; }
};

// The nearest bfloat16 away from zero, or towards it.
Bfloat16 rounded_out(float x) {
  return {uint16_t((load_raw<uint32_t>(&x) + 0xffffu) >> 16)};
}
Bfloat16 rounded_in(float x) { return {uint16_t(load_raw<uint32_t>(&x) >> 16)}; }

// Stores each code in a byte.
INLINE inline void store_codes(uint8_t* to, Ints codes) {
#if defined(__AVX512F__)
  const Bytes bytes = __builtin_convertvector(codes, Bytes);
  std::memcpy(to, &bytes, sizeof bytes);
#else
  int32_t kept[kLanes];
  Memory<Ints>::store(kept, codes);
  for (long i = 0; i < kLanes; ++i) to[i] = uint8_t(kept[i]);
#endif
}

// Packs one group. The scale and the minimum are rounded so that they still span it: then no
// element is more than half a step from its code. Returns whether all is finite.
template <class T>
bool pack_group(const T* from, long count, int bits, int top, uint8_t* codes, uint8_t* shared) {
  Floats x[kMaxGroup / kLanes];
  const long vectors = (count + kLanes - 1) / kLanes;
  for (long i = 0; i < vectors; ++i) x[i] = load_part(from + i * kLanes, count - i * kLanes);
  if (const long rest = count % kLanes) {
    // What is missing from the last vector must widen no range.
    float last[kLanes];
    store(last, x[vectors - 1]);
    std::fill(last + rest, last + kLanes, last[0]);
    x[vectors - 1] = load(last);
  }
  Floats low = x[0], high = x[0], zero{};
  for (long i = 0; i < vectors; ++i) {
    low = select(x[i] < low, x[i], low);
    high = larger(high, x[i]);
    zero += x[i] - x[i];
  }
  const float least = 0.0f - largest(Floats{} - low), most = largest(high);
  const Bfloat16 minimum = least < 0 ? rounded_out(least) : rounded_in(least);
  const float base = to_float(minimum);
  // Where the range itself is beyond float32, everything is halved.
  const float half = std::isfinite(most - base) ? 1.0f : 0.5f;
  const Bfloat16 scale = rounded_out((most * half - base * half) / float(top) / half);
  const float step = to_float(scale);
  std::memcpy(shared, &scale, sizeof scale);
  std::memcpy(shared + sizeof scale, &minimum, sizeof minimum);
  if (sum(zero) != 0 || !std::isfinite(step) || !std::isfinite(base)) return false;
  uint8_t code[kMaxGroup + 1];
  for (long i = 0; i < vectors; ++i) {
    const Floats steps =
        step > 0 ? (x[i] * half - base * half) / (step * half) + 0.5f : Floats{};
    const Ints whole = convert<Ints>(steps);
    store_codes(code + i * kLanes, select(whole > top, Ints{} + top, whole));
  }
  if (bits == 8) {
    std::memcpy(codes, code, count);
  } else {
    const long pairs = (count + 1) / 2;
    if (count % 2) code[count] = 0;
    for (long i = 0; i < pairs; ++i) codes[i] = uint8_t(code[i] | code[i + pairs] << 4);
  }
  return true;
}

// Halved in between, because a group may span more than the largest float.
inline Floats element(Floats code, float step, float base) {
  return (code * (step * 0.5f) + base * 0.5f) * 2.0f;
}

template <class T>
void unpack_group(const uint8_t* codes, long count, int bits, float step, float base, T* to) {
  if (bits == 8 && count % kLanes == 0) {
    for (long i = 0; i < count; i += kLanes)
      store(to + i, element(as_floats(codes_of(codes + i)), step, base));
    return;
  }
  uint8_t code[kMaxGroup + kLanes];
  if (bits == 8) {
    std::memcpy(code, codes, count);
  } else {
    const long pairs = (count + 1) / 2;
    for (long i = 0; i < pairs; ++i) {
      code[i] = codes[i] & 15;
      code[i + pairs] = codes[i] >> 4;
    }
  }
  for (long i = 0; i < count; i += kLanes)
    store_part(to + i, element(as_floats(codes_of(code + i)), step, base), count - i);
}

#if defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_TABLE
// Sixteen codes have sixteen values: a group's table is looked up, 32 codes at a time. Fused, what is
// multiplied and added does not overflow in between.
INLINE inline __m512i values_of(const uint8_t* shared) {
  const __m512i pair = _mm512_set1_epi32(load_raw<int>((const int*)shared));
  const __m512 step = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
  const __m512 base = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(-65536)));
  const __m512 code = _mm512_cvtepi32_ps((__m512i)kIota);
  const __m512 values = _mm512_fmadd_ps(code, step, base);
  // They stand there twice, so that the fifth bit of an index may be anything.
  return (__m512i)_mm512_cvtne2ps_pbh(values, values);
}

void unpack_by_table(const uint8_t* codes, long count, const uint8_t* shared, Bfloat16* to) {
  const __m512i values = values_of(shared);
  const long pairs = count / 2;
  long i = 0;
  for (; i + 32 <= pairs; i += 32) {
    const __m512i both = _mm512_cvtepu8_epi16(load_raw<__m256i>(codes + i));
    const __m512i high = _mm512_srli_epi16(both, 4);
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi16(both, values));
    _mm512_storeu_si512(to + i + pairs, _mm512_permutexvar_epi16(high, values));
  }
  const __m256i half = _mm512_castsi512_si256(values);
  for (; i < pairs; i += 16) {
    const __m256i both = _mm256_cvtepu8_epi16(load_raw<__m128i>(codes + i));
    const __m256i high = _mm256_srli_epi16(both, 4);
    _mm256_storeu_si256((__m256i*)(to + i), _mm256_permutexvar_epi16(both, half));
    _mm256_storeu_si256((__m256i*)(to + i + pairs), _mm256_permutexvar_epi16(high, half));
  }
}
#endif

// Unpacks `size` elements of a row, from one on that begins a group.
template <class T>
void unpack_part(const Packing& p, const uint8_t* row, long first, long size, T* to) {
  // Copied, so that what is stored cannot be taken for it.
  const long group = p.group, bits = p.bits;
  const uint8_t *codes = row + p.codes_at(first / group), *shared = row + p.shared_at(first / group);
  for (long at = 0; at < size; at += group, codes += group * bits / 8, shared += 4) {
    const long count = std::min(group, size - at);
#if defined(HAS_TABLE)
    if constexpr (std::is_same_v<T, Bfloat16>)
      if (bits == 4 && count % 32 == 0) {
        unpack_by_table(codes, count, shared, to + at);
        continue;
      }
#endif
    const float step = to_float(load_raw<Bfloat16>((const Bfloat16*)shared));
    const float base = to_float(load_raw<Bfloat16>((const Bfloat16*)shared + 1));
    unpack_group(codes, count, int(bits), step, base, to + at);
  }
}

// Rows [outer, inner], each `dim` elements or the bytes that they are packed in.
struct Rows {
  long outer, inner, outer_stride, inner_stride;
};

// Returns whether every value is finite.
template <class T>
bool pack_rows(const T* from, const Rows& rows, const Packing& p, uint8_t* to, long out_outer,
               long out_inner, int threads) {
  bool is_finite = true;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2) reduction(&& : is_finite)
  for (long o = 0; o < rows.outer; ++o)
    for (long i = 0; i < rows.inner; ++i) {
      const T* row = from + o * rows.outer_stride + i * rows.inner_stride;
      uint8_t* packed = to + o * out_outer + i * out_inner;
      std::fill(packed + (p.dim * p.bits + 7) / 8, packed + p.code_bytes(), 0);
      for (long g = 0; g < p.groups(); ++g)
        is_finite = pack_group(row + g * p.group, p.elements(g), p.bits, p.top(),
                               packed + p.codes_at(g), packed + p.shared_at(g)) &&
                    is_finite;
    }
  return is_finite;
}

template <class T>
void unpack_rows(const uint8_t* from, const Rows& rows, const Packing& p, T* to, long out_outer,
                 long out_inner, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(2)
  for (long o = 0; o < rows.outer; ++o)
    for (long i = 0; i < rows.inner; ++i)
      unpack_part(p, from + o * rows.outer_stride + i * rows.inner_stride, 0, p.dim,
                  to + o * out_outer + i * out_inner);
}

}  // namespace
