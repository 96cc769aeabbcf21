// Attention of one decode step over a cache as it lies. With AVX-512 bf16 the dot products take the
// instructions made for them. Results do not depend on the number of threads: a row is always
// computed by one, in the same order.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "vectors.h"

namespace {

constexpr long kTile = 32;     // Tokens whose scores are known before their values are added.
constexpr long kQuad = 4;      // Tokens whose values are added at once.
constexpr long kAhead = 4;     // Tokens that are fetched ahead.
constexpr long kQueries = 48;  // Whose running sums stay in a thread's first-level cache.
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The arithmetic of attention, in float32. `kQuad` tokens of the values are added at once, so that
// the running sums are loaded and stored less often.
template <class T>
struct Wide {
  using Query = float;
  using Share = float;
  static constexpr long kSharesPerQuad = kQuad;

  static void copy_query(const T* q, long dim, float* to) {
    for (long d = 0; d < dim; d += kLanes) store_part(to + d, load_part(q + d, dim - d), dim - d);
  }
  // One vector of partial sums for each of the queries that share the key.
  static void score(const T* key, const float* q, long group, long dim, Floats* dots) {
    for (long g = 0; g < group; ++g) {
      dots[g] = Floats{};
      for (long d = 0; d < dim; d += kLanes)
        dots[g] += load_part(key + d, dim - d) * load_part(q + g * dim + d, dim - d);
    }
  }
  // Shares of kQuad tokens for 16 queries; `width` apart.
  static void pack(const Floats* p, float* to, long width) {
    for (long t = 0; t < kQuad; ++t) store(to + t * width, p[t]);
  }
  static void add(const T* const* values, const float* shares, long width, long group, long dim,
                  float* sums) {
    for (long d = 0; d < dim; d += kLanes) {
      Floats v[kQuad];
      for (long t = 0; t < kQuad; ++t) v[t] = load_part(values[t] + d, dim - d);
      for (long g = 0; g < group; ++g) {
        float* mine = sums + g * padded(dim) + d;
        Floats kept = load(mine);
        for (long t = 0; t < kQuad; ++t) kept += v[t] * shares[t * width + g];
        store(mine, kept);
      }
    }
  }
  static void finish(const float* sums, float scale, long dim, T* out) {
    for (long d = 0; d < dim; d += kLanes)
      store_part(out + d, load(sums + d) * scale, dim - d);
  }
};

#if defined(__AVX512BF16__)
__m512bh load_pairs(const Bfloat16* from) { return (__m512bh)_mm512_loadu_si512(from); }

// Pairs of bfloat16 are multiplied and added in one instruction. Needs whole vectors of 32. The
// sums of 32 dimensions lie as the interleaving of two tokens leaves them: dimensions 8i to 8i + 3
// in one vector, 8i + 4 to 8i + 7 in the other.
struct Pairs {
  using Query = Bfloat16;
  using Share = uint32_t;
  static constexpr long kSharesPerQuad = kQuad / 2;

