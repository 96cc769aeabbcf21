// Dot products with vectors of one register, where that has fewer than 16 floats: registers hold twelve
// sums.
#pragma once

#include "vectors.h"

namespace {

#if !defined(__AVX512F__)
constexpr long kNarrow = sizeof(Narrow) / sizeof(float);

INLINE inline Narrow load_narrow(const float* from) { return load_raw<Narrow>(from); }

// The products of kCount rows and kWeights weights: sums[row * kWeights + weight]. `on_line` is told of
// each line of weights, by its first byte.
template <long kCount, long kWeights, class E, class OnLine>
INLINE inline void narrow_products(const E* const* weights, const float* x, long stride, long size,
                                   float* sums, OnLine on_line) {
  Narrow dots[kCount * kWeights] = {};
  const long whole = size / kNarrow * kNarrow;
  for (long d = 0; d < whole; d += kNarrow) {
    if (const long at = d * long(sizeof(E)); at % 64 == 0) on_line(at);
    repeat<kWeights>([&](auto w) INLINE {
      const Narrow weight = load_narrow(weights[w] + d);
      repeat<kCount>([&](auto r) INLINE {
        dots[r * kWeights + w] += weight * load_raw<Narrow>(x + r * stride + d);
      });
    });
  }
  for (long i = 0; i < kCount * kWeights; ++i) {
    sums[i] = 0;
    for (long lane = 0; lane < kNarrow; ++lane) sums[i] += dots[i][lane];
    for (long d = whole; d < size; ++d)
      sums[i] += to_float(weights[i % kWeights][d]) * x[i / kWeights * stride + d];
  }
}
#endif

}  // namespace
