// The cache as one row of it is read: in its stored form, or unpacked tile by tile.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "arithmetic.h"
#include "groups.h"

namespace {

// Views are described in elements; a packed context's in bytes.
struct Attention {
  const void* q;        // Row r: sequence r / kv_heads, queries (r % kv_heads) * group on.
  long sequence_stride;
  long kv_heads, group, dim;
  const void* context;  // [tokens, 2, rows, dim]: keys, then values; or [tokens, 1, rows, dim].
  long token_stride;
  long value_stride;    // From a key to its value; 0 where the value is a part of the key.
  long row_stride;
  long tokens, rows;    // Rows of q and out, which may share rows of the context.
  long first_row;       // The context's first row, among those of q.
  const int32_t* void_slots;  // First and end of each sequence's void slots, or null.
  float scale;
  float soft_cap;       // c in c tanh(score / c); 0 leaves the scores.
  const float* sinks;   // A score of each query head that has no value, or null.
  const float* slopes;  // What each query head's scores lose for each token in between, or null.
  void* out;            // [rows, group, value_dim]
  long group_size;      // Of a packed context, whose rows are those of groups.h.
  int bits;             // 0 where it is not packed.
  double sparsity;      // Fraction of the slots seen that a query attends to.
  float* value_sums;    // [rows, dim], value_dim of each row, of the slots seen before, or null: they are summed anew.
  int begins;           // Nothing has been summed yet.
  long value_dim;       // Elements of a value, the first ones; at most dim.
  long head_splits;     // Adjacent rows of q and out that share a row of the context.
};

// Keys or values of some tokens of one row, `stride` apart; past the last one, it stands in.
template <class T>
struct Tokens {
  const T* first;
  long stride, last;
  const T* operator[](long t) const { return first + std::min(t, last) * stride; }
};

// In its stored form: elements, or packed bytes.
template <class T>
class PlainCache {
 public:
  using Element = T;
  explicit PlainCache(const Attention& a) : a_(a) {}

  void start(long row, bool is_last) {
    row_ = static_cast<const T*>(a_.context) + row * a_.row_stride;
    following_ = row_ + (is_last ? 0 : a_.row_stride);
  }
  void take(long first, long count) {
    const T* tile = row_ + first * a_.token_stride;
    keys = {tile, a_.token_stride, count - 1};
    values = {tile + a_.value_stride, a_.token_stride, count - 1};
    next_ = first + kTile < a_.tokens ? tile + kTile * a_.token_stride : following_;
  }
  void take_keys(long first, long count) { take(first, count); }
  void fetch_key(long t) const {
    fetch(next_ + t * a_.token_stride, kIsPacked ? 64 : a_.dim * long(sizeof(T)));
  }
  // Of a constant number of bytes, so that the loop around it can be unrolled.
  void fetch_value(long t, long d, long dims) const {
    const T* value = next_ + a_.value_stride + t * a_.token_stride;
    fetch(kIsPacked ? value + d / 2 : value + d, kIsPacked ? dims / 2 : dims * long(sizeof(T)));
  }
  const T* value(long token) { return row_ + token * a_.token_stride + a_.value_stride; }

  // Of the tile taken last.
  Tokens<T> keys{}, values{};

 private:
  static constexpr bool kIsPacked = std::is_same_v<T, uint8_t>;
  const Attention& a_;
  const T* row_ = nullptr;
  const T* following_ = nullptr;
  const T* next_ = nullptr;
};

// Unpacked, a tile is small enough to stay in the first-level cache.
template <class T>
class PackedCache {
 public:
  using Element = T;
  explicit PackedCache(const Attention& a)
      : a_(a), packing_{a.dim, a.group_size, a.bits},
        row_bytes_(packing_.row_bytes()), keys_(kTile * a.dim),
        values_(kTile * a.dim) {}

  void start(long row, bool) {
    row_ = static_cast<const uint8_t*>(a_.context) + row * a_.row_stride;
  }
  void take(long first, long count) {
    take_keys(first, count);
    values = keys;
    if (a_.value_stride == 0) return;
    for (long t = 0; t < count; ++t)
      unpack(at(first + t) + a_.value_stride, values_.data() + t * a_.dim);
    values = {values_.data(), a_.dim, count - 1};
  }
  void take_keys(long first, long count) {
    for (long t = 0; t < count; ++t) unpack(at(first + t), keys_.data() + t * a_.dim);
    keys = {keys_.data(), a_.dim, count - 1};
  }
  void fetch_key(long) const {}
  void fetch_value(long, long, long) const {}
  const T* value(long token) {
    unpack_part(packing_, at(token) + a_.value_stride, 0, a_.dim, values_.data());
    return values_.data();
  }

  Tokens<T> keys{}, values{};

 private:
  const uint8_t* at(long token) const { return row_ + token * a_.token_stride; }
  void unpack(const uint8_t* packed, T* to) const {
    fetch(packed + kTile * a_.token_stride, row_bytes_);
    unpack_part(packing_, packed, 0, a_.dim, to);
  }

  const Attention& a_;
  const Packing packing_;
  const long row_bytes_;
  const uint8_t* row_ = nullptr;
  LineAligned<T> keys_, values_;
};

}  // namespace
