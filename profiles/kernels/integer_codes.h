// K-quants as integers: codes times the integer scales of their 16 or 32 elements, in 16 bits, with one
// float scale for a block of 256.
#pragma once

#include "integer_tile.h"
#include "k_quants.h"

namespace {

#if defined(HAS_INTEGER_PRODUCTS)

INLINE inline Ints shorts_at(const uint8_t* from) { return shorts_of(load_raw<__m256i>(from)); }
INLINE inline Floats floats_of(__m128i bytes) {
  return as_floats(codes_of(reinterpret_cast<const uint8_t*>(&bytes)));
}
// The factors of the i-th vector's two halves, among 16 of a block.
template <long i>
INLINE inline Ints two_scales(const Factors& scales) {
  return two_factors<2 * i, 2 * i + 1>(scales);
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
    const Factors scales = factors_of(_mm_and_si128(packed(block), _mm_set1_epi8(15)));
    repeat<2>([&](auto half) INLINE {
      const Ints codes = shorts_at(block + 16 + 32 * half);
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
  static Factors scales(const uint8_t* packed) {
    const uint64_t four = load_raw<uint64_t>(packed), two = load_raw<uint32_t>(packed + 8);
    const auto half = [&](long shift) INLINE {
      const uint64_t upper = (two >> shift | two >> (shift + 2) << 32) & 3 * kEachByte;
      return (four >> shift & 15 * kEachByte) | upper << 4;
    };
    return factors_of(_mm_set_epi64x(int64_t(half(4)), int64_t(half(0))), 32);
  }
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Factors steps = scales(block + 96);
    const Ints third = shorts_at(block);
    repeat<2>([&](auto half) INLINE {
      const Ints codes = shorts_at(block + 32 + 32 * half);
      repeat<4>([&](auto j) INLINE {
        constexpr long k = decltype(j)::value, i = 4 * decltype(half)::value + k;
        const Ints all = bits_of<2 * k>(codes, 3) | bits_of<i - 2>(third, 4);
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
  INLINE static Ints scaled(Ints codes, const Factors& scales) {
    return times(codes, one_factor<8 * (i / 4) + i % 4>(scales));
  }
};

template <class T>
struct IntegersOf<Q4_K<T>> : SharedIntegers {
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Factors scales = factors_of(packed(block));
    repeat<4>([&](auto pair) INLINE {
      constexpr long i = 2 * decltype(pair)::value;
      const Ints both = shorts_at(block + 16 + 32 * pair);
      use(At<i>(), scaled<i>(bits_of<0>(both, 15), scales));
      use(At<i + 1>(), scaled<i + 1>(shifted<4>(both), scales));
    });
  }
};

template <class T>
struct IntegersOf<Q5_K<T>> : SharedIntegers {
  template <class Use>
  INLINE static void vectors(const uint8_t* block, Use use) {
    const Factors scales = factors_of(packed(block));
    const Ints fifth = shorts_at(block + 16);
    repeat<4>([&](auto pair) INLINE {
      constexpr long i = 2 * decltype(pair)::value;
      const Ints both = shorts_at(block + 48 + 32 * pair);
      use(At<i>(), scaled<i>(bits_of<0>(both, 15) | bits_of<i - 4>(fifth, 16), scales));
      use(At<i + 1>(),
          scaled<i + 1>(shifted<4>(both) | bits_of<i - 3>(fifth, 16), scales));
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
    const Factors scales = factors_of(load_raw<__m128i>(block + 192));
    repeat<2>([&](auto half) INLINE {
      const Ints upper = shorts_at(block + 128 + 32 * half);
      repeat<2>([&](auto j) INLINE {
        constexpr long k = decltype(j)::value, i = 4 * decltype(half)::value + k;
        const Ints lower = shorts_at(block + 64 * half + 32 * k);
        const Ints first = bits_of<0>(lower, 15) | bits_of<2 * k - 4>(upper, 48);
        const Ints second = shifted<4>(lower) | bits_of<2 * k>(upper, 48);
        use(At<i>(), times(less(first, 32), two_scales<i>(scales)));
        use(At<i + 2>(), times(less(second, 32), two_scales<i + 2>(scales)));
      });
    });
  }
};

#endif

}  // namespace
