// Dot products where a vector of 16 floats is no register: GCC 12 would keep such vectors in memory.
#pragma once

#include "vectors.h"

namespace {

#if !defined(__AVX512F__)
constexpr long kNarrow = sizeof(Narrow) / sizeof(float);

// The products of kCount rows and kWeights weights: sums[row * kWeights + weight].
template <long kCount, long kWeights>
INLINE inline void narrow_products(const float* const* weights, const float* x, long stride,
                                   long size, float* sums) {
  Narrow dots[kCount * kWeights] = {};
  const long whole = size / kNarrow * kNarrow;
  for (long d = 0; d < whole; d += kNarrow)
    repeat<kWeights>([&](auto w) INLINE {
      const Narrow weight = load_raw<Narrow>(weights[w] + d);
      repeat<kCount>([&](auto r) INLINE {
        dots[r * kWeights + w] += weight * load_raw<Narrow>(x + r * stride + d);
      });
    });
  for (long i = 0; i < kCount * kWeights; ++i) {
    sums[i] = 0;
    for (long lane = 0; lane < kNarrow; ++lane) sums[i] += dots[i][lane];
    for (long d = whole; d < size; ++d)
      sums[i] += weights[i % kWeights][d] * x[i / kWeights * stride + d];
  }
}
#endif

}  // namespace
