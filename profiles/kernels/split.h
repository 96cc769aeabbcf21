// Vectors in several registers, for processors on which a vector of 64 bytes is no register: GCC 12
// keeps such a vector in memory. They have the operators of the compiler's own vectors.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#define INLINE __attribute__((always_inline))

namespace {

template <class V>
using ElementOf = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;

template <class V>
class Split {
 public:
  using Element = ElementOf<V>;
  static constexpr long kCount = sizeof(V) / sizeof(Element) * 2;

  Split() = default;
  INLINE Split(V low, V high) : low(low), high(high) {}
  // The first elements; the others are zero.
  INLINE Split(std::initializer_list<Element> first) {
    Element all[kCount] = {};
    std::copy(first.begin(), first.end(), all);
    std::memcpy(this, all, sizeof all);
  }
  INLINE Element operator[](long i) const {
    return i < kCount / 2 ? low[i] : high[i - kCount / 2];
  }

#define SPLIT_OPERATOR(OP)                                                                     \
  friend INLINE Split operator OP(Split a, Split b) { return {a.low OP b.low, a.high OP b.high}; } \
  friend INLINE Split operator OP(Split a, Element b) { return {a.low OP b, a.high OP b}; }    \
  friend INLINE Split operator OP(Element a, Split b) { return {a OP b.low, a OP b.high}; }
  SPLIT_OPERATOR(+) SPLIT_OPERATOR(-) SPLIT_OPERATOR(*) SPLIT_OPERATOR(/)
  SPLIT_OPERATOR(&) SPLIT_OPERATOR(|) SPLIT_OPERATOR(^)
#undef SPLIT_OPERATOR
  friend INLINE Split operator<<(Split a, int b) { return {a.low << b, a.high << b}; }
  friend INLINE Split operator>>(Split a, int b) { return {a.low >> b, a.high >> b}; }
  friend INLINE Split operator-(Split a) { return {-a.low, -a.high}; }
  friend INLINE Split operator~(Split a) { return {~a.low, ~a.high}; }
  friend INLINE Split& operator+=(Split& a, Split b) { return a = a + b; }
  friend INLINE Split& operator-=(Split& a, Split b) { return a = a - b; }
  friend INLINE Split& operator*=(Split& a, Element b) { return a = a * b; }
#define SPLIT_COMPARISON(OP)                                                                   \
  friend INLINE auto operator OP(Split a, Split b) {                                           \
    return Split<decltype(a.low OP b.low)>{a.low OP b.low, a.high OP b.high};                  \
  }                                                                                            \
  friend INLINE auto operator OP(Split a, Element b) {                                         \
    return Split<decltype(a.low OP b)>{a.low OP b, a.high OP b};                               \
  }
  SPLIT_COMPARISON(<) SPLIT_COMPARISON(>) SPLIT_COMPARISON(>=) SPLIT_COMPARISON(!=)
#undef SPLIT_COMPARISON

  V low, high;
};

// The elements of `a` where the mask is set, of `b` elsewhere.
template <class M, class V>
INLINE inline V select(M mask, V a, V b) { return mask ? a : b; }
template <class M, class V>
INLINE inline Split<V> select(Split<M> mask, Split<V> a, Split<V> b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}

template <class To>
struct Conversion {
  template <class V>
  INLINE static To of_bits(V v) { return (To)v; }
  template <class V>
  INLINE static To of_values(V v) { return __builtin_convertvector(v, To); }
};
template <class To>
struct Conversion<Split<To>> {
  template <class V>
  INLINE static Split<To> of_bits(V v) {
    return {Conversion<To>::of_bits(v.low), Conversion<To>::of_bits(v.high)};
  }
  template <class V>
  INLINE static Split<To> of_values(V v) {
    return {Conversion<To>::of_values(v.low), Conversion<To>::of_values(v.high)};
  }
};
// The same bits as elements of another type, and the same values.
template <class To, class V>
INLINE inline To bit_cast(V v) { return Conversion<To>::of_bits(v); }
template <class To, class V>
INLINE inline To convert(V v) { return Conversion<To>::of_values(v); }

}  // namespace
