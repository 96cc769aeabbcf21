// Codes whose scales stand behind them in the row, or in the matrix's table.
#pragma once

#include "encodings.h"

namespace {

// The parts of a row of integers in groups: codes, scales, zero points.
struct Groups {
  const uint8_t *codes, *scales, *zeros;
  int has_zeros, scale;
  long dim, shift;
  explicit Groups(const EncodedRow& row)
      : codes(row.bytes), scales(row.bytes + row.how.code_bytes),
        zeros(scales + row.how.num_groups * kScaleBytes[row.how.scale]),
        has_zeros(row.how.has_zeros), scale(row.how.scale), dim(row.how.dim),
        shift(row.how.group_shift) {}
  float step(long d) const { return scale_at(scales, scale, d >> shift); }
};

template <class T>
struct INT4 : Groups {
  static constexpr long kUnit = 32, kUnitBytes = 16;
  using Groups::Groups;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    const long group = d >> shift;
    const int zero = has_zeros ? zeros[group >> 1] >> 4 * (group & 1) & 15 : 8;
    use_nibbles<T>(codes + (d >> 1), (kCounts - float(zero)) * step(d), use);
  }
};

template <class T>
struct INT8 : Groups {
  static constexpr long kUnit = 32, kUnitBytes = 32;
  using Groups::Groups;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    uint8_t padded[kUnit];
    const uint8_t* from = whole_run<kUnit>(codes + d, dim - d, padded);
    const float by = step(d), zero = has_zeros ? zeros[d >> shift] : 128;
    repeat<2>([&](auto i) INLINE {
      use(i, kept_as<T>((as_floats(codes_of(from + 16 * i)) - zero) * by));
    });
  }
};

// Of bitsandbytes: a row's scale is its largest value, which 127 stands for.
template <class T>
struct BNB8 : Groups {
  static constexpr long kUnit = 32, kUnitBytes = 32;
  using Groups::Groups;
  template <class Use>
  INLINE void unit(long d, Use use) const {
    uint8_t padded[kUnit];
    const uint8_t* from = whole_run<kUnit>(codes + d, dim - d, padded);
    const float most = step(0);
    repeat<2>([&](auto i) INLINE {
      const Floats wide = as_floats(signed_codes_of(from + 16 * i)) * most;
      use(i, kept_as<T>(wide * 7.874015718698502e-3f));
    });
  }
};

// Of bitsandbytes: 16 values of the table, and scales that may be codes themselves.
template <class T>
struct MAP4 : Groups {
  static constexpr long kUnit = 32, kUnitBytes = 16, kValues = 16, kNested = 256, kRun = 256;
  const float* table;
  long first;  // The row's first scale among those of the matrix.
  explicit MAP4(const EncodedRow& row)
      : Groups(row), table(row.table), first(row.index * row.how.num_groups) {}
  // Rounded twice, as the reference does.
  __attribute__((noinline)) static float product(float a, float b) { return a * b; }
  float most(long group) const {
    if (scale != kCode) return scale_at(scales, scale, group);
    const float* nested = table + kValues;
    return product(nested[scales[group]], nested[kNested + 1 + (first + group) / kRun]) +
           nested[kNested];
  }
  template <class Use>
  INLINE void unit(long d, Use use) const {
    use_nibbles<T>(codes + (d >> 1), load(table) * most(d >> shift), use);
  }
};

// Sixteen 8-bit floats of 4 bits of exponent and 3 of mantissa. Theirs are the bits of a float16
// whose exponent is 8 less; only all ones is no number.
INLINE inline Floats e4m3_of(const uint8_t* from) {
#if defined(__AVX512F__) || defined(USES_AVX2)
  const __m256i codes = _mm256_cvtepi8_epi16(load_raw<__m128i>(from));
  const __m256i ones = _mm256_set1_epi16(0x7f);
  const __m256i is_nan = _mm256_cmpeq_epi16(_mm256_and_si256(codes, ones), ones);
  const __m256i bits = _mm256_and_si256(_mm256_slli_epi16(codes, 7), _mm256_set1_epi16(-0x4001));
  const __m256i halves = _mm256_or_si256(bits, is_nan);
  return load(reinterpret_cast<const Float16*>(&halves)) * 256.0f;
#else
  static const struct Values {
    float of[256];
    Values() {
      for (int code = 0; code < 256; ++code) {
        const int exponent = code >> 3 & 15, mantissa = code & 7;
        float x = exponent ? std::ldexp(float(8 + mantissa), exponent - 10)
                           : std::ldexp(float(mantissa), -9);
        if ((code & 127) == 127) x = std::nanf("");
        of[code] = code & 128 ? -x : x;
      }
    }
  } values;
  float v[kLanes];
  for (long i = 0; i < kLanes; ++i) v[i] = values.of[from[i]];
  return load(v);
#endif
}

template <class T>
struct E4M3 {
  static constexpr long kUnit = 32, kUnitBytes = 32;
  const uint8_t* codes;
  const float* scales;
  long dim, shift;
  explicit E4M3(const EncodedRow& row)
      : codes(row.bytes),
        scales(row.table + (row.how.tile_rows ? row.index / row.how.tile_rows * row.how.tile_scales
                                              : 0)),
        dim(row.how.dim), shift(row.how.tile_shift) {}
  template <class Use>
  INLINE void unit(long d, Use use) const {
    uint8_t padded[kUnit];
    const uint8_t* from = whole_run<kUnit>(codes + d, dim - d, padded);
    const float step = scales[d >> shift];
    repeat<2>([&](auto i) INLINE { use(i, kept_as<T>(e4m3_of(from + 16 * i) * step)); });
  }
};

}  // namespace
