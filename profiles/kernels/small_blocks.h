// GGUF's blocks of 32 with their scales inside. A unit is a block.
#pragma once

#include "encodings.h"

namespace {

template <class T>
struct Q4_0 {
  static constexpr long kUnit = 32, kUnitBytes = 18;
  const uint8_t* blocks;
  explicit Q4_0(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * kUnitBytes;
    use_nibbles<T>(block + 2, (kCounts - 8.0f) * half_at(block), use);
  }
};

template <class T>
struct Q4_1 {
  static constexpr long kUnit = 32, kUnitBytes = 20;
  const uint8_t* blocks;
  explicit Q4_1(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * kUnitBytes;
    // The product is exact: fused or not, the sum is rounded once.
    use_nibbles<T>(block + 4, kCounts * half_at(block) + half_at(block + 2), use);
  }
};

// Bits as the fifth of 32 codes.
INLINE inline Codes fifth_bits(const uint8_t* from) {
  const uint32_t bits = load_raw<uint32_t>(from);
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  return (Codes)_mm256_maskz_set1_epi8(bits, 16);
#elif defined(USES_AVX2)
  // Each byte becomes the byte of `bits` that has its bit. The other bits are cleared.
  const __m256i of = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i own = _mm256_set1_epi64x(int64_t(0x8040201008040201));
  const __m256i kept = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(int(bits)), of), own);
  return (Codes)_mm256_cmpeq_epi8(kept, own) & 16;
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
template <class T>
struct Q5_0 {
  static constexpr long kUnit = 32, kUnitBytes = 22;
  const uint8_t* blocks;
  explicit Q5_0(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * kUnitBytes;
    use_signed<T>((halves_of(block + 6) | fifth_bits(block + 2)) - 16, half_at(block), use);
  }
};

template <class T>
struct Q5_1 {
  static constexpr long kUnit = 32, kUnitBytes = 24;
  const uint8_t* blocks;
  explicit Q5_1(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * kUnitBytes;
    use_unsigned<T>(halves_of(block + 8) | fifth_bits(block + 4), half_at(block),
                    half_at(block + 2), use);
  }
};

template <class T>
struct Q8_0 {
  static constexpr long kUnit = 32, kUnitBytes = 34;
  const uint8_t* blocks;
  explicit Q8_0(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * kUnitBytes;
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
  static constexpr long kUnit = 32, kUnitBytes = 18;
  const uint8_t* blocks;
  explicit IQ4_NL(const EncodedRow& row) : blocks(row.bytes) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * kUnitBytes;
    use_nibbles<T>(block + 2, kIq4Values * half_at(block), use);
  }
};

// E2M1, doubled.
const Floats kFp4Values = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
template <class T>
struct MXFP4 {
  static constexpr long kUnit = 32, kUnitBytes = 17;
  const uint8_t* blocks;
  explicit MXFP4(const EncodedRow& row) : blocks(row.bytes) {}
  // Half of 2^(e - 127); the smallest two are subnormal.
  static float half_scale(uint32_t e) {
    const uint32_t bits = e < 2 ? 0x200000u << e : (e - 1) << 23;
    return load_raw<float>(&bits);
  }
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = blocks + (d >> 5) * kUnitBytes;
    use_nibbles<T>(block + 1, kFp4Values * half_scale(*block), use);
  }
};

}  // namespace
