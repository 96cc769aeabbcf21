// GGUF's blocks of 256 with two levels of scales. A unit is a block, or half of one.
#pragma once

#include "encodings.h"

namespace {

constexpr long kHalf = kBlock / 2;

template <long kBytes>
struct HalfBlocks {
  static constexpr long kUnit = kHalf, kUnitBytes = kBytes / 2;
  const uint8_t* blocks;
  explicit HalfBlocks(const EncodedRow& row) : blocks(row.bytes) {}
  const uint8_t* block(long d) const { return blocks + (d >> 8) * kBytes; }
  static long half(long d) { return d >> 7 & 1; }
};

// Uses codes of 32 elements whose first vector is the i-th of the unit's.
template <long i, class Use>
struct Later {
  Use& use;
  template <class J>
  INLINE void operator()(J j, Floats v) const { use(At<i + decltype(j)::value>(), v); }
};
template <long i, class Use>
INLINE inline Later<i, Use> later(Use& use) { return {use}; }

// Eight floats of eight bytes.
typedef float Eight __attribute__((vector_size(32)));
INLINE inline Eight eight_of(uint64_t bytes) {
#if defined(__AVX2__)
  return (Eight)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(bytes))));
#else
  Eight v;
  for (long i = 0; i < 8; ++i) v[i] = float(bytes >> 8 * i & 255);
  return v;
#endif
}
constexpr uint64_t kEachByte = 0x0101010101010101u;

// Two vectors of codes, the i-th of the unit and the next, with a scale and a minimum each.
template <class T, long i, class Use>
INLINE inline void use_halves(Codes codes, const Eight& steps, const Eight& bases, Use& use) {
  use(At<i>(), kept_as<T>(as_floats(signed_half_of<0>(codes)) * steps[i] + bases[i]));
  use(At<i + 1>(), kept_as<T>(as_floats(signed_half_of<1>(codes)) * steps[i + 1] + bases[i + 1]));
}
const Eight kNoBases = {-0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};

template <class T>
struct Q2_K : HalfBlocks<84> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    const uint64_t scales = load_raw<uint64_t>(block + 8 * half(d));
    Eight steps = eight_of(scales & 15 * kEachByte) * half_at(block + 80);
    Eight bases = -(eight_of(scales >> 4 & 15 * kEachByte) * half_at(block + 82));
    asm volatile("" : "+m"(steps), "+m"(bases));
    const Codes codes = load_raw<Codes>(block + 16 + 32 * half(d));
    repeat<4>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      use_halves<T, k>((codes >> k) & 3, steps, bases, use);
    });
  }
};

template <class T>
struct Q3_K : HalfBlocks<110> {
  using HalfBlocks::HalfBlocks;
  // Six bits of 12 bytes for each 16 elements of a half.
  static Eight steps_of(const uint8_t* packed, long half, float step) {
    const uint64_t four = load_raw<uint64_t>(packed) >> 4 * half & 15 * kEachByte;
    const uint64_t rest = load_raw<uint32_t>(packed + 8) >> 4 * half;
    const uint64_t two = (rest | rest >> 2 << 32) & 3 * kEachByte;
    return (eight_of(four | two << 4) - 32) * step;
  }
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    Eight steps = steps_of(block + 96, half(d), half_at(block + 108));
    asm volatile("" : "+m"(steps));
    const Codes high = load_raw<Codes>(block) >> uint8_t(4 * half(d));
    const Codes low = load_raw<Codes>(block + 32 + 32 * half(d));
    repeat<4>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      // Without the bit of the mask, a code is four less.
      const Codes less = 4 - ((high >> k / 2 & 1) << 2);
      use_halves<T, k>(((low >> k) & 3) - less, steps, kNoBases, use);
    });
  }
};

template <long kBytes>
struct Blocks {
  static constexpr long kUnit = kBlock, kUnitBytes = kBytes;
  const uint8_t* blocks;
  explicit Blocks(const EncodedRow& row) : blocks(row.bytes) {}
  const uint8_t* block(long d) const { return blocks + (d >> 8) * kBytes; }
};

// Sixteen bytes of two words.
INLINE inline Ints sixteen_of(uint64_t low, uint64_t high) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_set_epi64x(int64_t(high), int64_t(low)));
#else
  const uint64_t both[] = {low, high};
  return codes_of(reinterpret_cast<const uint8_t*>(both));
#endif
}

// Of two halves, the first four times, the second four times, and so on.
INLINE inline Floats fours_of(const uint8_t* from) {
#if defined(__AVX512F__)
  const __m128 both = _mm_cvtph_ps(_mm_cvtsi32_si128(load_raw<int>(from)));
  return (Floats)_mm512_permutexvar_ps((__m512i)(kIota >> 2 & 1), _mm512_castps128_ps512(both));
#else
  const Floats first = broadcast(half_at(from)), second = broadcast(half_at(from + 2));
  return select((kIota & 4) != 0, second, first);
#endif
}
const Bits kSecondFours = bit_cast<Bits>((kIota & 4) != 0) & 0x80000000u;

