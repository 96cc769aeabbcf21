// GGUF's blocks of 256 with two levels of scales. Half a block is a unit.
#pragma once

#include "encodings.h"

namespace {

constexpr long kBlock = 256, kHalf = kBlock / 2;

template <long kBytes>
struct HalfBlocks {
  static constexpr long kUnit = kHalf;
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
  uint8_t kept[32];
  std::memcpy(kept, &codes, sizeof kept);
  use(At<i>(), kept_as<T>(as_floats(signed_codes_of(kept)) * steps[i] + bases[i]));
  use(At<i + 1>(), kept_as<T>(as_floats(signed_codes_of(kept + 16)) * steps[i + 1] + bases[i + 1]));
}
const Eight kNoBases = {-0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f, -0.0f};

template <class T>
struct Q2_K : HalfBlocks<84> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    const uint64_t scales = load_raw<uint64_t>(block + 8 * half(d));
    const Eight steps = eight_of(scales & 15 * kEachByte) * half_at(block + 80);
    const Eight bases = -(eight_of(scales >> 4 & 15 * kEachByte) * half_at(block + 82));
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
    const Eight steps = steps_of(block + 96, half(d), half_at(block + 108));
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

// The scales and then the minima of half a block, for each 32 elements: 6 bits of 12 bytes.
INLINE inline Eight shared_steps(const uint8_t* block, long half) {
  const float step = half_at(block), least = -half_at(block + 2);
  const uint64_t first = load_raw<uint64_t>(block + 4), last = load_raw<uint32_t>(block + 12);
  const uint64_t low = (last | last << 28) & 15 * kEachByte, high = first >> 2 & 48 * kEachByte;
  const uint64_t codes = half ? low | high : first & 63 * kEachByte;
  return eight_of(codes) * Eight{step, step, step, step, least, least, least, least};
}

template <class T>
struct Q4_K : HalfBlocks<144> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    // In memory, each is spread over a vector when it is loaded. From a register that would take the
    // port that looks codes up.
    Eight shared = shared_steps(block, half(d));
    asm volatile("" : "+m"(shared));
    const uint8_t* codes = block + 16 + 64 * half(d);
    repeat<2>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      const Ints first = codes_of(codes + 16 * k), second = codes_of(codes + 16 * k + 16);
      const auto values = [&](long i) INLINE {
        return kept_as<T>(as_floats(kIota) * shared[i] + shared[4 + i]);
      };
      const Floats low = values(k), high = values(k + 1);
      use(At<2 * k>(), looked_up(first, low));
      use(At<2 * k + 1>(), looked_up(second, low));
      use(At<2 * k + 2>(), looked_up((Ints)((Bits)first >> 4), high));
      use(At<2 * k + 3>(), looked_up((Ints)((Bits)second >> 4), high));
    });
  }
};

template <class T>
struct Q5_K : HalfBlocks<176> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    const Eight shared = shared_steps(block, half(d));
    const Codes fifth = load_raw<Codes>(block + 16) >> uint8_t(4 * half(d));
    const uint8_t* codes = block + 48 + 64 * half(d);
    repeat<2>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      const Codes both = load_raw<Codes>(codes + 16 * k);
      use_unsigned<T>((both & 15) | (fifth >> k & 1) << 4, shared[k], shared[4 + k],
                      later<2 * k>(use));
      use_unsigned<T>((both >> 4) | (fifth >> (k + 1) & 1) << 4, shared[k + 1],
                      shared[5 + k], later<2 * k + 2>(use));
    });
  }
};

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
    const Eight steps = steps_of(block + 192 + 8 * half(d), half_at(block + 208));
    const Codes first = load_raw<Codes>(block + 64 * half(d));
    const Codes second = load_raw<Codes>(block + 64 * half(d) + 32);
    const Codes high = load_raw<Codes>(block + 128 + 32 * half(d));
    const Codes codes[4] = {(first & 15) | (high & 3) << 4, (second & 15) | (high & 12) << 2,
                            (first >> 4) | (high & 48), (second >> 4) | (high & 192) >> 2};
    repeat<4>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      use_halves<T, k>(codes[j] - 32, steps, kNoBases, use);
    });
  }
};

}  // namespace
