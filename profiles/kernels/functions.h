// Functions of each lane of a vector of floats.
#pragma once

#include "vectors.h"

namespace {

// exp by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (coefficients of the Taylor series;
// relative error below 2e-7). What is below the smallest normal number is zero. Of any vector of floats.
template <class V>
V exp_of(V x) {
  typedef decltype(x < x) Whole;
  const Whole is_tiny = x < V{} - 87.0f, is_nan = x != x;
  x = select(is_tiny, V{}, select(x > V{} + 88.0f, V{} + 88.0f, x));
  const V shifter = V{} + 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number.
  const V n = (x * 1.44269504f + shifter) - shifter;
  const V r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  V p = V{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  const Whole power = convert<Whole>(n) << 23;
  return select(is_nan, x, select(is_tiny, V{}, bit_cast<V>(bit_cast<Whole>(p) + power)));
}

// Absolute error below 2e-7.
template <class V>
V tanh_of(V x) { return 1.0f - 2.0f / (exp_of(x + x) + 1.0f); }

// erfc by the exponential of a polynomial (Press et al., Numerical Recipes, 2nd edition, 6.2): the
// relative error is below 1.2e-7 and that of exp.
Floats erfc_of(Floats x) {
  const Floats z = select(x < Floats{}, -x, x), t = 1.0f / (1.0f + 0.5f * z);
  Floats p = broadcast(0.17087277f);
  for (float c : {-0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f, -0.18628806f, 0.09678418f,
                  0.37409196f, 1.00002368f, -1.26551223f})
    p = p * t + c;
  const Floats tail = t * exp_of(p - z * z);
  return select(x < Floats{}, 2.0f - tail, tail);
}

}  // namespace
