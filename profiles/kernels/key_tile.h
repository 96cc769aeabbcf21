// A prompt as its attention is told of it, and its keys and values, tile by tile.
#pragma once

#include <algorithm>
#include <limits>

#include "vectors.h"

namespace {

// Views are described in elements.
struct KeyRun {
  const void *keys, *values;  // [tokens, heads, dim], or [pages, heads, page_tokens, dim].
  long key_stride, value_stride;            // From a token to the next, of the run or of its page.
  long key_head_stride, value_head_stride;
  const int32_t* table;  // The run's pages in order, or null.
  long key_page_stride, value_page_stride, page_tokens;
  long tokens;
};

struct Prompt {
  const void* q;  // [tokens, kv_heads * group, dim]
  long q_stride, q_head_stride;
  void* out;      // [tokens, kv_heads * group, value_dim]
  long out_stride, out_head_stride;
  long tokens, kv_heads, group, dim, value_dim;
  const KeyRun* runs;  // In the order of their positions.
  long num_runs;
  long first_position, first_key;  // Of the queries, and of the runs.
  long window;       // 0 hides no key.
  int is_chunked;    // The keys from the last multiple of window on are seen.
  float scale;
  float soft_cap;    // c in c tanh(score / c); 0 leaves the scores.
  const float* sinks;   // A score of each query head that has no value, or null.
  const float* slopes;  // What each query head's scores lose for each token in between, or null.

  long rows() const { return tokens * group; }  // Queries of a key head.
  long position_of(long row) const { return first_position + std::min(row / group, tokens - 1); }
  long first_seen(long position) const {
    if (!window) return 0;
    return is_chunked ? position - position % window : std::max(0L, position - window + 1);
  }
};

constexpr long kPanel = 3 * kLanes;  // Queries side by side.
constexpr long kKeys = 64;           // Of a tile.
constexpr long kMostPanels = 4;      // They share a tile's keys, as they are converted.

// What is multiplied at once: kAtOnce sums of three vectors, which fill the registers.
#if defined(__AVX512F__)
typedef Floats Columns;
constexpr long kAtOnce = 8;
#else
typedef Narrow Columns;
constexpr long kAtOnce = 4;
#endif
typedef decltype(Columns{} < Columns{}) Places;  // As many whole numbers.
constexpr long kWidth = sizeof(Columns) / sizeof(float), kColumns = 3 * kWidth;
constexpr float kHidden = -std::numeric_limits<float>::infinity();  // The score of what is not seen.

// One tile of the keys and values of a head, in float32.
template <class T>
class KeyTile {
 public:
  explicit KeyTile(const Prompt& p)
      : p_(p), value_dim_((p.value_dim + kLanes - 1) / kLanes * kLanes), keys_(kKeys * p.dim),
        values_(kKeys * value_dim_) {}

  // The tokens of [tile, tile + kKeys) before `end`, and as many zeros as are scored with them.
  void take(long head, long tile, long end) {
    const KeyRun* run = p_.runs;
    long begins = p_.first_key;  // Position of the run's first token.
    const long count = std::min(kKeys, (end - tile + kAtOnce - 1) / kAtOnce * kAtOnce);
    for (long k = 0; k < count; ++k) {
      const long position = tile + k;
      if (position < p_.first_key || position >= end) {
        put<T>(k, nullptr, nullptr);
        continue;
      }
      while (position >= begins + run->tokens) begins += run->tokens, ++run;
      long token = position - begins, page = 0;
      if (run->table) page = run->table[token / run->page_tokens], token %= run->page_tokens;
      put(k,
          static_cast<const T*>(run->keys) + page * run->key_page_stride +
              token * run->key_stride + head * run->key_head_stride,
          static_cast<const T*>(run->values) + page * run->value_page_stride +
              token * run->value_stride + head * run->value_head_stride);
    }
  }
  // [kKeys, dim]
  const float* keys() const { return keys_.data(); }
  // [dims / kAtOnce, kKeys, kAtOnce]
  const float* values() const { return values_.data(); }

 private:
  template <class E>
  void put(long k, const E* key, const E* value) {
    for (long d = 0; d < p_.dim; d += kLanes) {
      const long count = p_.dim - d;
      store_part(keys_.data() + k * p_.dim + d, key ? load_part(key + d, count) : Floats{}, count);
    }
    for (long d = 0; d < p_.value_dim; d += kLanes) {
      const Floats v = value ? load_part(value + d, p_.value_dim - d) : Floats{};
      for (long i = 0; i < kLanes; i += kAtOnce)
        std::memcpy(values_.data() + (d + i) * kKeys + k * kAtOnce,
                    reinterpret_cast<const float*>(&v) + i, kAtOnce * sizeof(float));
    }
  }

  const Prompt& p_;
  const long value_dim_;
  LineAligned<float> keys_, values_;
};

}  // namespace
