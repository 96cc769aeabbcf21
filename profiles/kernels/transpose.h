// Sixteen vectors as a square.
#pragma once

#include "vectors.h"

namespace {

// Swaps the halves of two vectors that lie kStep lanes apart, in every group of 2 * kStep lanes.
template <int kStep>
INLINE inline void swap_lanes(Floats& a, Floats& b) {
#define LOW(j) ((j) & kStep ? 16 + (j) - kStep : (j))
#define HIGH(j) ((j) & kStep ? 16 + (j) : (j) + kStep)
  const Floats low = __builtin_shufflevector(a, b, LOW(0), LOW(1), LOW(2), LOW(3), LOW(4), LOW(5),
                                             LOW(6), LOW(7), LOW(8), LOW(9), LOW(10), LOW(11),
                                             LOW(12), LOW(13), LOW(14), LOW(15));
  b = __builtin_shufflevector(a, b, HIGH(0), HIGH(1), HIGH(2), HIGH(3), HIGH(4), HIGH(5), HIGH(6),
                              HIGH(7), HIGH(8), HIGH(9), HIGH(10), HIGH(11), HIGH(12), HIGH(13),
                              HIGH(14), HIGH(15));
  a = low;
#undef LOW
#undef HIGH
}
template <int kStep>
INLINE inline void swap_blocks(Floats* v) {
  repeat<kLanes>([&](auto i) INLINE {
    if constexpr (!(i & kStep)) swap_lanes<kStep>(v[i], v[i + kStep]);
  });
}
// Element j of vector i becomes element i of vector j.
INLINE inline void transpose(Floats* v) {
  swap_blocks<8>(v), swap_blocks<4>(v), swap_blocks<2>(v), swap_blocks<1>(v);
}

}  // namespace
