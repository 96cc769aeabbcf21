// Products of bfloat16 inputs with GGUF's blocks of 32 in integers. Inputs are those of K-quants (see
// integer_blocks.h). Weights become integers of 16 bits; each block keeps its scale and its minimum.
#pragma once

#include "integer_blocks.h"
#include "small_blocks.h"

#if defined(HAS_INTEGER_PRODUCTS)

namespace {

// Elements of a block and their pairs; blocks that are taken together.
constexpr long kSmall = 32, kSmallPairs = kSmall / 2, kSmallBlocks = kBlock / kSmall;

INLINE inline Ints widened(Codes codes) { return shorts_of((__m256i)codes); }
// The values of 32 codes of 4 bits, by a table of signed bytes.
INLINE inline Ints looked_up(Codes codes, __m128i table) {
  const __m256i both = _mm256_broadcastsi128_si256(table);
  return signed_shorts_of(_mm256_shuffle_epi8(both, (__m256i)codes));
}

// What each has: the integers of a block, their scale, and a minimum where kHasMinimum.
template <class D>
struct SmallIntegersOf {
  static constexpr bool kIsKnown = false;
};
// Those that begin with their scale.
template <bool kHas>
struct ScaleFirst {
  static constexpr bool kIsKnown = true, kHasMinimum = kHas;
  static float scale(const uint8_t* block) { return half_at(block); }
  static float minimum(const uint8_t* block) { return half_at(block + 2); }
};

template <class T>
struct SmallIntegersOf<Q4_0<T>> : ScaleFirst<false> {
  INLINE static Ints integers(const uint8_t* block) {
    return less(widened(halves_of(block + 2)), 8);
  }
};
template <class T>
struct SmallIntegersOf<Q4_1<T>> : ScaleFirst<true> {
  INLINE static Ints integers(const uint8_t* block) { return widened(halves_of(block + 4)); }
};
template <class T>
struct SmallIntegersOf<Q5_0<T>> : ScaleFirst<false> {
  INLINE static Ints integers(const uint8_t* block) {
    return less(widened(halves_of(block + 6) | fifth_bits(block + 2)), 16);
  }
};
template <class T>
struct SmallIntegersOf<Q5_1<T>> : ScaleFirst<true> {
  INLINE static Ints integers(const uint8_t* block) {
    return widened(halves_of(block + 8) | fifth_bits(block + 4));
  }
};
template <class T>
struct SmallIntegersOf<Q8_0<T>> : ScaleFirst<false> {
  INLINE static Ints integers(const uint8_t* block) {
    return signed_shorts_of(load_raw<__m256i>(block + 2));
  }
};
template <class T>
struct SmallIntegersOf<IQ4_NL<T>> : ScaleFirst<false> {
  INLINE static Ints integers(const uint8_t* block) {
    // As kIq4Values.
    return looked_up(halves_of(block + 2), _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1,
                                                         13, 25, 38, 53, 69, 89, 113));
  }
};
template <class T>
struct SmallIntegersOf<MXFP4<T>> {
  static constexpr bool kIsKnown = true, kHasMinimum = false;
  static float scale(const uint8_t* block) { return MXFP4<T>::half_scale(*block); }
  INLINE static Ints integers(const uint8_t* block) {
    // As kFp4Values.
    return looked_up(halves_of(block + 1),
                     _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  }
};

template <class D>
struct SmallBlocks {
  using As = SmallIntegersOf<D>;
  using Inputs = IntegerInputs;

  // Blocks of kLanes rows of weights: each pair of a row in the row's lane.
  struct alignas(64) Weights {
    int32_t pairs[kBlock / 2][kLanes];
    float scales[kSmallBlocks][kLanes], minima[kSmallBlocks][kLanes];
    long count;  // Of blocks.
  };

  static void take_inputs(const Bfloat16* from, long left, Inputs* to) {
    ::take_inputs(from, left, to);
  }

  static void take_weights(const WeightBlock& block, Weights* to) {
    alignas(64) Ints vectors[kSmallBlocks][kLanes];
    to->count = read(block, to->scales, to->minima, [&](long row, long i, Ints v) INLINE {
      vectors[i][row] = v;
    });
    for (long i = 0; i < to->count; ++i)
      transpose(vectors[i], reinterpret_cast<Ints*>(to->pairs[i * kSmallPairs]));
  }

  // Adds the products of kCount rows of inputs with kPanelRows rows of weights to `sums`, which are
  // kPanelRows apart.
  template <long kCount>
  __attribute__((noinline)) static void add_block(const Weights* weights, const Inputs* x,
                                                  float* sums) {
    constexpr long kSums = kCount * kPanels;
    Floats totals[kSums];
    repeat<kSums>([&](auto i) INLINE { totals[i] = load(sums + i * kLanes); });
    for (long b = 0; b < weights[0].count; ++b) {
      Ints whole[kSums];
      sum_pairs<kCount, kSmallPairs>(weights, x, b * kSmallPairs, whole);
      repeat<kSums>([&](auto i) INLINE {
        const Weights& w = weights[i % kPanels];
        add_scaled(whole[i], w.scales[b], w.minima[b], x[i / kPanels], b, totals[i]);
      });
    }
    repeat<kSums>([&](auto i) INLINE { store(sums + i * kLanes, totals[i]); });
  }

  // The same for one row of inputs and kLanes rows of weights, whose integers stay where they are.
  static void add_single(const WeightBlock& block, const Inputs& x, float* sums) {
    float scales[kSmallBlocks][kLanes], minima[kSmallBlocks][kLanes];
    alignas(64) Ints products[kSmallBlocks][kLanes];
    const long count = read(block, scales, minima, [&](long row, long i, Ints v) INLINE {
      Ints own{};
      add_pairs(own, v, load_raw<Ints>(x.integers + kSmall * i));
      products[i][row] = own;
    });
    Floats total = load(sums);
    for (long b = 0; b < count; ++b)
      add_scaled(sums_of(products[b]), scales[b], minima[b], x, b, total);
    store(sums, total);
  }

 private:
  // Reads what is left of kBlock elements of each of kLanes rows, and fetches what comes next. Calls
  // `use` with the row, the number of the block and its integers. Returns the number of blocks.
  template <class Use>
  INLINE static long read(const WeightBlock& block, float (*scales)[kLanes], float (*minima)[kLanes],
                          Use use) {
    const long ahead = block.ahead(kBlockBytes<D>);
    const long count = std::min(kSmallBlocks, block.dim / kSmall - block.number * kSmallBlocks);
    for (long row = 0; row < kLanes; ++row) {
      const uint8_t* from = block.rows[row] + block.number * kBlockBytes<D>;
      fetch_run(from + ahead, kBlockBytes<D>);
      for (long i = 0; i < count; ++i, from += D::kUnitBytes) {
        use(row, i, As::integers(from));
        scales[i][row] = As::scale(from);
        if constexpr (As::kHasMinimum) minima[i][row] = As::minimum(from);
      }
    }
    return count;
  }

  // Adds the products of the b-th block. Explicit fused operations, so that one row has the same bits
  // as many.
  INLINE static void add_scaled(Ints products, const float* scales, const float* minima,
                                const Inputs& x, long b, Floats& total) {
    const Floats scale = broadcast(x.scales[b * kSmall / kScaled]);
    total = fused(as_floats(products) * scale, load(scales), total);
    if constexpr (As::kHasMinimum)
      total = fused(broadcast(x.sums_of_32[b]), load(minima), total);
  }
};

}  // namespace

#endif
