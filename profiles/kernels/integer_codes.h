// K-quants as integers: codes times the integer scales of their 16 or 32 elements, in 16 bits, with one
// float scale for a block of 256.
#pragma once

#include "integer_tile.h"
#include "k_quants.h"

namespace {

#if defined(HAS_INTEGER_PRODUCTS)

typedef __m512i Shorts;
INLINE inline Shorts shorts_of(const uint8_t* from) {
  return _mm512_cvtepu8_epi16(load_raw<__m256i>(from));
}
template <int kBits>
INLINE inline Shorts shifted(Shorts v) {
  return kBits < 0 ? _mm512_slli_epi16(v, -kBits) : _mm512_srli_epi16(v, kBits);
}
// Bits of each code, moved to the right and masked.
template <int kBits>
INLINE inline Shorts bits_of(Shorts v, short mask) {
  return _mm512_and_si512(shifted<kBits>(v), _mm512_set1_epi16(mask));
}
INLINE inline Shorts either(Shorts a, Shorts b) { return _mm512_or_si512(a, b); }
INLINE inline Shorts less(Shorts v, short by) {
  return _mm512_sub_epi16(v, _mm512_set1_epi16(by));
}

// The scales of the i-th vector: those of its two halves among 16 of a block, or one of 8.
template <long i>
INLINE inline Shorts two_scales(Shorts scales) {
  const __m256i first = _mm256_set1_epi16(2 * i);
  const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(first),
                                          _mm256_set1_epi16(2 * i + 1), 1);
  return _mm512_permutexvar_epi16(both, scales);
}
INLINE inline Shorts signed_shorts(__m128i bytes) {
  return _mm512_castsi256_si512(_mm256_cvtepi8_epi16(bytes));
}
INLINE inline Floats floats_of(__m128i bytes) {
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
}
INLINE inline Shorts times(Shorts codes, Shorts scales) {
  return _mm512_mullo_epi16(codes, scales);
}

// What each has: `vectors` gives the integers of a block, 32 at a time, `scale` their scale, and
// `offsets` what is added to each 16 elements, where there is such a thing. kSummed products with
// inputs of 15 bits fit into 32 bits.
template <class D>
struct IntegersOf {
  static constexpr bool kIsKnown = false;
};

template <class T>
struct IntegersOf<Q2_K<T>> {
  static constexpr bool kIsKnown = true;
  static constexpr long kSummed = 64, kOffset = 16;
  static __m128i packed(const uint8_t* block) { return load_raw<__m128i>(block); }
  static float scale(const uint8_t* block) { return half_at(block + 80); }
  static Floats offsets(const uint8_t* block) {
    const __m128i minima = _mm_and_si128(_mm_srli_epi16(packed(block), 4), _mm_set1_epi8(15));
    return floats_of(minima) * -half_at(block + 82);
  }
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Shorts scales = signed_shorts(_mm_and_si128(packed(block), _mm_set1_epi8(15)));
    repeat<2>([&](auto half) INLINE {
      const Shorts codes = shorts_of(block + 16 + 32 * half);
      repeat<4>([&](auto j) INLINE {
        constexpr long i = 4 * decltype(half)::value + decltype(j)::value;
        use(At<i>(), times(bits_of<2 * decltype(j)::value>(codes, 3), two_scales<i>(scales)));
      });
    });
  }
};

template <class T>
struct IntegersOf<Q3_K<T>> {
  static constexpr bool kIsKnown = true;
  static constexpr long kSummed = 64, kOffset = 0;
  static float scale(const uint8_t* block) { return half_at(block + 108); }
  // Six bits of 12 bytes for each 16 elements.
  static Shorts scales(const uint8_t* packed) {
    const uint64_t four = load_raw<uint64_t>(packed), two = load_raw<uint32_t>(packed + 8);
    const auto half = [&](long shift) INLINE {
      const uint64_t upper = (two >> shift | two >> (shift + 2) << 32) & 3 * kEachByte;
      return (four >> shift & 15 * kEachByte) | upper << 4;
    };
    return less(signed_shorts(_mm_set_epi64x(int64_t(half(4)), int64_t(half(0)))), 32);
  }
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Shorts steps = scales(block + 96), third = shorts_of(block);
    repeat<2>([&](auto half) INLINE {
      const Shorts codes = shorts_of(block + 32 + 32 * half);
      repeat<4>([&](auto j) INLINE {
        constexpr long k = decltype(j)::value, i = 4 * decltype(half)::value + k;
        const Shorts all = either(bits_of<2 * k>(codes, 3), bits_of<i - 2>(third, 4));
        use(At<i>(), times(less(all, 4), two_scales<i>(steps)));
      });
    });
  }
};

