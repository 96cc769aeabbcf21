// Attention of one decode step over a cache in its stored order, or in pages. A row is one key head of one
// sequence. One thread attends to it, one tile of tokens after another: its keys are scored against
// all queries that share them, then its values are added with the sums in registers. Results depend
// neither on the number of threads nor on strides. Fastest where the tokens of a row are adjacent.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "arithmetic.h"
#include "cache.h"
#include "functions.h"

namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Scores, and vectors of values, that are summed at once; queries that share a key or value once it is
// loaded. Registers of AVX-512 and AVX2 hold the sums.
#if defined(__AVX512F__)
constexpr long kScored = kLanes, kSummed = 8, kMostQueries = 8;
#else
constexpr long kScored = 4, kSummed = 4, kMostQueries = 4;
#endif

// Scores the queries that share a row's keys, tile by tile.
template <class T, class Ops, class Cache>
class Scorer {
 protected:
  explicit Scorer(const Attention& a)
      : a_(a), cache_(a), width_(Ops::padded(a.dim)), kept_(a.group * width_) {}

  // After this row the thread reads the `following` one.
  void start(long row, long following) {
    const long sequence = a_.sequence_of(row);
    const long head = (a_.first_row + row) % a_.kv_heads;
    q_ = Ops::queries(static_cast<const T*>(a_.q) + sequence * a_.sequence_stride +
                          head * a_.group * a_.dim,
                      a_.group, a_.dim, kept_.data());
    if (a_.void_slots) {
      void_from_ = a_.void_slots[2 * sequence];
      void_end_ = a_.void_slots[2 * sequence + 1];
    }
    sinks_ = a_.sinks ? a_.sinks + head * a_.group : nullptr;
    slopes_ = a_.slopes ? a_.slopes + head * a_.group : nullptr;
    tokens_ = a_.tokens_of(row);
    cache_.start(row, following);
  }

  // Which tokens of the tile from `first` on are there, and not void.
  Ints seen(long first, long count) const {
    const Ints slot = kIota + int(first);
    const Ints before = slot < int(void_from_), behind = slot >= int(void_end_);
    return (kIota < int(count)) & (void_from_ > void_end_ ? before & behind : before | behind);
  }
  bool is_void(long slot) const {
    const bool from = slot >= void_from_, to_end = slot < void_end_;
    return void_from_ > void_end_ ? from || to_end : from && to_end;
  }

  // Queries are taken kMostQueries, four, two and one at a time, so that what belongs to them stays in
  // registers.
  template <class F>
  void in_blocks(F&& work) const {
    long g = 0;
    for (; g + kMostQueries <= a_.group; g += kMostQueries)
      work(std::integral_constant<long, kMostQueries>(), g);
    if (a_.group - g >= 4) work(std::integral_constant<long, 4>(), g), g += 4;
    if (a_.group - g >= 2) work(std::integral_constant<long, 2>(), g), g += 2;
    if (a_.group - g >= 1) work(std::integral_constant<long, 1>(), g);
  }

  // Scores the tile from `first` on, whose `count` keys were taken; query g's go to `to` + g * stride.
  void score_tile(long first, long count, float* to, long stride) {
    in_blocks([&](auto size, long g) { score<size.value>(g, count, to + g * stride, stride); });
    if (!slopes_) return;
    // Tokens from the newest back to each: slots before the void ones are that much nearer.
    const Ints slot = kIota + int(first);
    const Ints nearer = (slot < int(void_from_)) & int(void_end_ - void_from_);
    const Floats places = as_floats(slot - int(tokens_ - 1) + nearer);
    for (long g = 0; g < a_.group; ++g)
      store(to + g * stride, load(to + g * stride) + places * slopes_[g]);
  }

