// Vectors of 16 floats, loaded from and rounded to what a model computes in. The compiler lowers
// them to what the machine has; AVX-512 is named only where it cannot find the instruction itself.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>
#if defined(__AVX__)
#include <immintrin.h>
#endif
// AVX2 with fused operations and conversions of float16, where there is no AVX-512.
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__) && !defined(__AVX512F__)
#define USES_AVX2
#endif

#include "split.h"

namespace {

// Narrow vectors are registers. The others have kLanes elements, in as many registers as that takes.
#if defined(__AVX512F__)
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
#elif defined(USES_AVX2)
typedef float Narrow __attribute__((vector_size(32)));
typedef int32_t NarrowInts __attribute__((vector_size(32)));
typedef uint32_t NarrowBits __attribute__((vector_size(32)));
typedef Split<Narrow> Floats;
typedef Split<NarrowInts> Ints;
typedef Split<NarrowBits> Bits;
#else
typedef float Narrow __attribute__((vector_size(16)));
typedef int32_t NarrowInts __attribute__((vector_size(16)));
typedef uint32_t NarrowBits __attribute__((vector_size(16)));
typedef Split<Split<Narrow>> Floats;
typedef Split<Split<NarrowInts>> Ints;
typedef Split<Split<NarrowBits>> Bits;
#endif
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint8_t Bytes __attribute__((vector_size(16)));

constexpr long kLanes = 16;
const Ints kIota = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

struct Bfloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

#define FOR_DTYPES(DO) DO(float, float32) DO(Bfloat16, bfloat16) DO(Float16, float16)

// What comes next is fetched beside the arithmetic, to the second-level cache: the first is not asked
// for more than it can wait for at once.
INLINE inline void fetch_line(const void* from) { __builtin_prefetch(from, 0, 2); }
// To the first-level cache: what is needed soon, a line at a time.
INLINE inline void fetch_near(const void* from) { __builtin_prefetch(from, 0, 3); }
INLINE inline void fetch(const void* from, long num_bytes) {
  for (long d = 0; d < num_bytes; d += 64) fetch_line(static_cast<const char*>(from) + d);
}
// The same for a run that may begin within a line: it may end in one more.
INLINE inline void fetch_run(const void* from, long num_bytes) {
  const long skipped = reinterpret_cast<uintptr_t>(from) % 64;
  fetch(static_cast<const char*>(from) - skipped, skipped + num_bytes);
}

template <class F, long... i>
INLINE inline void repeat(F& work, std::integer_sequence<long, i...>) {
  (work(std::integral_constant<long, i>()), ...);
}
// Calls `work` with every constant below kCount: arrays that are indexed by them are registers,
// where a loop that the compiler unrolls late would leave them in memory.
template <long kCount, class F>
INLINE inline void repeat(F work) { repeat(work, std::make_integer_sequence<long, kCount>()); }

INLINE inline Floats broadcast(float x) { return x - Floats{}; }

// Elements from the start of a cache line on, not set. Whole vectors of them never span two lines.
template <class T>
class LineAligned {
 public:
  explicit LineAligned(long size)
      : first_(static_cast<T*>(::operator new(size * sizeof(T), std::align_val_t(64)))) {}
  ~LineAligned() { ::operator delete(first_, std::align_val_t(64)); }
  LineAligned(const LineAligned&) = delete;
  LineAligned& operator=(const LineAligned&) = delete;
  T* data() { return first_; }
  const T* data() const { return first_; }

 private:
  T* first_;
};

template <class V>
struct Memory {
  INLINE static V load(const void* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
  INLINE static void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }
};
// Register by register: compilers copy what is larger by parts that are smaller than a register.
template <class V>
struct Memory<Split<V>> {
  INLINE static Split<V> load(const void* from) {
    return {Memory<V>::load(from), Memory<V>::load(static_cast<const char*>(from) + sizeof(V))};
  }
  INLINE static void store(void* to, Split<V> v) {
    Memory<V>::store(to, v.low), Memory<V>::store(static_cast<char*>(to) + sizeof(V), v.high);
  }
};
template <class V, class T>
INLINE inline V load_raw(const T* from) { return Memory<V>::load(from); }

INLINE inline float to_float(float x) { return x; }
INLINE inline float to_float(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  return load_raw<float>(&bits);
}
INLINE inline float to_float(Float16 x) {
#if defined(__F16C__)
  return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(x.bits)));
