// Arithmetic straight over 4-bit groups of 64: a group's sixteen values are looked up
// in registers, and are those that unpacking it would have stored.
#pragma once

#include <algorithm>

#include "arithmetic.h"
#include "groups.h"

namespace {

#if defined(HAS_TABLE)
struct PackedPairs : Pairs {
  using Element = uint8_t;
  static constexpr long kGroup = 64, kKeyDims = kGroup;

  static bool takes(const Packing& p) {
    return p.bits == 4 && p.group == kGroup && p.dim % kGroup == 0;
  }

  static __m512i codes(const uint8_t* row, long group) {
    return _mm512_cvtepu8_epi16(load_raw<__m256i>((const __m256i*)(row + group * kGroup / 2)));
  }
  static __m512i values(const uint8_t* row, long group, long dim) {
    return values_of(row + dim / 2 + group * 4);
  }

  template <long kQueries, long kTokens>
  INLINE static void multiply(const uint8_t* const* keys, const Bfloat16* q, long stride, long d,
                              long left, Floats* dots) {
    // Few keys at a time, and of them a query at a time: registers then hold all sums.
    constexpr long kAtOnce = std::min(kTokens, 4L);
    const long dim = d + left;
    repeat<kTokens / kAtOnce>([&](auto part) INLINE {
      constexpr long from = decltype(part)::value * kAtOnce;
      __m512bh low[kAtOnce], high[kAtOnce];
      repeat<kAtOnce>([&](auto t) INLINE {
        const uint8_t* key = keys[from + t];
        const __m512i both = codes(key, d / kGroup), table = values(key, d / kGroup, dim);
        low[t] = (__m512bh)_mm512_permutexvar_epi16(both, table);
        high[t] = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(both, 4), table);
      });
      repeat<kQueries>([&](auto g) INLINE {
        const __m512bh first = load_pairs(q + g * stride + d);
        const __m512bh second = load_pairs(q + g * stride + d + kGroup / 2);
        repeat<kAtOnce>([&](auto t) INLINE {
          Floats& dot = dots[g * kTokens + from + t];
          dot = (Floats)_mm512_dpbf16_ps((__m512)dot, first, low[t]);
          dot = (Floats)_mm512_dpbf16_ps((__m512)dot, second, high[t]);
        });
      });
    });
  }
  template <long kQueries>
  INLINE static void add(const uint8_t* value, const uint8_t* next, long d, long dim,
                         const Bfloat16* shares, Floats* sums) {
    const long group = d / kGroup;
    // Of a group, one half of its elements at a time.
    const __m128i shift = _mm_cvtsi32_si128(d % kGroup ? 4 : 0);
    const auto half = [&](const uint8_t* row) INLINE {
      return _mm512_permutexvar_epi16(_mm512_srl_epi16(codes(row, group), shift),
                                      values(row, group, dim));
    };
    Pairs::add<kQueries>(half(value), half(next), shares, sums);
  }
};
#endif

}  // namespace
