// What products in integers are made of, with AVX-512 or AVX2:
//
//   kPanels, kMostRows  Vectors of weights, and rows of inputs, whose products registers sum at once.
//   kQuadRuns           Runs of a group's quads that are summed before they are widened. Sums of 16 bits
//                       hold eight pairs of codes up to 15 times inputs up to 127.
//   broadcast           A number in each lane.
//   nearest             Floats, rounded to integers.
//   fused               a * b + c, rounded once.
//   sum_of              The sum of all lanes.
//   largest_bits        The bits of the largest magnitude of kCount vectors of floats.
//   store_bytes, store_shorts    Each integer in 8 or 16 bits.
//   shorts_of, signed_shorts_of  Thirty-two bytes in 16 bits each.
//   shifted             Integers of 16 bits, to the right; to the left where kBits is negative.
//   bits_of             The same, masked.
//   less, times         Differences and products of integers of 16 bits.
//   factors_of          Sixteen signed bytes less a number.
//   two_factors         One factor 16 times, then another one. one_factor: one 32 times.
//   load_bytes          Sixty-four bytes from any address, or half of them and zeros.
//   low_nibbles, high_nibbles  Half of each byte.
//   add_pairs           Adds products of pairs of 16 bits to sums of 32.
//   add_quads           Adds products of four codes and four signed bytes; widened_quads: in 32 bits.
//   half_sums_of        The sums of both halves of each of 16 vectors: lane i is of the i-th.
//   take_four           Four integers of each of 16 rows, of which `held` exist: to[i] has the i-th ones.
//   transpose           Element j of vector i becomes element i of vector j, in other vectors.
#pragma once

#include "reductions.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#define HAS_INTEGER_PRODUCTS
#include "integers_avx512.h"
#elif defined(USES_AVX2)
#define HAS_INTEGER_PRODUCTS
#include "integers_avx2.h"
#endif
