// Rows of encoded elements as floats: what all decoders share. profiles/encodings.py tells the
// layouts. A decoder gives a unit of elements at a time, vector by vector, to whoever uses them.
#pragma once

#include <algorithm>

#include "groups.h"
#include "product_weights.h"
#include "vectors.h"

namespace {

// As profiles/kernels/encoded.py lays it out.
struct Encoding {
  int kind;
  int scale;  // Of the scales behind the codes: the number of their dtype in kScaleBytes.
  int has_zeros;
  long dim;            // Elements of a row.
  long code_bytes;     // Bytes of its codes.
  long group_shift;    // 2^so many elements share a scale behind the codes.
  long num_groups;
  long tile_rows;      // Rows that share the scales of the table.
  long tile_shift;     // 2^so many columns do.
  long tile_scales;    // Scales of the table for a row.
};

// As profiles/kernels/encoded.py lays it out.
struct EncodedProducts {
  Products products;
  Encoding how;
  const float* const* tables;  // Of each group's matrix; or null.
  const long* first_rows;      // Each group's first output among the rows of its matrix.
};

enum Scale { kFloat32, kFloat16, kBfloat16, kCode };
constexpr long kScaleBytes[] = {4, 2, 2, 1};

// Bytes of the codes of a block's elements.
template <class D>
constexpr long kBlockBytes = kBlock / D::kUnit * D::kUnitBytes;

struct EncodedRow {
  const Encoding& how;
  const uint8_t* bytes;
  const float* table;  // Of the matrix.
  long index;          // Of the row in its matrix.
};

typedef uint8_t Codes __attribute__((vector_size(32)));
template <long i>
using At = std::integral_constant<long, i>;

// The values that a matrix of T would store.
template <class T>
INLINE inline Floats kept_as(Floats v) { return rounded<T>(v); }
template <>
INLINE inline Floats kept_as<Bfloat16>(Floats v) {
#if defined(__AVX512F__)
  const __m512i bits = (__m512i)v;
  const __mmask16 is_odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __mmask16 is_number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  const __m512i near = _mm512_mask_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)),
                                             is_odd, bits, _mm512_set1_epi32(0x8000));
  return (Floats)_mm512_mask_and_epi32(_mm512_set1_epi32(0x7fc00000), is_number, near,
                                       _mm512_set1_epi32(-65536));
#else
  const Bits bits = bit_cast<Bits>(v), near = bits + 0x7fffu + ((bits >> 16) & 1u);
  const Bits is_nan = bit_cast<Bits>(v != v);
  return bit_cast<Floats>((is_nan & 0x7fc00000u) | (~is_nan & near & 0xffff0000u));
#endif
}

// Stores values that T holds.
template <class T>
INLINE inline void store_exact(T* to, Floats v) { store(to, v); }
template <>
INLINE inline void store_exact<Bfloat16>(Bfloat16* to, Floats v) {
#if defined(__AVX512F__)
  const Halves h = __builtin_convertvector((Bits)v >> 16, Halves);
  std::memcpy(to, &h, sizeof h);
#else
  store(to, v);
#endif
}

INLINE inline float half_at(const uint8_t* from) { return to_float(load_raw<Float16>(from)); }

// The scale of a group behind a row's codes, whose scales begin at `from`.
INLINE inline float scale_at(const uint8_t* from, int kind, long group) {
  if (kind == kFloat16) return half_at(from + 2 * group);
  if (kind == kBfloat16) return to_float(load_raw<Bfloat16>(from + 2 * group));
  return load_raw<float>(from + 4 * group);
}

// Sixteen signed bytes.
INLINE inline Ints signed_codes_of(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(load_raw<__m128i>(from));
#else
  return (codes_of(from) ^ 128) - 128;
#endif
}
const Floats kCounts = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// What the low four bits of each code stand for.
INLINE inline Floats looked_up(Ints codes, Floats values) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)values);
#elif defined(USES_AVX2)
  const auto eight = [&](NarrowInts at) INLINE {
    const __m256 low = _mm256_permutevar8x32_ps(values.low, (__m256i)at);
    const __m256 high = _mm256_permutevar8x32_ps(values.high, (__m256i)at);
    return (Narrow)_mm256_blendv_ps(low, high, (__m256)_mm256_slli_epi32((__m256i)at, 28));
  };
  return {eight(codes.low), eight(codes.high)};
#else
  float of[kLanes], found[kLanes];
  int32_t at[kLanes];
  store(of, values), Memory<Ints>::store(at, codes);
  for (long i = 0; i < kLanes; ++i) found[i] = of[at[i] & 15];
  return load(found);
#endif
}

// Thirty-two codes in 16 bytes, the low halves first.
template <class T, class Use>
INLINE inline void use_nibbles(const uint8_t* from, Floats values, Use use) {
  const Ints both = codes_of(from);
  values = kept_as<T>(values);
  use(At<0>(), looked_up(both, values));
  use(At<1>(), looked_up(bit_cast<Ints>(bit_cast<Bits>(both) >> 4), values));
}

// A run of codes that the row may end within: what is missing is zero.
template <long kCount>
INLINE inline const uint8_t* whole_run(const uint8_t* from, long left, uint8_t* padded) {
  if (left >= kCount) return from;
  std::memset(padded, 0, kCount);
  std::memcpy(padded, from, left);
  return padded;
}

// A decoder's interface: `unit` gives kUnit elements from d on, a multiple of it, as the values
// that a matrix of T would store.

// Sixteen of 32 codes, as they are or signed.
template <long i>
INLINE inline Ints half_of(const Codes& codes) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm256_extracti128_si256((__m256i)codes, i));
#else
  return codes_of(reinterpret_cast<const uint8_t*>(&codes) + 16 * i);
#endif
}
template <long i>
INLINE inline Ints signed_half_of(const Codes& codes) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm256_extracti128_si256((__m256i)codes, i));
#else
  return signed_codes_of(reinterpret_cast<const uint8_t*>(&codes) + 16 * i);
#endif
}
template <class T, class Use>
INLINE inline void use_unsigned(Codes codes, float step, float base, Use use) {
  use(At<0>(), kept_as<T>(as_floats(half_of<0>(codes)) * step + base));
  use(At<1>(), kept_as<T>(as_floats(half_of<1>(codes)) * step + base));
}
template <class T, class Use>
INLINE inline void use_signed(Codes codes, float step, Use use) {
  use(At<0>(), kept_as<T>(as_floats(signed_half_of<0>(codes)) * step));
  use(At<1>(), kept_as<T>(as_floats(signed_half_of<1>(codes)) * step));
}

template <class T, class E>
struct PlainElements {
  static constexpr long kUnit = kLanes, kUnitBytes = kLanes * sizeof(E);
  const E* from;
  long dim;
  explicit PlainElements(const EncodedRow& row)
      : from(reinterpret_cast<const E*>(row.bytes)), dim(row.how.dim) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    use(At<0>(), kept_as<T>(load_part(from + d, dim - d)));
  }
};

}  // namespace
