// Products of groups of rows with GGUF's blocks, in integers.
#pragma once

#include "integer_blocks.h"
#include "small_integers.h"

#if defined(HAS_INTEGER_PRODUCTS)

namespace {

// The form of K-quants, whose rows are whole blocks.
template <class D>
struct KQuants {
  using Inputs = IntegerInputs;
  using Weights = IntegerWeights;

  static void take_inputs(const Bfloat16* from, long left, Inputs* to) {
    ::take_inputs(from, left, to);
  }
  static void take_weights(const WeightBlock& block, Weights* to) {
    const uint8_t* blocks[kLanes];
    ::take_weights<D>(places(block, blocks), block.ahead(kBlockBytes<D>), to);
  }
  static void add_single(const WeightBlock& block, const Inputs& x, float* sums) {
    const uint8_t* blocks[kLanes];
    ::add_single<D>(places(block, blocks), block.ahead(kBlockBytes<D>), x, sums);
  }
  template <long kCount>
  static void add_block(const Weights* weights, const Inputs* x, float* sums) {
    ::add_block<D, kCount>(weights, x, sums);
  }

 private:
  static const uint8_t* const* places(const WeightBlock& block, const uint8_t** blocks) {
    for (long i = 0; i < kLanes; ++i) blocks[i] = block.rows[i] + block.number * kBlockBytes<D>;
    return blocks;
  }
};

using MultiplyIntegers = void (*)(const Products&, int);
template <class D>
constexpr MultiplyIntegers integer_products() {
  if constexpr (IntegersOf<D>::kIsKnown) return multiply_integers<KQuants<D>>;
  if constexpr (SmallIntegersOf<D>::kIsKnown) return multiply_integers<SmallBlocks<D>>;
  return nullptr;
}

}  // namespace

#endif
