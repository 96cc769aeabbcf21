// Dot products where a vector of 16 floats is no register: GCC 12 would keep such vectors in memory.
#pragma once

#include "vectors.h"

namespace {

#if !defined(__AVX512F__)
constexpr long kNarrow = sizeof(Narrow) / sizeof(float);

// What a vector of weights is multiplied as.
INLINE inline Narrow load_narrow(const float* from) { return load_raw<Narrow>(from); }
#if defined(HAS_AVX2)
INLINE inline Narrow load_narrow(const Bfloat16* from) { return eight_of(from); }
INLINE inline Narrow load_narrow(const Float16* from) { return eight_of(from); }
#endif
INLINE inline float as_float(float x) { return x; }
template <class E>
INLINE inline float as_float(E x) { return load_part(&x, 1)[0]; }

// The products of kCount rows and kWeights weights: sums[row * kWeights + weight]. `fetch` is told of
// each line of weights, by its first byte.
template <long kCount, long kWeights, class E, class Fetch>
INLINE inline void narrow_products(const E* const* weights, const float* x, long stride, long size,
                                   float* sums, Fetch fetch) {
  Narrow dots[kCount * kWeights] = {};
  const long whole = size / kNarrow * kNarrow;
  for (long d = 0; d < whole; d += kNarrow) {
    if (const long at = d * long(sizeof(E)); at % 64 == 0) fetch(at);
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
      sums[i] += as_float(weights[i % kWeights][d]) * x[i / kWeights * stride + d];
  }
}
#endif

}  // namespace