  static void copy_query(const Bfloat16* q, long dim, Bfloat16* to) {
    std::memcpy(to, q, dim * sizeof *q);
  }
  template <long kVectors>
  static void score_dim(const Bfloat16* key, const Bfloat16* q, long group, Floats* dots) {
    __m512bh k[kVectors];
    for (long j = 0; j < kVectors; ++j) k[j] = load_pairs(key + j * 32);
    for (long g = 0; g < group; ++g) {
      __m512 dot = _mm512_setzero_ps();
      for (long j = 0; j < kVectors; ++j)
        dot = _mm512_dpbf16_ps(dot, load_pairs(q + (g * kVectors + j) * 32), k[j]);
      dots[g] = (Floats)dot;
    }
  }
  static void score(const Bfloat16* key, const Bfloat16* q, long group, long dim, Floats* dots) {
    switch (dim / 32) {
      case 2: return score_dim<2>(key, q, group, dots);
      case 3: return score_dim<3>(key, q, group, dots);
      case 4: return score_dim<4>(key, q, group, dots);
      case 8: return score_dim<8>(key, q, group, dots);
    }
    for (long g = 0; g < group; ++g) {
      dots[g] = Floats{};
      for (long d = 0; d < dim; d += 32)
        dots[g] = (Floats)_mm512_dpbf16_ps((__m512)dots[g], load_pairs(key + d),
                                           load_pairs(q + g * dim + d));
    }
  }
  static void pack(const Floats* p, uint32_t* to, long width) {
    for (long t = 0; t < kQuad; t += 2) {
      const __m256i a = (__m256i)_mm512_cvtneps_pbh((__m512)p[t]);
      const __m256i b = (__m256i)_mm512_cvtneps_pbh((__m512)p[t + 1]);
      const __m512i both = _mm512_or_si512(_mm512_cvtepu16_epi32(a),
                                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
      _mm512_storeu_si512(to + t / 2 * width, both);
    }
  }
  static void add(const Bfloat16* const* values, const uint32_t* shares, long width, long group,
                  long dim, float* sums) {
    for (long d = 0; d < dim; d += 32) {
      __m512bh low[kQuad / 2], high[kQuad / 2];
      for (long t = 0; t < kQuad; t += 2) {
        const __m512i a = _mm512_loadu_si512(values[t] + d), b = _mm512_loadu_si512(values[t + 1] + d);
        low[t / 2] = (__m512bh)_mm512_unpacklo_epi16(a, b);
        high[t / 2] = (__m512bh)_mm512_unpackhi_epi16(a, b);
      }
      for (long g = 0; g < group; ++g) {
        float* mine = sums + g * padded(dim) + d;
        __m512 l = _mm512_loadu_ps(mine), h = _mm512_loadu_ps(mine + kLanes);
        for (long t = 0; t < kQuad / 2; ++t) {
          const __m512bh w = (__m512bh)_mm512_set1_epi32(int(shares[t * width + g]));
          l = _mm512_dpbf16_ps(l, low[t], w);
          h = _mm512_dpbf16_ps(h, high[t], w);
        }
        _mm512_storeu_ps(mine, l);
        _mm512_storeu_ps(mine + kLanes, h);
      }
    }
  }
  static void finish(const float* sums, float scale, long dim, Bfloat16* out) {
    for (long d = 0; d < dim; d += 32) {
      const Floats l = load(sums + d) * scale, h = load(sums + d + kLanes) * scale;
      store(out + d,
            __builtin_shufflevector(l, h, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
      store(out + d + kLanes, __builtin_shufflevector(l, h, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13,
                                                      14, 15, 28, 29, 30, 31));
    }
  }
};
#endif

// Views are described in elements. A row is one key head of one sequence.
struct Attention {
  const void* q;        // Row r: sequence r / kv_heads, queries (r % kv_heads) * group on.
  long sequence_stride;
  long kv_heads, group, dim;
  const void* context;  // [tokens, 2, rows, dim], tokens token_stride apart.
  long token_stride, tokens, rows;
  long first_row;       // The context's first row, among those of q.
  const int32_t* lengths;  // Of each sequence's prompt; slots from there to prompt_len are void.
  long prompt_len;
  float scale;
  void* out;            // [rows, group, dim]
};

// Some rows of the cache, attended by one thread. Tokens come in tiles; within one, the keys of
// all rows of a token are read where they lie side by side, then the values. Softmax is computed
// online, 16 queries to a vector.
template <class T, class Ops>
class Rows {
 public:
  Rows(const Attention& a, long begin, long end)
      : a_(a), begin_(begin), count_(end - begin), queries_(count_ * a.group),
        width_((queries_ + kLanes - 1) / kLanes * kLanes), q_(queries_ * a.dim), lengths_(width_),
        dots_(width_), scores_(kTile * width_), shares_(kTile / kQuad * Ops::kSharesPerQuad * width_),
        largest_(width_, kMinusInfinity), total_(width_), sums_(queries_ * padded(a.dim)) {
    for (long i = 0; i < width_; ++i) {
      const long row = begin + a.first_row + std::min(i, queries_ - 1) / a.group;
      const long sequence = row / a.kv_heads, head = row % a.kv_heads * a.group + i % a.group;
      lengths_[i] = a.lengths ? a.lengths[sequence] : int(a.prompt_len);
      if (i < queries_)
        Ops::copy_query(static_cast<const T*>(a.q) + sequence * a.sequence_stride + head * a.dim,
                        a.dim, &q_[i * a.dim]);
    }
  }

  void attend() {
    const T* keys = static_cast<const T*>(a_.context) + begin_ * a_.dim;
    for (long first = 0; first < a_.tokens; first += kTile) {
      const long count = std::min(kTile, a_.tokens - first);
      for (long t = 0; t < count; ++t) {
        const T* token = keys + (first + t) * a_.token_stride;
        score(token, token + std::min(kAhead, a_.tokens - 1 - first - t) * a_.token_stride,
              &scores_[t * width_]);
      }
      share(first, count);
      for (long t = 0; t < count; t += kQuad) {
        const T* tokens[kQuad];
        // What is missing from a quad has no share; the last token stands in.
        for (long i = 0; i < kQuad; ++i)
          tokens[i] = keys + (first + std::min(t + i, count - 1)) * a_.token_stride + a_.rows * a_.dim;
        const bool has_next = first + t + 2 * kQuad <= a_.tokens;
        add(tokens, tokens[0] + (has_next ? kQuad : 0) * a_.token_stride,
            &shares_[t / kQuad * Ops::kSharesPerQuad * width_]);
      }
    }
    for (long i = 0; i < queries_; ++i)
      Ops::finish(&sums_[i * padded(a_.dim)], 1.0f / total_[i], a_.dim,
                  static_cast<T*>(a_.out) + (begin_ * a_.group + i) * a_.dim);
  }

 private:
  // What is needed soon is fetched row by row, beside the arithmetic and not before it.
  void fetch(const T* row) const {
    for (long d = 0; d < a_.dim; d += 64 / long(sizeof(T))) __builtin_prefetch(row + d);
  }

  void score(const T* token, const T* next, float* scores) {
    for (long r = 0; r < count_; ++r) {
      fetch(next + r * a_.dim);
      Ops::score(token + r * a_.dim, &q_[r * a_.group * a_.dim], a_.group, a_.dim,
                 &dots_[r * a_.group]);
    }
    for (long i = 0; i < width_; i += kLanes) store(scores + i, sums_of(&dots_[i]) * a_.scale);
  }

  // Turns the tile's scores into shares, and fits what was summed so far to the new maximum.
  void share(long first, long count) {
    for (long i = 0; i < width_; i += kLanes) {
      const Ints length = load_raw<Ints>(&lengths_[i]);
      Floats p[kTile];
      const Floats before = load(&largest_[i]);
      Floats now = before;
      for (long t = 0; t < count; ++t) {
        const int slot = int(first + t);
        p[t] = load(&scores_[t * width_ + i]);
        if (slot < a_.prompt_len) p[t] = length > slot ? p[t] : splat(kMinusInfinity);
        now = now > p[t] ? now : p[t];
      }
      // Nothing was seen yet where the maximum is still minus infinity.
      const Floats origin = now == splat(kMinusInfinity) ? Floats{} : now;
      const Floats kept = exp_of(before - origin);
      Floats total = load(&total_[i]) * kept;
      for (long t = 0; t < kTile; ++t) {
        p[t] = t < count ? exp_of(p[t] - origin) : Floats{};
        total += p[t];
      }
      for (long t = 0; t < kTile; t += kQuad)
        Ops::pack(p + t, &shares_[t / kQuad * Ops::kSharesPerQuad * width_ + i], width_);
      store(&largest_[i], now);
      store(&total_[i], total);
      rescale(i, kept);
    }
  }

  void rescale(long first, Floats kept) {
    const long width = padded(a_.dim);
    for (long i = first; i < std::min(first + kLanes, queries_); ++i)
      if (kept[i - first] != 1.0f)
        for (long d = i * width; d < (i + 1) * width; d += kLanes)
          store(&sums_[d], load(&sums_[d]) * kept[i - first]);
  }

  void add(const T* const* tokens, const T* next, const typename Ops::Share* shares) {
    for (long r = 0; r < count_; ++r) {
      const T* values[kQuad];
      for (long t = 0; t < kQuad; ++t) {
        fetch(next + t * a_.token_stride + r * a_.dim);
        values[t] = tokens[t] + r * a_.dim;
      }
      Ops::add(values, shares + r * a_.group, width_, a_.group, a_.dim,
               &sums_[r * a_.group * padded(a_.dim)]);
    }
  }

  const Attention& a_;
  const long begin_, count_, queries_, width_;
  std::vector<typename Ops::Query> q_;
  std::vector<int32_t> lengths_;
  std::vector<Floats> dots_;
  std::vector<float> scores_;
  std::vector<typename Ops::Share> shares_;
  std::vector<float> largest_, total_, sums_;
};

template <class T, class Ops>
void attend(const Attention& a, int threads) {
  // As many chunks for every thread, all alike.
  const long wanted = (a.rows * a.group + kQueries - 1) / kQueries;
  const long chunks = std::min(a.rows, (wanted + threads - 1) / threads * threads);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long c = 0; c < chunks; ++c)
    Rows<T, Ops>(a, c * a.rows / chunks, (c + 1) * a.rows / chunks).attend();
}

}  // namespace
