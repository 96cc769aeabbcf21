// Sixteen vectors as a square.
#pragma once

#include "vectors.h"

namespace {

// Swaps the halves of two vectors that are kStep lanes apart, in every group of 2 * kStep lanes.
template <int kStep, class V, int... j>
INLINE inline void swap_lanes(V& a, V& b, std::integer_sequence<int, j...>) {
  constexpr int kCount = sizeof...(j);
  const V low = __builtin_shufflevector(a, b, ((j & kStep) ? kCount + j - kStep : j)...);
  b = __builtin_shufflevector(a, b, ((j & kStep) ? kCount + j : j + kStep)...);
  a = low;
}
template <int kStep, int kCount, class V>
INLINE inline void swap_blocks(V* v) {
  if constexpr (kStep > 0) {
    repeat<kCount>([&](auto i) INLINE {
      if constexpr (!(i & kStep))
        swap_lanes<kStep>(v[i], v[i + kStep], std::make_integer_sequence<int, kCount>());
    });
    swap_blocks<kStep / 2, kCount>(v);
  }
}
// Element j of vector i becomes element i of vector j.
template <class V>
INLINE inline void transpose(V* v) {
  constexpr int kCount = sizeof(V) / sizeof(float);
  swap_blocks<kCount / 2, kCount>(v);
}
template <class V>
INLINE inline void transpose(Split<V>* v) {
  constexpr long kHalf = Split<V>::kCount / 2;
  V quarters[4][kHalf];
  repeat<kHalf>([&](auto i) INLINE {
    quarters[0][i] = v[i].low, quarters[1][i] = v[i].high;
    quarters[2][i] = v[kHalf + i].low, quarters[3][i] = v[kHalf + i].high;
  });
  repeat<4>([&](auto q) INLINE { transpose(quarters[q]); });
  repeat<kHalf>([&](auto i) INLINE {
    v[i] = {quarters[0][i], quarters[2][i]}, v[kHalf + i] = {quarters[1][i], quarters[3][i]};
  });
}

}  // namespace
