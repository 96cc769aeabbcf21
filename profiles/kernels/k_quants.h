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
  const uint8_t* block(long d) const { return blocks + d / kBlock * kBytes; }
  static long half(long d) { return d / kHalf % 2; }
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

// What two elements in 16 differ by: each half of 32 codes has its own scale and minimum.
template <class T, long i, class Use>
INLINE inline void use_halves(Codes codes, const float* steps, const float* bases, Use& use) {
  uint8_t kept[32];
  std::memcpy(kept, &codes, sizeof kept);
  use(At<i>(), kept_as<T>(as_floats(signed_codes_of(kept)) * steps[0] + bases[0]));
  use(At<i + 1>(), kept_as<T>(as_floats(signed_codes_of(kept + 16)) * steps[1] + bases[1]));
}

template <class T>
struct Q2_K : HalfBlocks<84> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    const uint8_t* scales = block + 8 * half(d);
    const float step = half_at(block + 80), least = half_at(block + 82);
    const Codes codes = load_raw<Codes>(block + 16 + 32 * half(d));
    repeat<4>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      const float steps[2] = {step * float(scales[k] & 15), step * float(scales[k + 1] & 15)};
      const float bases[2] = {-(least * float(scales[k] >> 4)), -(least * float(scales[k + 1] >> 4))};
      use_halves<T, k>((codes >> k) & 3, steps, bases, use);
    });
  }
};

template <class T>
struct Q3_K : HalfBlocks<110> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    const uint8_t* packed = block + 96;
    const float step = half_at(block + 108), bases[2] = {-0.0f, -0.0f};
    const Codes high = load_raw<Codes>(block) >> uint8_t(4 * half(d));
    const Codes low = load_raw<Codes>(block + 32 + 32 * half(d));
    const auto scale = [&](long k) {
      const int four = packed[k % 8] >> 4 * (k / 8) & 15, two = packed[8 + k % 4] >> 2 * (k / 4) & 3;
      return step * float((four | two << 4) - 32);
    };
    repeat<4>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      const float steps[2] = {scale(8 * half(d) + k), scale(8 * half(d) + k + 1)};
      // Without the bit of the mask, a code is four less.
      const Codes less = 4 - ((high >> k / 2 & 1) << 2);
      use_halves<T, k>(((low >> k) & 3) - less, steps, bases, use);
    });
  }
};

// The scales and minima of half a block, of 32 elements each: 6 bits of 12 bytes.
struct SharedSteps {
  float steps[4], bases[4];
  INLINE SharedSteps(const uint8_t* block, long half) {
    const float step = half_at(block), least = half_at(block + 2);
    uint32_t scales = load_raw<uint32_t>(block + 4), minima = load_raw<uint32_t>(block + 8);
    if (half) {
      const uint32_t low = load_raw<uint32_t>(block + 12);
      scales = (low & 0x0f0f0f0fu) | (scales >> 2 & 0x30303030u);
      minima = (low >> 4 & 0x0f0f0f0fu) | (minima >> 2 & 0x30303030u);
    } else {
      scales &= 0x3f3f3f3fu, minima &= 0x3f3f3f3fu;
    }
    for (long i = 0; i < 4; ++i) {
      steps[i] = step * float(scales >> 8 * i & 255);
      bases[i] = -(least * float(minima >> 8 * i & 255));
    }
  }
};

template <class T>
struct Q4_K : HalfBlocks<144> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t* block = this->block(d);
    const SharedSteps shared(block, half(d));
    const uint8_t* codes = block + 16 + 64 * half(d);
    repeat<2>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      const Ints first = codes_of(codes + 16 * k), second = codes_of(codes + 16 * k + 16);
      const auto values = [&](long i) INLINE {
        return kept_as<T>(as_floats(kIota) * shared.steps[i] + shared.bases[i]);
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
    const SharedSteps shared(block, half(d));
    const Codes fifth = load_raw<Codes>(block + 16) >> uint8_t(4 * half(d));
    const uint8_t* codes = block + 48 + 64 * half(d);
    repeat<2>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      const Codes both = load_raw<Codes>(codes + 16 * k);
      use_unsigned<T>((both & 15) | (fifth >> k & 1) << 4, shared.steps[k], shared.bases[k],
                      later<2 * k>(use));
      use_unsigned<T>((both >> 4) | (fifth >> (k + 1) & 1) << 4, shared.steps[k + 1],
                      shared.bases[k + 1], later<2 * k + 2>(use));
    });
  }
};

template <class T>
struct Q6_K : HalfBlocks<210> {
  using HalfBlocks::HalfBlocks;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const uint8_t *block = this->block(d), *scales = block + 192 + 8 * half(d);
    const float step = half_at(block + 208), bases[2] = {-0.0f, -0.0f};
    const Codes first = load_raw<Codes>(block + 64 * half(d));
    const Codes second = load_raw<Codes>(block + 64 * half(d) + 32);
    const Codes high = load_raw<Codes>(block + 128 + 32 * half(d));
    const Codes codes[4] = {(first & 15) | (high & 3) << 4, (second & 15) | (high & 12) << 2,
                            (first >> 4) | (high & 48), (second >> 4) | (high & 192) >> 2};
    repeat<4>([&](auto j) INLINE {
      constexpr long k = 2 * decltype(j)::value;
      const float steps[2] = {step * float(int8_t(scales[k])), step * float(int8_t(scales[k + 1]))};
      use_halves<T, k>(codes[j] - 32, steps, bases, use);
    });
  }
};

}  // namespace