  // Sixteen scores at a time: of kQueries queries and as many tokens as that leaves.
  template <long kQueries>
  void score(long g, long count, float* to, long stride) {
    constexpr long kTokens = kLanes / kQueries;
    const typename Ops::Query* q = q_ + g * width_;
    for (long t = 0; t < count; t += kTokens) {
      const typename Cache::Element* keys[kTokens];
      repeat<kTokens>([&](auto i) INLINE { keys[i] = cache_.keys[t + i]; });
      for (long i = 0; g == 0 && i < kTokens; ++i) cache_.fetch_key(t + i);
      Floats dots[kLanes];
      repeat<kLanes / kScored>([&](auto part) INLINE {
        constexpr long kParts = kScored / kQueries, from = part * kParts;
        Floats own[kScored] = {};
        for (long d = 0; d < a_.dim; d += Ops::kKeyDims)
          Ops::template multiply<kQueries, kParts>(keys + from, q, width_, d, a_.dim - d, own);
        repeat<kScored>([&](auto i) INLINE {
          dots[i / kParts * kTokens + from + i % kParts] = own[i];
        });
      });
      Floats scores = sums_of(dots) * a_.scale;
      if (a_.soft_cap > 0) scores = tanh_of(scores / a_.soft_cap) * a_.soft_cap;
      for (long i = 0; i < kQueries; ++i)
        std::memcpy(to + i * stride + t, reinterpret_cast<const float*>(&scores) + i * kTokens,
                    kTokens * sizeof(float));
    }
  }

  const Attention& a_;
  Cache cache_;
  const long width_;
  long tokens_ = 0;  // Of the row.
  long void_from_ = 0, void_end_ = 0;
  const float *sinks_ = nullptr, *slopes_ = nullptr;  // Of the row's queries.
  const typename Ops::Query* q_ = nullptr;
  std::vector<typename Ops::Query> kept_;
};

template <class T, class Ops, class Cache>
class Row : Scorer<T, Ops, Cache> {
  using Base = Scorer<T, Ops, Cache>;
  using Base::a_, Base::cache_, Base::tokens_, Base::width_;

 public:
  explicit Row(const Attention& a)
      : Base(a), scores_(a.group * kTile), shares_(a.group * kTile), largest_(a.group),
        sums_(a.group * width_), total_(a.group) {}

  void attend(long row, long following) {
    Base::start(row, following);
    begin(row);
    for (long first = 0; first < tokens_; first += kTile) {
      count_ = std::min(kTile, tokens_ - first);
      cache_.take(first, count_);
      const Ints is_seen = Base::seen(first, count_);
      Base::score_tile(first, count_, scores_.data(), kTile);
      for (long g = 0; g < a_.group; ++g) share(g, is_seen);
      Base::in_blocks([&](auto size, long g) { add<size.value>(g); });
    }
    if (a_.keeps_carry) return keep(row);
    T* out = static_cast<T*>(a_.out) + row * a_.group * a_.value_dim;
    for (long g = 0; g < a_.group; ++g)
      Ops::finish(&sums_[g * width_], 1.0f / sum(total_[g]), a_.value_dim,
                  out + g * a_.value_dim);
  }

 private:
  void begin(long row) {
    // A sink is the first score, and adds nothing to the values.
    for (long g = 0; g < a_.group; ++g) {
      largest_[g] = Base::sinks_ ? Base::sinks_[g] : kMinusInfinity;
      total_[g] = Floats{Base::sinks_ ? 1.0f : 0.0f};
    }
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (long g = 0; a_.carry && !a_.keeps_carry && g < a_.group; ++g) {
      const float *sums = carry(row, g), *total = sums + width_, *rest = total + kLanes;
      if (rest[1] == 0) continue;
      std::copy(sums, total, &sums_[g * width_]);
      total_[g] = load(total), largest_[g] = rest[0];
    }
  }
  void keep(long row) const {
    for (long g = 0; g < a_.group; ++g) {
      float *sums = carry(row, g), *total = sums + width_;
      std::copy(&sums_[g * width_], &sums_[g * width_] + width_, sums);
      store(total, total_[g]), store(total + kLanes, Floats{largest_[g], 1.0f});
    }
  }
  // Of a query: the sums of values, the lanes of the total, and the largest score, beside whether
  // there is any of this.
  float* carry(long row, long g) const {
    return a_.carry + (row * a_.group + g) * (width_ + 2 * kLanes);
  }