// The scales of a block for each 32 elements, and the minima below zero: 6 bits of 12 bytes. Four
// scales, their minima, the other scales, the other minima.
INLINE inline Floats shared_steps(const uint8_t* block) {
  const uint64_t first = load_raw<uint64_t>(block + 4), last = load_raw<uint32_t>(block + 12);
  const uint64_t low = (last | last << 28) & 15 * kEachByte, high = first >> 2 & 48 * kEachByte;
  const Ints codes = sixteen_of(first & 63 * kEachByte, low | high);
  return as_floats(codes) * bit_cast<Floats>(bit_cast<Bits>(fours_of(block)) ^ kSecondFours);
}

template <class T>
struct Q4_K : Blocks<144> {
  using Blocks::Blocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    // In memory, each is spread over a vector when it is loaded. From a register that would take the
    // port that looks codes up.
    Floats shared = shared_steps(block);
    asm volatile("" : "+m"(shared));
    repeat<4>([&](auto j) INLINE {
      constexpr long pair = decltype(j)::value, k = 8 * (pair / 2) + 2 * (pair % 2);
      const uint8_t* codes = block + 16 + 32 * pair;
      const Ints first = codes_of(codes), second = codes_of(codes + 16);
      const auto values = [&](long i) INLINE {
        return kept_as<T>(kCounts * shared[i] + shared[4 + i]);
      };
      const auto upper = [](Ints both) INLINE { return bit_cast<Ints>(bit_cast<Bits>(both) >> 4); };
      const Floats low = values(k), high = values(k + 1);
      use(At<4 * pair>(), looked_up(first, low));
      use(At<4 * pair + 1>(), looked_up(second, low));
      use(At<4 * pair + 2>(), looked_up(upper(first), high));
      use(At<4 * pair + 3>(), looked_up(upper(second), high));
    });
  }
};

template <class T>
struct Q5_K : Blocks<176> {
  using Blocks::Blocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    Floats shared = shared_steps(block);
    asm volatile("" : "+m"(shared));
    const Codes fifth = load_raw<Codes>(block + 16);
    repeat<4>([&](auto j) INLINE {
      constexpr long pair = decltype(j)::value, k = 8 * (pair / 2) + 2 * (pair % 2);
      const Codes both = load_raw<Codes>(block + 48 + 32 * pair);
      use_unsigned<T>((both & 15) | (fifth >> 2 * pair & 1) << 4, shared[k], shared[4 + k],
                      later<4 * pair>(use));
      use_unsigned<T>((both >> 4) | (fifth >> (2 * pair + 1) & 1) << 4, shared[k + 1],
                      shared[5 + k], later<4 * pair + 2>(use));
    });
  }
};

// Thirty-two bytes twice, in words: no machine shifts bytes.
typedef uint16_t Words __attribute__((vector_size(64)));
typedef int8_t Signed __attribute__((vector_size(64)));
INLINE inline Words twice_of(const uint8_t* from) {
  const Halves h = load_raw<Halves>(from);
  return __builtin_shufflevector(h, h, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1,
                                 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
template <long i>
INLINE inline Ints quarter_of(const Signed& codes) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32((__m512i)codes, i));
#else
  return signed_codes_of(reinterpret_cast<const uint8_t*>(&codes) + 16 * i);
#endif
}
const Words kFirstShifts = {4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4,
                            2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2};
const Words kLastShifts = 4 - kFirstShifts;

template <class T>
struct Q6_K : HalfBlocks<210> {
  using HalfBlocks::HalfBlocks;
  static Eight steps_of(const uint8_t* scales, float step) {
    // Signed bytes by way of unsigned ones.
    const uint64_t signs = 128 * kEachByte;
    return (eight_of(load_raw<uint64_t>(scales) ^ signs) - 128) * step;
  }
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    Eight steps = steps_of(block + 192 + 8 * half(d), half_at(block + 208));
    asm volatile("" : "+m"(steps));
    const Words low = load_raw<Words>(block + 64 * half(d));
    const Words high = twice_of(block + 128 + 32 * half(d));
    // Two upper bits for each four lower ones.
    const Words codes[2] = {(low & 0x0f0f) | (high << kFirstShifts & 0x3030),
                            (low >> 4 & 0x0f0f) | (high >> kLastShifts & 0x3030)};
    repeat<2>([&](auto j) INLINE {
      const Signed less = (Signed)codes[j] - 32;
      repeat<4>([&](auto i) INLINE {
        constexpr long k = 4 * decltype(j)::value + decltype(i)::value;
        use(At<k>(), kept_as<T>(as_floats(quarter_of<i>(less)) * steps[k]));
      });
    });
  }
};

}  // namespace
