// Products of bfloat16 inputs with 4-bit groups of 64, in integers: an instruction has four times the
// products of one in float32. Inputs become integers of 8 bits with a scale for each group. Weights
// keep their codes, scales and minima.
#pragma once

#include "integer_tile.h"
#include "transpose.h"

#if defined(HAS_INTEGER_PRODUCTS)

namespace {

// Elements of a group; groups of a block, and the pairs that a vector of codes holds.
constexpr long kCoded = 64, kCodedGroups = kBlock / kCoded, kCodedPairs = kCodedGroups / 2;
// Four neighbouring codes of a row, as instructions multiply them: in half a group, and in a pair.
constexpr long kHalfQuads = kCoded / 8, kPairQuads = 4 * kHalfQuads;
constexpr long kCodeBytes = kBlock / 2;
// The largest input of a group becomes kTop. Where it is below kLeast, all become zero.
constexpr float kTop = 127, kLeast = 0x1p-100f;

struct GroupCodes {
  // A block of inputs. Of a pair of groups, the first halves of both are followed by the others, as
  // the low and the high halves of codes are.
  struct alignas(64) Inputs {
    int8_t codes[kBlock];
    float scales[kCodedGroups], sums[kCodedGroups];
  };

  // Blocks of kLanes rows of weights: each four codes of a row in the row's lane, in the order of the
  // inputs.
  struct alignas(64) Weights {
    int32_t quads[kBlock / 4][kLanes];
    float scales[kCodedGroups][kLanes], minima[kCodedGroups][kLanes];
    long groups;
  };

  static bool takes(const Packing& p) {
    return p.bits == 4 && p.group == kCoded && p.dim % kCoded == 0;
  }

  static void take_inputs(const Bfloat16* from, long left, Inputs* to) {
    for (long g = 0; g < kCodedGroups; ++g) {
      __m512i codes[kCoded / kLanes] = {};
      to->scales[g] = to->sums[g] = 0;
      if (g * kCoded < left) take_group(from + g * kCoded, codes, &to->scales[g], &to->sums[g]);
      int8_t* at = to->codes + g / 2 * 2 * kCoded + g % 2 * kCoded / 2;
      for (long i = 0; i < kCoded / kLanes; ++i)
        _mm_store_si128((__m128i*)(at + i / 2 * kCoded + i % 2 * kLanes),
                        _mm512_cvtepi32_epi8(codes[i]));
    }
  }

  static void take_weights(const WeightBlock& block, Weights* to) {
    to->groups = take_scales(block, to->scales, to->minima);
    const long ahead = block.ahead(kCodeBytes);
    for (long pair = 0; 2 * pair < to->groups; ++pair) {
      alignas(64) __m512i both[kLanes];
      for (long row = 0; row < kLanes; ++row) both[row] = codes(block, row, pair, to->groups, ahead);
      transpose(both, both);
      for (long i = 0; i < kLanes; ++i) {
        int32_t(*quads)[kLanes] = to->quads + pair * kPairQuads + i;
        _mm512_store_si512(quads[0], low_of(both[i]));
        _mm512_store_si512(quads[kLanes], high_of(both[i]));
      }
    }
  }

