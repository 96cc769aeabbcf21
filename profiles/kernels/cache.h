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
  const uint8_t* begins;  // Of which sequences nothing has been summed yet; null: of none.
  long value_dim;       // Elements of a value, the first ones; at most dim.
  long head_splits;     // Adjacent rows of q and out that share a row of the context.
  // Of a context in pages, [pages, rows of a sequence, 2 or 1, page_tokens, dim]:
  const int32_t* tables;  // The pages of each sequence in order, or null: there are no pages.
  long table_stride;
  long page_tokens, page_stride;  // No tile of tokens lies on two pages.
  const int32_t* lengths;  // Tokens of each sequence, or null: `tokens` of each.
  const int32_t* order;    // The sequences as they are taken, or null: one after another.
  const int32_t* sums_at;  // The place of each sequence in value_sums, or null: its own number.
  float* carry;         // [rows, group, padded dim + 2 kLanes], what was attended before; or null.
  int keeps_carry;      // It is written in place of out, rather than read.

  long sequence_of(long row) const { return (first_row + row) / kv_heads; }
  long tokens_of(long row) const { return lengths ? lengths[sequence_of(row)] : tokens; }
  long row_at(long place) const {
    return order ? order[place / kv_heads] * kv_heads + place % kv_heads : place;
  }
};

// Where the tokens of one row lie.
template <class T>
class Place {
 public:
  Place(const Attention& a, long row) : a_(&a) {
    if (a.tables) table_ = a.tables + row / a.kv_heads * a.table_stride, row %= a.kv_heads;
    row_ = static_cast<const T*>(a.context) + row / a.head_splits * a.row_stride;
  }
  const T* operator[](long token) const {
    const T* page = row_;
    if (table_) page += table_[token / a_->page_tokens] * a_->page_stride, token %= a_->page_tokens;
    return page + token * a_->token_stride;
  }

 private:
  const Attention* a_;
  const int32_t* table_ = nullptr;
  const T* row_;
};

// The rows that are read now and next, tile by tile.
template <class T>
class Places {
 public:
  explicit Places(const Attention& a) : a_(a), now_(a, 0), following_(a, 0) {}

  void start(long row, long following) {
    now_ = {a_, row}, following_ = {a_, following};
    tokens_ = a_.tokens_of(row);
  }
  const T* operator[](long token) const { return now_[token]; }
  // What is read after the tile from `first` on.
  const T* after(long first) const {
    return first + kTile < tokens_ ? now_[first + kTile] : following_[0];
  }

 private:
  const Attention& a_;
  Place<T> now_, following_;
  long tokens_ = 0;
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
  explicit PlainCache(const Attention& a) : a_(a), places_(a) {}

  void start(long row, long following) { places_.start(row, following); }
  void take(long first, long count) {
    const T* tile = places_[first];
    keys = {tile, a_.token_stride, count - 1};
    values = {tile + a_.value_stride, a_.token_stride, count - 1};
    next_ = places_.after(first);
  }
  void take_keys(long first, long count) { take(first, count); }
  INLINE void fetch_key(long t) const {
    fetch(next_ + t * a_.token_stride, kIsPacked ? 64 : a_.dim * long(sizeof(T)));
  }
  // Of a constant number of bytes, so that the loop around it can be unrolled.
  INLINE void fetch_value(long t, long d, long dims) const {
    const T* value = next_ + a_.value_stride + t * a_.token_stride;
    fetch(kIsPacked ? value + d / 2 : value + d, kIsPacked ? dims / 2 : dims * long(sizeof(T)));
  }
  const T* value(long token) { return places_[token] + a_.value_stride; }

  // Of the tile taken last.
  Tokens<T> keys{}, values{};

 private:
  static constexpr bool kIsPacked = std::is_same_v<T, uint8_t>;
  const Attention& a_;
  Places<T> places_;
  const T* next_ = nullptr;
};

// Unpacked, a tile is small enough to stay in the first-level cache.
template <class T>
class PackedCache {
 public:
  using Element = T;
  explicit PackedCache(const Attention& a)
      : a_(a), packing_{a.dim, a.group_size, a.bits}, row_bytes_(packing_.row_bytes()), places_(a),
        keys_(kTile * a.dim), values_(kTile * a.dim) {}

  void start(long row, long following) { places_.start(row, following); }
  void take(long first, long count) {
    take_keys(first, count);
    values = a_.value_stride ? unpack(first, count, a_.value_stride, values_.data()) : keys;
  }
  void take_keys(long first, long count) { keys = unpack(first, count, 0, keys_.data()); }
  void fetch_key(long) const {}
  void fetch_value(long, long, long) const {}
  const T* value(long token) {
    unpack_part(packing_, places_[token] + a_.value_stride, 0, a_.dim, values_.data());
    return values_.data();
  }

  Tokens<T> keys{}, values{};

 private:
  Tokens<T> unpack(long first, long count, long offset, T* to) const {
    const uint8_t *tile = places_[first] + offset, *next = places_.after(first) + offset;
    for (long t = 0; t < count; ++t) {
      fetch(next + t * a_.token_stride, row_bytes_);
      unpack_part(packing_, tile + t * a_.token_stride, 0, a_.dim, to + t * a_.dim);
    }
    return {to, a_.dim, count - 1};
  }

  const Attention& a_;
  const Packing packing_;
  const long row_bytes_;
  Places<uint8_t> places_;
  LineAligned<T> keys_, values_;
};

}  // namespace