#else
  const uint32_t sign = (x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  const uint32_t bits = rest >= 0x7c00u ? sign | 0x7f800000u | (rest & 0x3ffu) << 13
                                        : sign | ((rest << 13) + 0x38000000u);
  // Subnormals: the exponent is that of the smallest normal, without the implied one.
  if (rest < 0x400u) return std::copysign(float(rest) * 0x1p-24f, load_raw<float>(&bits));
  return load_raw<float>(&bits);
#endif
}

// Sixteen bytes as whole numbers.
INLINE inline Ints codes_of(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(load_raw<__m128i>(from));
#elif defined(USES_AVX2)
  const auto eight = [&](long i) INLINE {
    return (NarrowInts)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(from + i)));
  };
  return {eight(0), eight(8)};
#else
  int32_t codes[kLanes];
  for (long i = 0; i < kLanes; ++i) codes[i] = from[i];
  return load_raw<Ints>(codes);
#endif
}
INLINE inline Floats as_floats(Ints codes) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps((__m512i)codes);
#else
  return convert<Floats>(codes);
#endif
}

#if defined(USES_AVX2)
INLINE inline Narrow load_narrow(const Bfloat16* from) {
  return (Narrow)_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_raw<__m128i>(from)), 16);
}
INLINE inline Narrow load_narrow(const Float16* from) {
  return (Narrow)_mm256_cvtph_ps(load_raw<__m128i>(from));
}
#endif

INLINE inline Floats load(const float* from) { return load_raw<Floats>(from); }
INLINE inline Floats load(const Bfloat16* from) {
#if defined(__AVX512F__)
  // GCC 12 would take each half apart.
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_raw<__m256i>(from)), 16);
#elif defined(USES_AVX2)
  return {load_narrow(from), load_narrow(from + 8)};
#else
  uint32_t bits[kLanes];
  for (long i = 0; i < kLanes; ++i) bits[i] = uint32_t(from[i].bits) << 16;
  return load_raw<Floats>(bits);
#endif
}
INLINE inline Floats load(const Float16* from) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(load_raw<__m256i>(from));
#elif defined(USES_AVX2)
  return {load_narrow(from), load_narrow(from + 8)};
#else
  float v[kLanes];
  for (long i = 0; i < kLanes; ++i) v[i] = to_float(from[i]);
  return load_raw<Floats>(v);
#endif
}

INLINE inline void store(float* to, Floats v) { Memory<Floats>::store(to, v); }
INLINE inline void store(Bfloat16* to, Floats v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  // Rounding must not carry the mantissa of a NaN into its sign.
  const Bits is_nan = bit_cast<Bits>(v != v), kept = (is_nan & 0x7fc0u) | (~is_nan & rounded);
#if defined(__AVX512F__)
  const Halves h = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &h, sizeof h);
#elif defined(USES_AVX2)
  const __m256i h = _mm256_packus_epi32((__m256i)kept.low, (__m256i)kept.high);
  _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(h, 0xd8));
#else
  uint32_t all[kLanes];
  Memory<Bits>::store(all, kept);
  for (long i = 0; i < kLanes; ++i) to[i].bits = uint16_t(all[i]);