  // Adds a block's products of kCount rows of inputs with kPanelRows rows of weights to `sums`, which
  // are kPanelRows apart.
  template <long kCount>
  __attribute__((noinline)) static void add_block(const Weights* weights, const Inputs* x,
                                                  float* sums) {
    constexpr long kSums = kCount * kPanels;
    // Few sums would wait for themselves: each is taken in parts.
    constexpr long kParts = kCount == 1 ? 4 : kCount == 2 ? 2 : 1;
    Floats totals[kSums];
    repeat<kSums>([&](auto i) INLINE { totals[i] = load(sums + i * kLanes); });
    for (long group = 0; group < weights[0].groups; ++group) {
      const long at = group / 2 * kPairQuads + group % 2 * kHalfQuads;
      __m512i parts[kParts][kSums] = {};
      for (long half = at; half < at + kPairQuads; half += 2 * kHalfQuads)
        for (long quad = half; quad < half + kHalfQuads; quad += kParts)
          repeat<kParts>([&](auto part) INLINE {
            __m512i w[kPanels];
            repeat<kPanels>([&](auto t) INLINE {
              w[t] = _mm512_load_si512(weights[t].quads[quad + part]);
            });
            repeat<kCount>([&](auto r) INLINE {
              const __m512i inputs = _mm512_set1_epi32(load_raw<int>(x[r].codes + 4 * (quad + part)));
              repeat<kPanels>([&](auto t) INLINE {
                add_quads(parts[part][r * kPanels + t], w[t], inputs);
              });
            });
          });
      repeat<kSums>([&](auto i) INLINE {
        __m512i whole = parts[0][i];
        repeat<kParts - 1>([&](auto part) INLINE {
          whole = _mm512_add_epi32(whole, parts[part + 1][i]);
        });
        constexpr long r = i / kPanels, t = i % kPanels;
        add_scaled(whole, weights[t].scales[group], weights[t].minima[group], x[r].scales[group],
                   x[r].sums[group], totals[i]);
      });
    }
    repeat<kSums>([&](auto i) INLINE { store(sums + i * kLanes, totals[i]); });
  }

  // The same for one row of inputs and kLanes rows of weights, whose codes stay where they are.
  static void add_single(const WeightBlock& block, const Inputs& x, float* sums) {
    float scales[kCodedGroups][kLanes], minima[kCodedGroups][kLanes];
    const long groups = take_scales(block, scales, minima);
    Floats total = load(sums);
    const long ahead = block.ahead(kCodeBytes);
    for (long pair = 0; 2 * pair < groups; ++pair) {
      const int8_t* from = x.codes + pair * 2 * kCoded;
      const __m512i first = _mm512_load_si512(from), second = _mm512_load_si512(from + kCoded);
      Ints rows[kLanes];
      repeat<kLanes>([&](auto row) INLINE {
        const __m512i both = codes(block, row, pair, groups, ahead);
        __m512i sum = _mm512_setzero_si512();
        add_quads(sum, low_of(both), first);
        add_quads(sum, high_of(both), second);
        rows[row] = (Ints)sum;
      });
      Ints four[4];
      repeat<4>([&](auto i) INLINE {
        const Ints* v = rows + 4 * i;
        four[i] = fold<1>(fold<0>(v[0], v[1]), fold<0>(v[2], v[3]));
      });
      // Each has the sums of eight rows, those of both groups in turns of four.
      const Ints a = fold<2>(four[0], four[1]), b = fold<2>(four[2], four[3]);
      const __m512i of[] = {_mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0x88),
                            _mm512_shuffle_i32x4((__m512i)a, (__m512i)b, 0xdd)};
      for (long g = 2 * pair; g < std::min(2 * pair + 2, groups); ++g)
        add_scaled(of[g % 2], scales[g], minima[g], x.scales[g], x.sums[g], total);
    }
    store(sums, total);
  }

 private:
  static void take_group(const Bfloat16* from, __m512i* codes, float* scale, float* sum) {
    constexpr long kVectors = kCoded / kLanes;
    __m512i most = _mm512_setzero_si512();
    for (long i = 0; i < kVectors; ++i)
      most = _mm512_max_epu32(most, (__m512i)((Bits)load(from + i * kLanes) & 0x7fffffffu));
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    const float largest = load_raw<float>(&bits);
    if (largest < kLeast) return;
    const bool is_finite = bits < 0x7f800000u;
    *scale = is_finite ? largest / kTop : NAN;
    const Floats factor = splat(is_finite ? kTop / largest : 0.0f);
    __m512i total = _mm512_setzero_si512();
    for (long i = 0; i < kVectors; ++i) {
      codes[i] = _mm512_cvtps_epi32((__m512)(load(from + i * kLanes) * factor));
      total = _mm512_add_epi32(total, codes[i]);
    }
    *sum = *scale * float(_mm512_reduce_add_epi32(total));
  }