// Scales and minima of 6 bits for each 32 elements, in 12 bytes: four scales, their minima, the
// other scales, the other minima.
struct SharedIntegers {
  static constexpr bool kIsKnown = true;
  static constexpr long kSummed = 64, kOffset = 32;
  static __m128i packed(const uint8_t* block) {
    const uint64_t first = load_raw<uint64_t>(block + 4), last = load_raw<uint32_t>(block + 12);
    const uint64_t low = (last | last << 28) & 15 * kEachByte, high = first >> 2 & 48 * kEachByte;
    return _mm_set_epi64x(int64_t(low | high), int64_t(first & 63 * kEachByte));
  }
  static float scale(const uint8_t* block) { return half_at(block); }
  static Floats offsets(const uint8_t* block) {
    const __m128i twice = _mm_set_epi8(15, 15, 14, 14, 13, 13, 12, 12, 7, 7, 6, 6, 5, 5, 4, 4);
    return floats_of(_mm_shuffle_epi8(packed(block), twice)) * -half_at(block + 2);
  }
  template <long i>
  INLINE static Shorts scaled(Shorts codes, Shorts scales) {
    const __m512i at = _mm512_set1_epi16(8 * (i / 4) + i % 4);
    return times(codes, _mm512_permutexvar_epi16(at, scales));
  }
};

template <class T>
struct IntegersOf<Q4_K<T>> : SharedIntegers {
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Shorts scales = signed_shorts(packed(block));
    repeat<4>([&](auto pair) INLINE {
      constexpr long i = 2 * decltype(pair)::value;
      const Shorts both = shorts_of(block + 16 + 32 * pair);
      use(At<i>(), scaled<i>(bits_of<0>(both, 15), scales));
      use(At<i + 1>(), scaled<i + 1>(shifted<4>(both), scales));
    });
  }
};

template <class T>
struct IntegersOf<Q5_K<T>> : SharedIntegers {
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Shorts scales = signed_shorts(packed(block)), fifth = shorts_of(block + 16);
    repeat<4>([&](auto pair) INLINE {
      constexpr long i = 2 * decltype(pair)::value;
      const Shorts both = shorts_of(block + 48 + 32 * pair);
      use(At<i>(), scaled<i>(either(bits_of<0>(both, 15), bits_of<i - 4>(fifth, 16)), scales));
      use(At<i + 1>(),
          scaled<i + 1>(either(shifted<4>(both), bits_of<i - 3>(fifth, 16)), scales));
    });
  }
};

template <class T>
struct IntegersOf<Q6_K<T>> {
  static constexpr bool kIsKnown = true;
  static constexpr long kSummed = 32, kOffset = 0;
  static float scale(const uint8_t* block) { return half_at(block + 208); }
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Shorts scales = signed_shorts(load_raw<__m128i>(block + 192));
    repeat<2>([&](auto half) INLINE {
      const Shorts upper = shorts_of(block + 128 + 32 * half);
      repeat<2>([&](auto j) INLINE {
        constexpr long k = decltype(j)::value, i = 4 * decltype(half)::value + k;
        const Shorts lower = shorts_of(block + 64 * half + 32 * k);
        const Shorts first = either(bits_of<0>(lower, 15), bits_of<2 * k - 4>(upper, 48));
        const Shorts second = either(shifted<4>(lower), bits_of<2 * k>(upper, 48));
        use(At<i>(), times(less(first, 32), two_scales<i>(scales)));
        use(At<i + 2>(), times(less(second, 32), two_scales<i + 2>(scales)));
      });
    });
  }
};

#endif

}  // namespace
