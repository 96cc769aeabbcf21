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

}  // namespace