  // Turns the tile's scores of a query into shares. Where one exceeds all before it, what was
  // summed is fitted to it.
  void share(long g, Ints is_seen) {
    const Floats scores = select(is_seen, load(&scores_[g * kTile]), broadcast(kMinusInfinity));
    if (any_above(scores, largest_[g])) {
      const float before = largest_[g], now = largest(scores);
      const float kept = exp_of(broadcast(before - now))[0];
      largest_[g] = now;
      total_[g] *= kept;
      for (long d = g * width_; d < (g + 1) * width_; d += kLanes)
        store(&sums_[d], load(&sums_[d]) * kept);
    }
    // Nothing was seen yet where the maximum is still minus infinity.
    const float origin = largest_[g] == kMinusInfinity ? 0.0f : largest_[g];
    const Floats shares = exp_of(scores - origin);
    Ops::keep(&shares_[g * kTile], shares);
    total_[g] += shares;
  }

  // The sums of some dimensions stay in registers for the tile.
  template <long kQueries>
  void add(long g) {
    constexpr long kBlocks = std::min(4L, kSummed / kQueries);
    long d = 0;
    for (; d + (kBlocks - 1) * Ops::kDims < a_.value_dim; d += kBlocks * Ops::kDims)
      add_dims<kQueries, kBlocks>(g, d);
    for (; d < a_.value_dim; d += Ops::kDims) add_dims<kQueries, 1>(g, d);
  }

  template <long kQueries, long kBlocks>
  void add_dims(long g, long first_dim) {
    constexpr long kVectors = Ops::kVectors;
    constexpr long kSums = kQueries * kVectors;
    Floats sums[kBlocks * kSums];
    const auto home = [&](long i) INLINE {
      const long block = i / kSums, query = g + i % kSums / kVectors;
      return &sums_[query * width_ + first_dim + block * Ops::kDims + i % kVectors * kLanes];
    };
    repeat<kBlocks * kSums>([&](auto i) INLINE { sums[i] = load(home(i)); });
    for (long t = 0; t < count_; t += Ops::kTogether) {
      const auto *value = cache_.values[t], *following = cache_.values[t + 1];
      for (long i = 0; g == 0 && i < Ops::kTogether; ++i)
        cache_.fetch_value(t + i, first_dim, kBlocks * Ops::kDims);
      repeat<kBlocks>([&](auto b) INLINE {
        Ops::template add<kQueries>(value, following, first_dim + b * Ops::kDims, a_.dim,
                                    &shares_[g * kTile + t], sums + b * kSums);
      });
    }
    repeat<kBlocks * kSums>([&](auto i) INLINE { store(home(i), sums[i]); });
  }

  long count_ = 0;  // Tokens of the tile.
  std::vector<float> scores_;
  std::vector<typename Ops::Share> shares_;
  std::vector<float> largest_, sums_;
  std::vector<Floats> total_;
};

// Few at a time: whoever loses its core to another channel's thread must not hold up the rest.
constexpr long kRowsAtOnce = 4;
// The same for rows of many tokens, beside which the others are short.
constexpr long kTokensAtOnce = 4096;

// Returns the rows that threads take at once: the first of each part, and the end.
inline std::vector<long> row_parts(const Attention& a) {
  std::vector<long> starts{0};
  long tokens = 0;
  for (long r = 0; r < a.rows; ++r) {
    const long more = a.tokens_of(a.row_at(r)), rows = r - starts.back();
    if (rows == kRowsAtOnce || (rows && tokens + more > kTokensAtOnce))
      starts.push_back(r), tokens = 0;
    tokens += more;
  }
  starts.push_back(a.rows);
  return starts;
}

template <class Worker>
void attend_rows(const Attention& a, int threads) {
  const std::vector<long> starts = row_parts(a);
  const long parts = starts.size() - 1;
#pragma omp parallel num_threads(threads)
  {
    Worker worker(a);
#pragma omp for schedule(dynamic)
    for (long part = 0; part < parts; ++part)
      for (long r = starts[part]; r < starts[part + 1]; ++r)
        worker.attend(a.row_at(r), a.row_at(std::min(r + 1, starts[part + 1] - 1)));
  }
}

}  // namespace
