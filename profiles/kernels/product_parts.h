// How the threads share a product: the rows of all groups in windows, and outputs of them in parts.
#pragma once

#include <algorithm>
#include <vector>

#include "product_weights.h"

namespace {

// Rows of a group that are multiplied at once; `at` is the first of them among the inputs held.
struct Span {
  long group, first, count, at;
};
using Spans = std::vector<Span>;

// The rows of all groups with `least` (at least one) to `most` of them, in windows. Where inputs are
// held in another form, those of a window are held at once. No group is cut that a window could hold:
// its weights would be read twice.
inline std::vector<Spans> windows_of(const Products& p, long least, long most, bool holds_inputs) {
  std::vector<Spans> windows;
  long held = 0;
  for (long g = 0; g < p.groups; ++g) {
    const long begin = p.starts[g], rows = p.starts[g + 1] - begin;
    if (rows < least || rows > most) continue;
    const long parts = (rows + kWindow - 1) / kWindow;
    for (long i = 0; i < parts; ++i) {
      const long first = rows * i / parts, count = rows * (i + 1) / parts - first;
      if (windows.empty() || (holds_inputs && held + count > kWindow))
        windows.emplace_back(), held = 0;
      windows.back().push_back({g, begin + first, count, holds_inputs ? held : begin + first});
      held += count;
    }
  }
  return windows;
}
// The numbers of all rows of spans.
inline std::vector<long> numbers_of(const Spans& spans) {
  std::vector<long> numbers;
  for (const Span& span : spans)
    for (long r = 0; r < span.count; ++r) numbers.push_back(span.first + r);
  return numbers;
}
inline long most_rows(const Spans& spans) {
  long most = 0;
  for (const Span& span : spans) most = std::max(most, span.count);
  return most;
}

// Outputs of a span that one thread multiplies.
struct Part {
  Span span;
  long first, count;
};
// Cuts all outputs of spans into parts, smaller ones where there would not be enough for all threads.
// Few rows take wide parts: weights behind a part may be another thread's, and are fetched in vain.
inline std::vector<Part> parts_of(const Products& p, const Spans& spans, int threads,
                                  long least = kWeights) {
  long width = kMostOutputs;
  while (width > least && (p.outputs + width - 1) / width * long(spans.size()) < kTiles * threads)
    width /= 2;
  std::vector<Part> parts;
  for (const Span& span : spans) {
    const long step = span.count <= kSharedRows ? width : std::min(width, kOutputs);
    for (long first = 0; first < p.outputs; first += step)
      parts.push_back({span, first, std::min(step, p.outputs - first)});
  }
  return parts;
}

}  // namespace
