// Causal attention of the tokens of a prompt. The queries that share a key head are the lanes of
// vectors, 48 of them a panel: adjacent tokens with all query heads of the group. One thread takes some
// panels of one key head past the keys, one tile after another: a tile is scored, then its values are
// added. Tiles begin at multiples of their size, and nothing is summed across lanes. So a token's
// result depends neither on the tokens beside it, nor on how its keys are cut, nor on threads.
#pragma once

#include <algorithm>
#include <deque>

#include "functions.h"
#include "key_tile.h"
#include "reductions.h"
#include "transpose.h"

namespace {

// Sums over n of a[i * stride + n * step] * b[n][lane], for kAtOnce i and a panel's lanes; `finish` is
// given each vector of them.
template <class F>
INLINE inline void multiply_panel(const float* a, long stride, long step, const float* b,
                                  long count, F finish) {
  for (long lane = 0; lane < kPanel; lane += kColumns) {
    Columns sums[kAtOnce * 3] = {};
    for (long n = 0; n < count; ++n) {
      Columns columns[3];
      repeat<3>([&](auto c) INLINE {
        columns[c] = load_raw<Columns>(b + n * kPanel + lane + c * kWidth);
      });
      repeat<kAtOnce>([&](auto i) INLINE {
        const Columns factor = a[i * stride + n * step] - Columns{};
        repeat<3>([&](auto c) INLINE { sums[i * 3 + c] += columns[c] * factor; });
      });
    }
    repeat<kAtOnce>([&](auto i) INLINE {
      repeat<3>([&](auto c) INLINE { finish(i, lane + c * kWidth, sums[i * 3 + c]); });
    });
  }
}

// 48 queries of one key head, and what they have attended to so far.
template <class T>
class Panel {
 public:
  explicit Panel(const Prompt& p)
      : p_(p), value_dim_((p.value_dim + kLanes - 1) / kLanes * kLanes), q_(p.dim * kPanel),
        sums_(value_dim_ * kPanel), scores_(kKeys * kPanel) {}

  // Takes the queries from `row` on.
  void begin(long head, long row) {
    head_ = head, row_ = row;
    count_ = std::min(kPanel, p_.rows() - row);
    position_ = p_.position_of(row), last_ = p_.position_of(row + count_ - 1);
    for (long i = 0; i < kPanel; ++i) {
      const long position = p_.position_of(row + i), member = head * p_.group + (row + i) % p_.group;
      positions_[i] = position, first_seen_[i] = p_.first_seen(position);
      largest_[i] = p_.sinks ? p_.sinks[member] : kHidden;
      // A sink is the first score, and adds nothing to the values.
      total_[i] = p_.sinks ? 1.0f : 0.0f;
      slopes_[i] = p_.slopes ? p_.slopes[member] : 0.0f;
    }
    take_queries();
    std::fill(sums_.data(), sums_.data() + value_dim_ * kPanel, 0.0f);
  }

  // Where its first key is, and one past its last.
  long first_key() const { return std::max(p_.first_seen(position_), p_.first_key); }
  long end() const { return last_ + 1; }

  void attend(const KeyTile<T>& tile, long first) {
    const long count = std::min(kKeys, end() - first);
    if (count <= 0 || first + kKeys <= first_key()) return;
    for (long k = 0; k < count; k += kAtOnce)
      multiply_panel(tile.keys() + k * p_.dim, p_.dim, 1, q_.data(), p_.dim,
                     [&](long i, long lane, Columns dots) INLINE {
                       std::memcpy(scores_.data() + (k + i) * kPanel + lane, &dots, sizeof dots);
                     });
    adjust(first, count);
    for (long lane = 0; lane < kPanel; lane += kWidth) share(lane, count);
    for (long d = 0; d < p_.value_dim; d += kAtOnce)
      multiply_panel(
          tile.values() + d * kKeys, 1, kAtOnce, scores_.data(), count,
          [&](long i, long lane, Columns added) INLINE {
            float* to = sums_.data() + (d + i) * kPanel + lane;
            const Columns sum = load_raw<Columns>(to) * load_raw<Columns>(kept_ + lane) + added;
            std::memcpy(to, &sum, sizeof sum);
          });
  }

  void finish() {
    for (long lane = 0; lane < kPanel; lane += kLanes) {
      const Floats scale = 1.0f / load(total_ + lane);
      for (long d = 0; d < p_.value_dim; d += kLanes) {
        Floats block[kLanes];
        for (long i = 0; i < kLanes; ++i)
          block[i] = load(sums_.data() + (d + i) * kPanel + lane) * scale;
        transpose(block);
        for (long i = 0; i < kLanes && lane + i < count_; ++i)
          store_part(static_cast<T*>(p_.out) + offset(lane + i, p_.out_stride, p_.out_head_stride) + d,
                     block[i], p_.value_dim - d);
      }
    }
  }

