// Products of bfloat16 inputs with 4-bit groups of 64, in integers: an instruction has four times the
// products of one in float32. Inputs become integers of 8 bits with a scale for each group. Weights
// keep their codes, scales and minima.
#pragma once

#include "integer_tile.h"

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
      Ints codes[kCoded / kLanes] = {};
      to->scales[g] = to->sums[g] = 0;
      if (g * kCoded < left) take_group(from + g * kCoded, codes, &to->scales[g], &to->sums[g]);
      int8_t* at = to->codes + g / 2 * 2 * kCoded + g % 2 * kCoded / 2;
      for (long i = 0; i < kCoded / kLanes; ++i)
        store_bytes(at + i / 2 * kCoded + i % 2 * kLanes, codes[i]);
    }
  }

  static void take_weights(const WeightBlock& block, Weights* to) {
    to->groups = take_scales(block, to->scales, to->minima);
    const long ahead = block.ahead(kCodeBytes);
    for (long pair = 0; 2 * pair < to->groups; ++pair) {
      alignas(64) Ints rows[kLanes], both[kLanes];
      for (long row = 0; row < kLanes; ++row) rows[row] = codes(block, row, pair, to->groups, ahead);
      transpose(rows, both);
      for (long i = 0; i < kLanes; ++i) {
        int32_t(*quads)[kLanes] = to->quads + pair * kPairQuads + i;
        Memory<Ints>::store(quads[0], low_nibbles(both[i]));
        Memory<Ints>::store(quads[kLanes], high_nibbles(both[i]));
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
      Ints whole[kSums] = {};
      repeat<kQuadRuns>([&](auto run) INLINE {
        constexpr long kQuads = kPairQuads / kQuadRuns;
        static_assert(kQuadRuns == 1 || kQuads / 2 * 2 * 15 * long(kTop) <= INT16_MAX);
        Ints parts[kParts][kSums] = {};
        const long first = at + run * kQuads;
        for (long half = first; half < first + kQuads; half += 2 * kHalfQuads)
          for (long quad = half; quad < half + kHalfQuads; quad += kParts)
            repeat<kParts>([&](auto part) INLINE {
              Ints w[kPanels];
              repeat<kPanels>([&](auto t) INLINE {
                w[t] = load_raw<Ints>(weights[t].quads[quad + part]);
              });
              repeat<kCount>([&](auto r) INLINE {
                const Ints inputs = broadcast(load_raw<int>(x[r].codes + 4 * (quad + part)));
                repeat<kPanels>([&](auto t) INLINE {
                  add_quads(parts[part][r * kPanels + t], w[t], inputs);
                });
              });
            });
        repeat<kSums>([&](auto i) INLINE {
          Ints sum = widened_quads(parts[0][i]);
          repeat<kParts - 1>([&](auto part) INLINE {
            sum += widened_quads(parts[part + 1][i]);
          });
          whole[i] += sum;
        });
      });
      repeat<kSums>([&](auto i) INLINE {
        constexpr long r = i / kPanels, t = i % kPanels;
        add_scaled(whole[i], weights[t].scales[group], weights[t].minima[group], x[r].scales[group],
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
      const Ints first = load_raw<Ints>(from), second = load_raw<Ints>(from + kCoded);
      Ints rows[kLanes], of[2];
      repeat<kLanes>([&](auto row) INLINE {
        const Ints both = codes(block, row, pair, groups, ahead);
        Ints sum{};
        add_quads(sum, low_nibbles(both), first);
        add_quads(sum, high_nibbles(both), second);
        rows[row] = widened_quads(sum);
      });
      half_sums_of(rows, of, of + 1);
      for (long g = 2 * pair; g < std::min(2 * pair + 2, groups); ++g)
        add_scaled(of[g % 2], scales[g], minima[g], x.scales[g], x.sums[g], total);
    }
    store(sums, total);
  }

 private:
  static void take_group(const Bfloat16* from, Ints* codes, float* scale, float* sum) {
    constexpr long kVectors = kCoded / kLanes;
    const uint32_t bits =
        largest_bits<kVectors>([&](long i) INLINE { return load(from + i * kLanes); });
    const float largest = load_raw<float>(&bits);
    if (largest < kLeast) return;
    if (bits >= 0x7f800000u) {
      *scale = *sum = NAN;
      return;
    }
    *scale = largest / kTop;
    const Floats factor = broadcast(kTop / largest);
    Ints total{};
    for (long i = 0; i < kVectors; ++i) {
      codes[i] = nearest(load(from + i * kLanes) * factor);
      total += codes[i];
    }
    *sum = *scale * float(sum_of(total));
  }

  // Takes what each group of a block has beside its codes, and fetches the next block. Returns the
  // number of groups.
  static long take_scales(const WeightBlock& block, float (*scales)[kLanes],
                          float (*minima)[kLanes]) {
    constexpr long kBytes = kCodedGroups * 4;
    const long groups = std::min(kCodedGroups, (block.dim - block.number * kBlock) / kCoded);
    // Copies: after a fetch, the compiler would load the originals again.
    const long at = block.dim / 2 + block.number * kBytes, next = at + block.ahead(kBytes);
    Ints shared[kCodedGroups];
    take_four([&, at, next](long row) INLINE {
      const uint8_t* from = block.rows[row];
      fetch_near(from + next + kBytes - 1);
      return from + at;
    }, groups, shared);
    repeat<kCodedGroups>([&](auto g) INLINE {
      store(scales[g], bit_cast<Floats>(shared[g] << 16));
      store(minima[g], bit_cast<Floats>(shared[g] & -65536));
    });
    return groups;
  }

  // The codes of a pair of groups of a row; of a last group without another one, zeros behind them.
  INLINE static Ints codes(const WeightBlock& block, long row, long pair, long groups,
                               long ahead) {
    const uint8_t* from = block.rows[row] + block.number * kCodeBytes + pair * kCoded;
    // Rows may begin within a line. A last block may be shorter than the one that is fetched.
    if (pair == 0) fetch_near(from + ahead);
    fetch_near(from + ahead + kCoded - 1);
    if (groups <= 2) fetch_near(from + ahead + kCodeBytes - 1);
    return load_bytes(from, 2 * pair + 1 < groups);
  }

  // Adds the products of a group. Explicit fused operations, so that one row has the same bits as many.
  INLINE static void add_scaled(Ints products, const float* scales, const float* minima,
                                float scale, float sum, Floats& total) {
    const Floats dots = as_floats(products) * broadcast(scale);
    const Floats all = fused(dots, load(scales), total);
    total = fused(load(minima), broadcast(sum), all);
  }
};

}  // namespace

#endif
