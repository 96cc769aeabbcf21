// CPU kernels for what torch leaves slow: attention of one decode step, RMSNorm, rotary embedding,
// SwiGLU, sums of experts, and groups of few bits, for every dtype; products are in products.cpp.
// Every function has a twin in plain torch, in twins.py, group_twins.py or routed_rows.py. Arithmetic
// is in float32.

#include <algorithm>

#include "attention.h"
#include "functions.h"
#include "groups.h"
#include "packed_pairs.h"
#include "routed_rows.h"
#include "sparse_attention.h"
#include "vectors.h"

namespace {

// Calling the team costs more than so few elements, and beside another program the team waits for a
// thread that was taken off its core.
constexpr long kSerial = 1 << 16;
// Elements that a thread takes at once.
constexpr long kTaken = 1 << 14;
long taken(long dim) { return std::max(1L, kTaken / dim); }

// Runs `outer` times `inner`, `dim` elements each.
template <class T>
void norm(const T* x, long outer, long outer_stride, long inner, long inner_stride, long dim,
          const T* weight, float eps, T* out, long out_outer, long out_inner, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, taken(dim)) collapse(2) \
    if (outer * inner * dim > kSerial)
  for (long o = 0; o < outer; ++o)
    for (long i = 0; i < inner; ++i) {
      const T* from = x + o * outer_stride + i * inner_stride;
      T* to = out + o * out_outer + i * out_inner;
      Floats squares{};
      for (long d = 0; d < dim; d += kLanes) {
        const Floats v = load_part(from + d, dim - d);
        squares += v * v;
      }
      const float scale = 1.0f / std::sqrt(sum(squares) / dim + eps);
      for (long d = 0; d < dim; d += kLanes) {
        const Floats v = rounded<T>(load_part(from + d, dim - d) * scale);
        store_part(to + d, v * load_part(weight + d, dim - d), dim - d);
      }
    }
}

template <class T>
void rotate(T* x, long tokens, long token_stride, long heads, long dim, const T* cosines,
            const T* sines, long positions, long half, long interleaved, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, taken(heads * dim)) \
    if (tokens * heads * dim > kSerial)
  for (long t = 0; t < tokens; ++t)
    for (long h = 0; h < heads; ++h)
      for (long d = 0; d < half; d += kLanes) {
        T *head = x + t * token_stride + h * dim, *left = head + d, *right = left + half;
        const long count = std::min(half - d, kLanes);
        T pairs[2 * kLanes];
        if (interleaved) {
          left = pairs, right = pairs + kLanes;
          for (long i = 0; i < count; ++i)
            left[i] = head[2 * (d + i)], right[i] = head[2 * (d + i) + 1];
        }
        const Floats l = load_part(left, count), r = load_part(right, count);
        const Floats c = load_part(cosines + t % positions * half + d, count);
        const Floats s = load_part(sines + t % positions * half + d, count);
        store_part(left, rounded<T>(l * c) - rounded<T>(r * s), count);
        store_part(right, rounded<T>(r * c) + rounded<T>(l * s), count);
        for (long i = 0; interleaved && i < count; ++i)
          head[2 * (d + i)] = left[i], head[2 * (d + i) + 1] = right[i];
      }
}

template <class T>
void swiglu(T* gate, const T* up, long rows, long dim, long gate_stride, long up_stride,
            int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, taken(dim)) if (rows * dim > kSerial)
  for (long r = 0; r < rows; ++r)
    for (long d = 0; d < dim; d += kLanes) {
      T* to = gate + r * gate_stride + d;
      const Floats x = load_part(to, dim - d);
      const Floats silu = rounded<T>(x / (1.0f + exp_of(-x)));
      store_part(to, silu * load_part(up + r * up_stride + d, dim - d), dim - d);
    }
}

// Every step is rounded, as where it is an operation of its own.
template <class T>
void clamped_swiglu(T* gate, const T* up, long rows, long dim, long gate_stride, long up_stride,
                    float limit, float alpha, int threads) {
  const Floats most = Floats{} + limit;
#pragma omp parallel for num_threads(threads) schedule(dynamic, taken(dim)) if (rows * dim > kSerial)
  for (long r = 0; r < rows; ++r)
    for (long d = 0; d < dim; d += kLanes) {
      T* to = gate + r * gate_stride + d;
      Floats x = load_part(to, dim - d), y = load_part(up + r * up_stride + d, dim - d);
      // Written so that NaN stays.
      x = select(x > most, most, x);
      y = select(y > most, most, select(y < -most, -most, y));
      const Floats share = rounded<T>(1.0f / (1.0f + exp_of(-rounded<T>(x * alpha))));
      store_part(to, rounded<T>(x * share) * rounded<T>(y + 1.0f), dim - d);
    }
}

// In the order of ACTIVATIONS in profiles/kernels/layer.py.
enum Activation { kSigmoid, kSilu, kGelu, kGeluTanh };
INLINE inline Floats activated(Floats x, int kind) {
  if (kind == kSigmoid) return 1.0f / (1.0f + exp_of(-x));
  if (kind == kSilu) return x / (1.0f + exp_of(-x));
  if (kind == kGelu) return 0.5f * x * erfc_of(x * -0.707106781f);
  return 0.5f * x * (1.0f + tanh_of(0.797884561f * (x + 0.044715f * x * x * x)));
}
template <class T>
void activate(T* x, long rows, long dim, long stride, int kind, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, taken(dim)) if (rows * dim > kSerial)
  for (long r = 0; r < rows; ++r)
    for (long d = 0; d < dim; d += kLanes) {
      T* to = x + r * stride + d;
      store_part(to, activated(load_part(to, dim - d), kind), dim - d);
    }
}