 private:
  long offset(long i, long stride, long head_stride) const {
    const long row = row_ + i;
    return row / p_.group * stride + (head_ * p_.group + row % p_.group) * head_stride;
  }

  void take_queries() {
    for (long lane = 0; lane < kPanel; lane += kLanes)
      for (long d = 0; d < p_.dim; d += kLanes) {
        Floats block[kLanes] = {};
        for (long i = 0; i < kLanes && lane + i < count_; ++i)
          block[i] = load_part(static_cast<const T*>(p_.q) +
                                   offset(lane + i, p_.q_stride, p_.q_head_stride) + d,
                               p_.dim - d) * p_.scale;
        transpose(block);
        for (long i = 0; i < std::min(kLanes, p_.dim - d); ++i)
          store(q_.data() + (d + i) * kPanel + lane, block[i]);
      }
  }

  // Caps the scores of the tile from `first` on, adds what distances add, and hides what is not seen.
  void adjust(long first, long count) {
    const bool is_seen = first + count - 1 <= position_ && first >= p_.first_key &&
                         first >= p_.first_seen(last_);
    if (is_seen && !p_.slopes && p_.soft_cap <= 0) return;
    for (long k = 0; k < count; ++k)
      for (long lane = 0; lane < kPanel; lane += kWidth) {
        float* home = scores_.data() + k * kPanel + lane;
        const auto position = load_raw<Places>(positions_ + lane), key = Places{} + int(first + k);
        auto score = load_raw<Columns>(home);
        if (p_.soft_cap > 0) score = tanh_of(score / p_.soft_cap) * p_.soft_cap;
        if (p_.slopes)
          score +=
              __builtin_convertvector(key - position, Columns) * load_raw<Columns>(slopes_ + lane);
        const Places seen = (key <= position) & (key >= load_raw<Places>(first_seen_ + lane)) &
                            (key >= int(p_.first_key));
        score = select(seen, score, Columns{} + kHidden);
        std::memcpy(home, &score, sizeof score);
      }
  }

  // Turns the scores of some lanes into shares; what was summed is fitted to the largest score.
  void share(long lane, long count) {
    float* home = scores_.data() + lane;
    const auto before = load_raw<Columns>(largest_ + lane);
    Columns now = before, total{};
    for (long k = 0; k < count; ++k) {
      const auto score = load_raw<Columns>(home + k * kPanel);
      now = larger(now, score);
    }
    // Nothing was seen yet where the maximum is still minus infinity.
    const Columns origin = select(now == Columns{} + kHidden, Columns{}, now);
    const Columns kept = exp_of(before - origin);
    for (long k = 0; k < count; ++k) {
      const Columns shares = exp_of(load_raw<Columns>(home + k * kPanel) - origin);
      std::memcpy(home + k * kPanel, &shares, sizeof shares);
      total += shares;
    }
    total += load_raw<Columns>(total_ + lane) * kept;
    std::memcpy(kept_ + lane, &kept, sizeof kept);
    std::memcpy(largest_ + lane, &now, sizeof now);
    std::memcpy(total_ + lane, &total, sizeof total);
  }

  const Prompt& p_;
  const long value_dim_;
  long head_ = 0, row_ = 0, count_ = 0;
  long position_ = 0, last_ = 0;  // Of the first and of the last query.
  int positions_[kPanel], first_seen_[kPanel];
  float largest_[kPanel], total_[kPanel], slopes_[kPanel];
  float kept_[kPanel];  // What the tile before leaves of the sums.
  LineAligned<float> q_, sums_;  // [dim, kPanel], [value_dim, kPanel].
  LineAligned<float> scores_;    // [kKeys, kPanel], of one tile.
};

template <class T>
void prompt_attention(const Prompt& p, int threads) {
  const long panels = (p.rows() + kPanel - 1) / kPanel;
  // Enough parts for all threads to end together.
  const long at_once = std::max(1L, std::min(kMostPanels, panels * p.kv_heads / (4 * threads)));
  const long blocks = (panels + at_once - 1) / at_once;
#pragma omp parallel num_threads(threads)
  {
    KeyTile<T> tile(p);
    std::deque<Panel<T>> block;
    for (long i = 0; i < at_once; ++i) block.emplace_back(p);
    // The last tokens see most keys, and are taken first.
#pragma omp for schedule(dynamic)
    for (long part = 0; part < blocks * p.kv_heads; ++part) {
      const long head = part % p.kv_heads, first = (blocks - 1 - part / p.kv_heads) * at_once;
      const long count = std::min(at_once, panels - first);
      for (long i = 0; i < count; ++i) block[i].begin(head, (first + i) * kPanel);
      const long end = block[count - 1].end();
      for (long key = block[0].first_key() / kKeys * kKeys; key < end; key += kKeys) {
        tile.take(head, key, end);
        for (long i = 0; i < count; ++i) block[i].attend(tile, key);
      }
      for (long i = 0; i < count; ++i) block[i].finish();
    }
  }
}

}  // namespace
