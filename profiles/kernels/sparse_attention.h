// Attention of one decode step in which each query attends to the keys with the largest scores, so
// that of the values only those are read, and the newest. The mean of all stands for the others; where
// nobody keeps their sum, all are read for it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "attention.h"

namespace {

// Floats as whole numbers of the same order.
inline Ints ordered(Floats x) {
  const Ints bits = bit_cast<Ints>(x);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

// Returns a number that `kept` of the values reach, or more where several equal the least of them.
// Bisects over all floats: each step is a pass over values that are in the first-level cache.
inline int least_of_largest(const std::vector<Ints>& values, long kept, int most) {
  int64_t low = INT32_MIN, high = most;
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    Ints counts{};
    for (const Ints& v : values) counts -= v >= int(middle);
    const long reached = long(sum(as_floats(counts)));
    if (reached == kept) return int(middle);
    if (reached > kept) low = middle;
    else high = middle - 1;
  }
  return int(low);
}

template <class T, class Ops, class Cache>
class SparseRow : Scorer<T, Ops, Cache> {
  using Base = Scorer<T, Ops, Cache>;
  using Base::a_, Base::cache_, Base::tokens_, Base::width_;

 public:
  explicit SparseRow(const Attention& a)
      : Base(a), sums_(a.group * Wide<T>::padded(a.dim)), dropped_(a.group), total_(a.group),
        all_(a.dim) {}

  void attend(long row, long following) {
    Base::start(row, following);
    tiles_ = (tokens_ + kTile - 1) / kTile;
    shares_.resize(a_.group * tiles_ * kTile), order_.resize(tiles_);
    const long stride = tiles_ * kTile, width = Wide<T>::padded(a_.dim);
    long seen = 0;
    for (long first = 0; first < tokens_; first += kTile) {
      const long count = std::min(kTile, tokens_ - first);
      cache_.take_keys(first, count);
      Base::score_tile(first, count, &shares_[first], stride);
      const Ints is_seen = Base::seen(first, count);
      for (long i = 0; i < kLanes; ++i) seen -= is_seen[i];
      for (long g = 0; g < a_.group; ++g) {
        float* scores = &shares_[g * stride + first];
        store(scores, select(is_seen, load(scores), broadcast(kMinusInfinity)));
      }
    }
    for (long g = 0; g < a_.group; ++g) choose(g, &shares_[g * stride], seen);
    add(stride, width);
    add_mean(sum_values(row), seen, width);
    T* out = static_cast<T*>(a_.out) + row * a_.group * a_.value_dim;
    for (long g = 0; g < a_.group; ++g)
      Wide<T>::finish(&sums_[g * width], 1.0f / total_[g], a_.value_dim, out + g * a_.value_dim);
  }

 private:
  // Turns the scores of a query into shares, zero but for the largest.
  void choose(long g, float* scores, long seen) {
    // Rounded up, whatever the product lost.
    const long wanted = long(std::ceil(double(seen) * a_.sparsity - 1e-9));
    const long kept = std::min(std::max(wanted, 1L), seen);
    Floats most = broadcast(kMinusInfinity), chosen{}, dropped{};
    for (long i = 0; i < tiles_; ++i) {
      const Floats v = load(scores + i * kTile);
      most = larger(most, v);
      order_[i] = ordered(v);
    }
    const float highest = largest(most), sink = Base::sinks_ ? Base::sinks_[g] : kMinusInfinity;
    const int least = least_of_largest(order_, kept, ordered(broadcast(highest))[0]);
    const float origin = std::max(highest, sink);
    for (long i = 0; i < tiles_; ++i) {
      const Floats shares = exp_of(load(scores + i * kTile) - origin);
      const Ints is_chosen = order_[i] >= least;
      const Floats kept_shares = select(is_chosen, shares, Floats{});
      store(scores + i * kTile, kept_shares);
      chosen += kept_shares;
      dropped += select(is_chosen, Floats{}, shares);
    }
    dropped_[g] = sum(dropped);
    total_[g] = sum(chosen) + dropped_[g] + exp_of(broadcast(sink - origin))[0];
  }

  void add(long stride, long width) {
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (long t = 0; t < tokens_; ++t) {
      bool is_chosen = false;
      for (long g = 0; g < a_.group; ++g) is_chosen |= shares_[g * stride + t] > 0;
      if (!is_chosen) continue;
      const T* value = cache_.value(t);
      for (long g = 0; g < a_.group; ++g) {
        const float share = shares_[g * stride + t];
        if (share == 0) continue;
        float* sums = &sums_[g * width];
        for (long d = 0; d < a_.value_dim; d += kLanes)
          store(sums + d, load(sums + d) + load_part(value + d, a_.dim - d) * share);
      }
    }
  }

  // Returns the sum of the values seen, to which only the newest is new but in the first step.
  const float* sum_values(long row) {
    const long sequence = a_.sequence_of(row);
    const bool is_new = !a_.value_sums || (a_.begins && a_.begins[sequence]);
    if (a_.sums_at) row = a_.sums_at[sequence] * a_.kv_heads + row % a_.kv_heads;
    float* to = a_.value_sums ? a_.value_sums + row * a_.dim : all_.data();
    if (is_new) std::fill(to, to + a_.dim, 0.0f);
    for (long t = is_new ? 0 : tokens_ - 1; t < tokens_; ++t) {
      if (Base::is_void(t)) continue;
      const T* value = cache_.value(t);
      for (long d = 0; d < a_.value_dim; d += kLanes)
        store_part(to + d, load_part(to + d, a_.dim - d) + load_part(value + d, a_.dim - d),
                   a_.dim - d);
    }
    return to;
  }

  void add_mean(const float* all, long seen, long width) {
    for (long g = 0; g < a_.group; ++g)
      for (long d = 0; d < a_.value_dim; ++d) sums_[g * width + d] += dropped_[g] / seen * all[d];
  }

  long tiles_ = 0;  // Of the row.
  std::vector<float> shares_;  // [group, tiles x tokens]; the scores, before one chooses.
  std::vector<float> sums_, dropped_, total_;
  std::vector<float> all_;
  std::vector<Ints> order_;
};

}  // namespace
