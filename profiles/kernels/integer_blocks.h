// Products of bfloat16 inputs with K-quants in integers: an instruction has twice the products of one
// in float32. Inputs become integers of 15 bits with a power of two for each 64. Those within 2^7 of
// the largest of them stay exact, and the error of the others is far below bfloat16's own rounding.
// Blocks of 32 share the inputs and the sums (see small_integers.h).
#pragma once

#include "integer_codes.h"

#if defined(HAS_INTEGER_PRODUCTS)

namespace {

// Inputs that share a scale.
constexpr long kScaled = 64, kScales = kBlock / kScaled;

// A block of inputs. Integers are in pairs, as weights are multiplied.
struct alignas(64) IntegerInputs {
  int16_t integers[kBlock];
  float scales[kScales];
  float sums_of_32[kBlock / 32], sums_of_16[kBlock / 16];
};

// Blocks of kLanes rows of weights: each pair of a row in the row's lane.
struct alignas(64) IntegerWeights {
  int32_t pairs[kBlock / 2][kLanes];
  float scales[kLanes];
  float offsets[kBlock / 16][kLanes];
};

// Takes a block of inputs, or the `left` of them.
inline void take_inputs(const Bfloat16* from, long left, IntegerInputs* to) {
  constexpr long kVectors = kScaled / kLanes;
  const auto vector = [&](long i) INLINE {
    return i * kLanes < left ? load(from + i * kLanes) : Floats{};
  };
  Floats sums[kBlock / kLanes];
  for (long s = 0; s < kScales; ++s) {
    const uint32_t bits =
        largest_bits<kVectors>([&](long i) INLINE { return vector(s * kVectors + i); });
    // 2^13 is the upper bit of the largest. What is below 2^-123 becomes zero.
    const int power = std::max(int(bits >> 23) - 127, -110) - 13;
    const uint32_t step = uint32_t(127 + power) << 23, inverse = uint32_t(127 - power) << 23;
    const bool is_finite = bits < 0x7f800000u;
    to->scales[s] = is_finite ? load_raw<float>(&step) : NAN;
    const Floats factor = broadcast(load_raw<float>(&inverse));
    for (long i = s * kVectors; i < (s + 1) * kVectors; ++i) {
      const Ints whole = is_finite ? nearest(vector(i) * factor) : Ints{};
      store_shorts(to->integers + i * kLanes, whole);
      sums[i] = as_floats(whole) * broadcast(to->scales[s]);
    }
  }
  store(to->sums_of_16, sums_of(sums));
  for (long i = 0; i < kBlock / 32; ++i)
    to->sums_of_32[i] = to->sums_of_16[2 * i] + to->sums_of_16[2 * i + 1];
}

// Reads a block of each of kLanes rows: `use` takes the row and its integers, 32 at a time. What is
// `ahead` bytes later is fetched.
template <class D, class Use>
INLINE inline void read_weights(const uint8_t* const* blocks, long ahead, IntegerWeights* to,
                                Use use) {
  using As = IntegersOf<D>;
  alignas(64) Ints offsets[kLanes];
  for (long row = 0; row < kLanes; ++row) {
    const uint8_t* block = blocks[row];
    fetch_run(block + ahead, kBlockBytes<D>);
    use(row, [&](auto each) INLINE { As::vectors(block, each); });
    if constexpr (As::kOffset > 0) offsets[row] = bit_cast<Ints>(As::offsets(block));
    to->scales[row] = As::scale(block);
  }
  if constexpr (As::kOffset > 0) transpose(offsets, reinterpret_cast<Ints*>(to->offsets));
}

template <class D>
void take_weights(const uint8_t* const* blocks, long ahead, IntegerWeights* to) {
  alignas(64) Ints vectors[kBlock / 32][kLanes];
  read_weights<D>(blocks, ahead, to, [&](long row, auto read) INLINE {
    read([&](auto i, Ints v) INLINE { vectors[i][row] = v; });
  });
  for (long i = 0; i < kBlock / 32; ++i)
    transpose(vectors[i], reinterpret_cast<Ints*>(to->pairs[i * kLanes]));
}

// Adds products to the sums of kLanes rows of weights.
template <class D>
INLINE inline void add_scaled(Floats dots, const IntegerWeights& weights, const IntegerInputs& x,
                              float* sums) {
  constexpr long kOffset = IntegersOf<D>::kOffset;
  Floats sum = fused(dots, load(weights.scales), load(sums));
  if constexpr (kOffset > 0) {
    const float* inputs = kOffset == 16 ? x.sums_of_16 : x.sums_of_32;
    for (long i = 0; i < kBlock / kOffset; ++i)
      sum = fused(load(weights.offsets[i * (kOffset / 16)]), broadcast(inputs[i]), sum);
  }
  store(sums, sum);
}

// Sums the products of kCount rows of inputs with kPanelRows rows of weights: those of kPairs pairs from
// one on. The sum of row r and panel t is the (r * kPanels + t)-th.
template <long kCount, long kPairs, class Weights>
INLINE inline void sum_pairs(const Weights* weights, const IntegerInputs* x, long first,
                             Ints* sums) {
  constexpr long kSums = kCount * kPanels;
  // Few sums would wait for themselves: each is taken in parts.
  constexpr long kParts = kCount == 1 ? 4 : kCount == 2 ? 2 : 1;
  Ints parts[kParts][kSums] = {};
  for (long pair = first; pair < first + kPairs; pair += kParts)
    repeat<kParts>([&](auto part) INLINE {
      Ints w[kPanels];
      repeat<kPanels>([&](auto t) INLINE { w[t] = load_raw<Ints>(weights[t].pairs[pair + part]); });
      repeat<kCount>([&](auto r) INLINE {
        const Ints inputs = broadcast(load_raw<int>(x[r].integers + 2 * (pair + part)));
        repeat<kPanels>([&](auto t) INLINE { add_pairs(parts[part][r * kPanels + t], w[t], inputs); });
      });
    });
  repeat<kSums>([&](auto i) INLINE {
    sums[i] = parts[0][i];
    repeat<kParts - 1>([&](auto part) INLINE { sums[i] += parts[part + 1][i]; });
  });
}

// Adds a block's products of kCount rows of inputs with kPanelRows rows of weights to `sums`, which
// are kPanelRows apart.
template <class D, long kCount>
__attribute__((noinline)) void add_block(const IntegerWeights* weights, const IntegerInputs* x,
                                         float* sums) {
  using As = IntegersOf<D>;
  constexpr long kSums = kCount * kPanels, kPairs = As::kSummed / 2;
  Floats dots[kSums] = {};
  for (long first = 0; first < kBlock / 2; first += kPairs) {
    Ints whole[kSums];
    sum_pairs<kCount, kPairs>(weights, x, first, whole);
    repeat<kSums>([&](auto i) INLINE {
      const float scale = x[i / kPanels].scales[2 * first / kScaled];
      dots[i] = fused(as_floats(whole[i]), broadcast(scale), dots[i]);
    });
  }
  repeat<kSums>([&](auto i) INLINE {
    dots[i] = fused(dots[i], load(weights[i % kPanels].scales), load(sums + i * kLanes));
  });
  if constexpr (As::kOffset > 0)
    for (long i = 0; i < kBlock / As::kOffset; ++i)
      repeat<kCount>([&](auto g) INLINE {
        const float of_inputs = As::kOffset == 16 ? x[g].sums_of_16[i] : x[g].sums_of_32[i];
        repeat<kPanels>([&](auto t) INLINE {
          Floats& dot = dots[g * kPanels + t];
          const float* offsets = weights[t].offsets[i * (As::kOffset / 16)];
          dot = fused(load(offsets), broadcast(of_inputs), dot);
        });
      });
  repeat<kSums>([&](auto i) INLINE { store(sums + i * kLanes, dots[i]); });
}

// The same for one row of inputs and kLanes rows of weights, whose integers stay where they are.
template <class D>
void add_single(const uint8_t* const* blocks, long ahead, const IntegerInputs& x, float* sums) {
  constexpr long kSummed = IntegersOf<D>::kSummed, kParts = kBlock / kSummed;
  alignas(64) Ints parts[kParts][kLanes];
  IntegerWeights shared;
  read_weights<D>(blocks, ahead, &shared, [&](long row, auto read) INLINE {
    Ints own[kParts] = {};
    read([&](auto i, Ints v) INLINE {
      add_pairs(own[32 * i / kSummed], v, load_raw<Ints>(x.integers + 32 * i));
    });
    repeat<kParts>([&](auto i) INLINE { parts[i][row] = own[i]; });
  });
  Floats dots{};
  for (long i = 0; i < kParts; ++i)
    dots = fused(as_floats(sums_of(parts[i])), broadcast(x.scales[i * kSummed / kScaled]),
                 dots);
  add_scaled<D>(dots, shared, x, sums);
}

}  // namespace

#endif