  // Takes what each group of a block has beside its codes, and fetches the next block. Returns the
  // number of groups.
  static long take_scales(const WeightBlock& block, float (*scales)[kLanes],
                          float (*minima)[kLanes]) {
    constexpr long kBytes = kCodedGroups * 4;
    const long groups = std::min(kCodedGroups, (block.dim - block.number * kBlock) / kCoded);
    const __mmask8 held = __mmask8((1 << groups) - 1);
    // Copies: after a fetch, the compiler would load the originals again.
    const long at = block.dim / 2 + block.number * kBytes, next = at + block.ahead(kBytes);
    const auto shared = [&, held, at, next](long row) INLINE {
      const uint8_t* from = block.rows[row];
      fetch_near(from + next + kBytes - 1);
      return _mm_maskz_loadu_epi32(held, from + at);
    };
    __m512i rows[4];
    repeat<4>([&](auto i) INLINE {
      __m512i four = _mm512_castsi128_si512(shared(i));
      four = _mm512_inserti32x4(four, shared(4 + i), 1);
      four = _mm512_inserti32x4(four, shared(8 + i), 2);
      rows[i] = _mm512_inserti32x4(four, shared(12 + i), 3);
    });
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]);
    const __m512i b = _mm512_unpacklo_epi32(rows[2], rows[3]);
    const __m512i c = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    const __m512i of[] = {_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b),
                          _mm512_unpacklo_epi64(c, d), _mm512_unpackhi_epi64(c, d)};
    repeat<kCodedGroups>([&](auto g) INLINE {
      store(scales[g], (Floats)_mm512_slli_epi32(of[g], 16));
      store(minima[g], (Floats)_mm512_and_si512(of[g], _mm512_set1_epi32(-65536)));
    });
    return groups;
  }

  // The codes of a pair of groups of a row; of a last group without another one, zeros behind them.
  INLINE static __m512i codes(const WeightBlock& block, long row, long pair, long groups,
                              long ahead) {
    const __mmask8 held = 2 * pair + 1 < groups ? 0xff : 0x0f;
    const uint8_t* from = block.rows[row] + block.number * kCodeBytes + pair * kCoded;
    // Rows may begin within a line. A last block may be shorter than the one that is fetched.
    if (pair == 0) fetch_near(from + ahead);
    fetch_near(from + ahead + kCoded - 1);
    if (groups <= 2) fetch_near(from + ahead + kCodeBytes - 1);
    return _mm512_maskz_loadu_epi64(held, from);
  }
  INLINE static __m512i low_of(__m512i codes) {
    return _mm512_and_si512(codes, _mm512_set1_epi8(15));
  }
  INLINE static __m512i high_of(__m512i codes) { return low_of(_mm512_srli_epi16(codes, 4)); }

  // Adds products of four. GCC 12 would copy the sums of the intrinsic, and run out of registers.
  INLINE static void add_quads(__m512i& sums, __m512i weights, __m512i inputs) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(inputs));
  }

  // Adds the products of a group. Explicit fused operations, so that one row has the same bits as many.
  INLINE static void add_scaled(__m512i products, const float* scales, const float* minima,
                                float scale, float sum, Floats& total) {
    const __m512 dots = _mm512_mul_ps(_mm512_cvtepi32_ps(products), _mm512_set1_ps(scale));
    const __m512 all = _mm512_fmadd_ps(dots, _mm512_loadu_ps(scales), (__m512)total);
    total = (Floats)_mm512_fmadd_ps(_mm512_loadu_ps(minima), _mm512_set1_ps(sum), all);
  }
};

}  // namespace

#endif
