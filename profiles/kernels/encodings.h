// Rows of encoded elements as floats: what all decoders share. profiles/encodings.py tells the
// layouts. A decoder gives a unit of elements at a time, vector by vector, to whoever uses them.
#pragma once

#include <algorithm>

#include "groups.h"
#include "vectors.h"
#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

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

enum Scale { kFloat32, kFloat16, kBfloat16, kCode };
constexpr long kScaleBytes[] = {4, 2, 2, 1};

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
  const Bits bits = (Bits)v, near = bits + 0x7fffu + ((bits >> 16) & 1u);
#if defined(__AVX512F__)
  const __mmask16 is_nan = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
  return (Floats)_mm512_mask_and_epi32(_mm512_set1_epi32(0x7fc00000), __mmask16(~is_nan),
                                       (__m512i)near, _mm512_set1_epi32(-65536));
#else
  const Bits is_nan = (Bits)(v != v);
  return (Floats)((is_nan & 0x7fc00000u) | (~is_nan & near & 0xffff0000u));
#endif
}

// Stores values that T holds.
template <class T>
INLINE inline void store_exact(T* to, Floats v) { store(to, v); }
template <>
INLINE inline void store_exact<Bfloat16>(Bfloat16* to, Floats v) {
  const Halves h = __builtin_convertvector((Bits)v >> 16, Halves);
  std::memcpy(to, &h, sizeof h);
}

INLINE inline float float_at(const uint8_t* from, Bfloat16*) {
  const uint32_t bits = uint32_t(load_raw<uint16_t>(from)) << 16;
  return load_raw<float>(&bits);
}
INLINE inline float float_at(const uint8_t* from, Float16*) {
#if defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(load_raw<uint16_t>(from))));
#else
  const uint32_t h = load_raw<uint16_t>(from), sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  const uint32_t bits = rest >= 0x7c00u ? sign | 0x7f800000u | (rest & 0x3ffu) << 13
                                        : sign | ((rest << 13) + 0x38000000u);
  // Subnormals: the exponent is that of the smallest normal, without the implied one.
  if (rest < 0x400u) return std::copysign(float(rest) * 0x1p-24f, load_raw<float>(&bits));
  return load_raw<float>(&bits);
#endif
}
INLINE inline float half_at(const uint8_t* from) { return float_at(from, (Float16*)nullptr); }

// The scale of a group behind a row's codes, whose scales begin at `from`.
INLINE inline float scale_at(const uint8_t* from, int kind, long group) {
  if (kind == kFloat16) return half_at(from + 2 * group);
  if (kind == kBfloat16) return float_at(from + 2 * group, (Bfloat16*)nullptr);
  return load_raw<float>(from + 4 * group);
}

// Sixteen bytes, as they are or signed.
INLINE inline Ints codes_of(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(load_raw<__m128i>(from));
#else
  Ints codes;
  for (long i = 0; i < kLanes; ++i) codes[i] = from[i];
  return codes;
#endif
}
INLINE inline Ints signed_codes_of(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(load_raw<__m128i>(from));
#else
  Ints codes;
  for (long i = 0; i < kLanes; ++i) codes[i] = int8_t(from[i]);
  return codes;
#endif
}
INLINE inline Floats as_floats(Ints codes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps((__m512i)codes);
#else
  return __builtin_convertvector(codes, Floats);
#endif
}
// What the low four bits of each code stand for.
INLINE inline Floats looked_up(Ints codes, Floats values) {
#if defined(__AVX512F__)
  return (Floats)_mm512_permutexvar_ps((__m512i)codes, (__m512)values);
#else
  Floats found;
  for (long i = 0; i < kLanes; ++i) found[i] = values[codes[i] & 15];
  return found;
#endif
}

// Thirty-two codes in 16 bytes, the low halves first.
template <class T, class Use>
INLINE inline void use_nibbles(const uint8_t* from, Floats values, Use use) {
  const Ints both = codes_of(from);
  values = kept_as<T>(values);
  use(At<0>(), looked_up(both, values));
  use(At<1>(), looked_up((Ints)((Bits)both >> 4), values));
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

template <class T, class E>
struct PlainElements {
  static constexpr long kUnit = kLanes;
  const E* from;
  long dim;
  explicit PlainElements(const EncodedRow& row)
      : from(reinterpret_cast<const E*>(row.bytes)), dim(row.how.dim) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    use(At<0>(), kept_as<T>(load_part(from + d, dim - d)));
  }
};