// exp(x) - 1 where x is not above zero: by its Taylor series near zero, where exp(x) is almost 1.
INLINE inline Floats expm1_of(Floats x) {
  Floats p = broadcast(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f}) p = p * x + c;
  return select(x > broadcast(-0.3f), p * x, exp_of(x) - 1.0f);
}
// Every step is rounded, as where it is an operation of its own. Slope and largest exponent are those
// of profiles/kernels/xielu.py.
template <class T>
void xielu(T* x, long rows, long dim, float above, float below, int threads) {
  const Floats most = broadcast(-1e-6f);
#pragma omp parallel for num_threads(threads) schedule(dynamic, taken(dim)) if (rows * dim > kSerial)
  for (long r = 0; r < rows; ++r)
    for (long d = 0; d < dim; d += kLanes) {
      T* to = x + r * dim + d;
      const Floats v = load_part(to, dim - d), line = rounded<T>(v * 0.5f);
      const Floats low = rounded<T>(expm1_of(rounded<T>(select(v < most, v, most))));
      const Floats bent = rounded<T>(rounded<T>(low - v) * below);
      const Floats straight = rounded<T>(rounded<T>(v * above) * v);
      store_part(to, select(v > Floats{}, straight, bent) + line, dim - d);
    }
}

}  // namespace

#define EXPORT(T, NAME)                                                                        \
  extern "C" void rms_norm_##NAME(const T* x, long outer, long outer_stride, long inner,       \
                                  long inner_stride, long dim, const T* weight, float eps,     \
                                  T* out, long out_outer, long out_inner, int threads) {       \
    norm(x, outer, outer_stride, inner, inner_stride, dim, weight, eps, out, out_outer,        \
         out_inner, threads);                                                                  \
  }                                                                                            \
  extern "C" void rotate_##NAME(T* x, long tokens, long token_stride, long heads, long dim,    \
                                const T* cosines, const T* sines, long positions, long half,   \
                                long interleaved, int threads) {                               \
    rotate(x, tokens, token_stride, heads, dim, cosines, sines, positions, half, interleaved,  \
           threads);                                                                           \
  }                                                                                            \
  extern "C" void swiglu_##NAME(T* gate, const T* up, long rows, long dim, long gate_stride,   \
                                long up_stride, int threads) {                                 \
    swiglu(gate, up, rows, dim, gate_stride, up_stride, threads);                              \
  }                                                                                            \
  extern "C" void activate_##NAME(T* x, long rows, long dim, long stride, int kind,            \
                                  int threads) {                                               \
    activate(x, rows, dim, stride, kind, threads);                                             \
  }                                                                                            \
  extern "C" void xielu_##NAME(T* x, long rows, long dim, float above, float below,            \
                               int threads) {                                                  \
    xielu(x, rows, dim, above, below, threads);                                                \
  }                                                                                            \
  extern "C" void clamped_swiglu_##NAME(T* gate, const T* up, long rows, long dim,             \
                                        long gate_stride, long up_stride, float limit,         \
                                        float alpha, int threads) {                            \
    clamped_swiglu(gate, up, rows, dim, gate_stride, up_stride, limit, alpha, threads);        \
  }                                                                                            \
  extern "C" void add_routed_##NAME(const RoutedRows* r, int threads) {                        \
    add_routed<T>(*r, threads);                                                                \
  }                                                                                            \
  extern "C" void pack_rows_##NAME(const T* from, long outer, long inner, long outer_stride,   \
                                   long inner_stride, long dim, long group, int bits,          \
                                   uint8_t* to, long out_outer, long out_inner, long* bad,     \
                                   int threads) {                                              \
    *bad = !pack_rows(from, {outer, inner, outer_stride, inner_stride}, {dim, group, bits},    \
                      to, out_outer, out_inner, threads);                                      \
  }                                                                                            \
  extern "C" void unpack_rows_##NAME(const uint8_t* from, long outer, long inner,              \
                                     long outer_stride, long inner_stride, long dim,           \
                                     long group, int bits, T* to, long out_outer,              \
                                     long out_inner, int threads) {                            \
    unpack_rows(from, {outer, inner, outer_stride, inner_stride}, {dim, group, bits}, to,      \
                out_outer, out_inner, threads);                                                \
  }
FOR_DTYPES(EXPORT)

template <class T, class Ops>
void decode_attention(const Attention& a, int threads) {
  if (a.sparsity < 1) {
    if (a.bits) return attend_rows<SparseRow<T, Ops, PackedCache<T>>>(a, threads);
    return attend_rows<SparseRow<T, Ops, PlainCache<T>>>(a, threads);
  }
  if (a.bits) return attend_rows<Row<T, Ops, PackedCache<T>>>(a, threads);
  attend_rows<Row<T, Ops, PlainCache<T>>>(a, threads);
}

extern "C" void decode_attention_float32(const Attention* a, int threads) {
  decode_attention<float, Wide<float>>(*a, threads);
}
extern "C" void decode_attention_float16(const Attention* a, int threads) {
  decode_attention<Float16, Wide<Float16>>(*a, threads);
}
extern "C" void decode_attention_bfloat16(const Attention* a, int threads) {
#if defined(HAS_TABLE)
  if (PackedPairs::takes({a->dim, a->group_size, a->bits}) && a->value_dim % 32 == 0 &&
      a->sparsity == 1)
    return attend_rows<Row<Bfloat16, PackedPairs, PlainCache<uint8_t>>>(*a, threads);
#endif
#if defined(__AVX512BF16__)
  if (a->dim % 32 == 0 && a->value_dim % 32 == 0) return decode_attention<Bfloat16, Pairs>(*a, threads);
#endif
  decode_attention<Bfloat16, Wide<Bfloat16>>(*a, threads);
}