#endif
}
INLINE inline void store(Float16* to, Floats v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  std::memcpy(to, &h, sizeof h);
#elif defined(USES_AVX2)
  const auto eight = [](Narrow half) INLINE {
    return _mm256_cvtps_ph((__m256)half, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  };
  const __m128i halves[] = {eight(v.low), eight(v.high)};
  std::memcpy(to, halves, sizeof halves);
#else
  float all[kLanes];
  store(all, v);
  for (long i = 0; i < kLanes; ++i) {
    uint32_t bits;
    float x = all[i];
    std::memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000u;
    bits &= 0x7fffffffu;
    uint32_t h;
    if (bits > 0x7f800000u) h = 0x7e00u;
    else if (bits >= 0x477ff000u) h = 0x7c00u;
    else if (bits < 0x38800000u) h = uint32_t(std::nearbyint(std::fabs(x) * 0x1p24f));
    else h = (bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    to[i].bits = uint16_t(sign | h);
  }
#endif
}

// The end of a run whose length is no multiple of a vector.
template <class T>
INLINE inline Floats load_part(const T* from, long count) {
  if (count >= kLanes) return load(from);
  T padded[kLanes] = {};
  std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}
template <class T>
INLINE inline void store_part(T* to, Floats v, long count) {
  if (count >= kLanes) return store(to, v);
  T padded[kLanes];
  store(padded, v);
  std::memcpy(to, padded, count * sizeof(T));
}
template <class T>
INLINE inline Floats rounded(Floats v) { T kept[kLanes]; store(kept, v); return load(kept); }
template <>
INLINE inline Floats rounded<float>(Floats v) { return v; }

// Halves are combined with halves until one lane is left.
#if defined(__AVX512F__)
template <class F>
INLINE inline float reduce(Floats v, F combine) {
  v = combine(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3));
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1));
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0));
  return v[0];
}
#else
template <class F>
INLINE inline float reduce(Narrow v, F combine) {
#if defined(USES_AVX2)
  v = combine(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 2, 3, 0, 1));
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 1, 0, 1, 0, 1, 0));
#else
  v = combine(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
  v = combine(v, __builtin_shufflevector(v, v, 1, 0, 1, 0));
#endif
  return v[0];
}
template <class V, class F>
INLINE inline float reduce(Split<V> v, F combine) { return reduce(combine(v.low, v.high), combine); }
#endif
template <class V>
INLINE inline V larger(V a, V b) { return select(a > b, a, b); }
INLINE inline float sum(Floats v) {
  return reduce(v, [](auto a, auto b) INLINE { return a + b; });
}
INLINE inline float largest(Floats v) {
  return reduce(v, [](auto a, auto b) INLINE { return larger(a, b); });
}

bool any_above(Floats v, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#else
  return largest(v) > limit;
#endif
}

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

#if defined(__AVX512F__)
// Vectors a and b: their partial sums, interleaved. Four steps make of 16 vectors their 16 sums.
template <int kStep, class V>
INLINE inline V fold(V a, V b) {
  if constexpr (kStep == 0)
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
           __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
  else if constexpr (kStep == 1)
    return __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
}
template <class V>
INLINE inline V sums_of(const V* v) {
  V four[4];
  for (long i = 0; i < 4; ++i, v += 4)
    four[i] = fold<1>(fold<0>(v[0], v[1]), fold<0>(v[2], v[3]));
  return fold<2>(fold<2>(four[0], four[1]), fold<2>(four[2], four[3]));
}
// The sums of four vectors, added in the same order.
INLINE inline Floats four_sums_of(const Floats* v) {
  const Floats both = fold<2>(fold<1>(fold<0>(v[0], v[1]), fold<0>(v[2], v[3])), Floats{});
  return fold<2>(both, Floats{});
}
#else
// The sums of as many vectors as one has lanes, each in one lane.
#if defined(USES_AVX2)
INLINE inline NarrowInts sums_of(const NarrowInts* v) {
  const auto four = [](const NarrowInts* of) INLINE {
    return _mm256_hadd_epi32(_mm256_hadd_epi32((__m256i)of[0], (__m256i)of[1]),
                             _mm256_hadd_epi32((__m256i)of[2], (__m256i)of[3]));
  };
  const __m256i a = four(v), b = four(v + 4);
  return (NarrowInts)_mm256_permute2x128_si256(a, b, 0x20) +
         (NarrowInts)_mm256_permute2x128_si256(a, b, 0x31);
}
#endif
INLINE inline Narrow sums_of(const Narrow* v) {
#if defined(USES_AVX2)
  const auto four = [](const Narrow* of) INLINE {
    return _mm256_hadd_ps(_mm256_hadd_ps(of[0], of[1]), _mm256_hadd_ps(of[2], of[3]));
  };
  const __m256 a = four(v), b = four(v + 4);
  return _mm256_permute2f128_ps(a, b, 0x20) + _mm256_permute2f128_ps(a, b, 0x31);
#else
  const auto two = [](Narrow a, Narrow b) INLINE {
    return __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  };
  const Narrow a = two(v[0], v[1]), b = two(v[2], v[3]);
  return __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
#endif
}
template <class V>
INLINE inline Split<V> sums_of(const Split<V>* v) {
  constexpr long kHalf = Split<V>::kCount / 2;
  V halves[2 * kHalf];
  repeat<2 * kHalf>([&](auto i) INLINE { halves[i] = v[i].low + v[i].high; });
  return {sums_of(halves), sums_of(halves + kHalf)};
}
#endif

}  // namespace