template <class T>
struct Q4_0 {
  static constexpr long kUnit = 32;
  const uint8_t* blocks;
  explicit Q4_0(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * 18;
    use_nibbles<T>(block + 2, (as_floats(kIota) - 8.0f) * half_at(block), use);
  }
};

template <class T>
struct Q4_1 {
  static constexpr long kUnit = 32;
  const uint8_t* blocks;
  explicit Q4_1(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * 20;
    // The product is exact: fused or not, the sum is rounded once.
    use_nibbles<T>(block + 4, as_floats(kIota) * half_at(block) + half_at(block + 2), use);
  }
};

// Bits as the fifth of 32 codes.
INLINE inline Codes fifth_bits(const uint8_t* from) {
  const uint32_t bits = load_raw<uint32_t>(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (Codes)_mm256_maskz_set1_epi8(bits, 16);
#else
  Codes codes;
  for (long i = 0; i < 32; ++i) codes[i] = uint8_t((bits >> i & 1) << 4);
  return codes;
#endif
}
// Thirty-two codes of 16 bytes, the low halves first.
INLINE inline Codes halves_of(const uint8_t* from) {
  const Bytes both = load_raw<Bytes>(from), low = both & 15, high = both >> 4;
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                                 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31);
}
template <class T, class Use>
INLINE inline void use_unsigned(Codes codes, float step, float base, Use use) {
  uint8_t kept[32];
  std::memcpy(kept, &codes, sizeof kept);
  use(At<0>(), kept_as<T>(as_floats(codes_of(kept)) * step + base));
  use(At<1>(), kept_as<T>(as_floats(codes_of(kept + 16)) * step + base));
}
template <class T, class Use>
INLINE inline void use_signed(Codes codes, float step, Use use) {
  uint8_t kept[32];
  std::memcpy(kept, &codes, sizeof kept);
  use(At<0>(), kept_as<T>(as_floats(signed_codes_of(kept)) * step));
  use(At<1>(), kept_as<T>(as_floats(signed_codes_of(kept + 16)) * step));
}

template <class T>
struct Q5_0 {
  static constexpr long kUnit = 32;
  const uint8_t* blocks;
  explicit Q5_0(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * 22;
    use_signed<T>((halves_of(block + 6) | fifth_bits(block + 2)) - 16, half_at(block), use);
  }
};

template <class T>
struct Q5_1 {
  static constexpr long kUnit = 32;
  const uint8_t* blocks;
  explicit Q5_1(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * 24;
    use_unsigned<T>(halves_of(block + 8) | fifth_bits(block + 4), half_at(block),
                    half_at(block + 2), use);
  }
};

template <class T>
struct Q8_0 {
  static constexpr long kUnit = 32;
  const uint8_t* blocks;
  explicit Q8_0(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * 34;
    const float step = half_at(block);
    repeat<2>([&](auto i) INLINE {
      use(i, kept_as<T>(as_floats(signed_codes_of(block + 2 + 16 * i)) * step));
    });
  }
};

const Floats kIq4Values = {-127, -104, -83, -65, -49, -35, -22, -10,
                           1,    13,   25,  38,  53,  69,  89,  113};
template <class T>
struct IQ4_NL {
  static constexpr long kUnit = 32;
  const uint8_t* blocks;
  explicit IQ4_NL(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * 18;
    use_nibbles<T>(block + 2, kIq4Values * half_at(block), use);
  }
};

// E2M1, doubled.
const Floats kFp4Values = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
template <class T>
struct MXFP4 {
  static constexpr long kUnit = 32;
  const uint8_t* blocks;
  explicit MXFP4(const EncodedRow& row) : blocks(row.bytes) {}
  // Half of 2^(e - 127); the smallest two are subnormal.
  static float half_scale(uint32_t e) {
    const uint32_t bits = e < 2 ? 0x200000u << e : (e - 1) << 23;
    return load_raw<float>(&bits);
  }
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * 17;
    use_nibbles<T>(block + 1, kFp4Values * half_scale(*block), use);
  }
};

}  // namespace
