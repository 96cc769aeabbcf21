// Rows of experts that are added to those of their tokens.
#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

// As profiles/kernels/routed_rows.py lays it out.
struct RoutedRows {
  const void* rows;  // [count, dim]
  long row_stride, count, dim;
  const long* tokens;    // Of each row.
  const float* factors;  // Of each row; or null.
  void* out;             // [tokens, dim]
  long out_stride, num_tokens;
};

// So few elements are added by one thread, and by each thread at least.
constexpr long kAddedAlone = 1 << 15;

// Each row times its factor is rounded, and added in the order of the rows. A thread takes a range of
// tokens, and scans all rows for those of its tokens.
template <class T>
void add_routed(const RoutedRows& r, int threads) {
  const long most = std::max(1L, r.count * r.dim / kAddedAlone);
  const long shares = std::min({4L * threads, most, r.num_tokens});
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (shares > 1)
  for (long share = 0; share < shares; ++share) {
    const long first = r.num_tokens * share / shares, past = r.num_tokens * (share + 1) / shares;
    for (long i = 0; i < r.count; ++i) {
      if (r.tokens[i] < first || r.tokens[i] >= past) continue;
      const T* from = static_cast<const T*>(r.rows) + i * r.row_stride;
      T* to = static_cast<T*>(r.out) + r.tokens[i] * r.out_stride;
      const float factor = r.factors ? r.factors[i] : 1.0f;
      for (long d = 0; d < r.dim; d += kLanes) {
        const Floats added = rounded<T>(load_part(from + d, r.dim - d) * factor);
        store_part(to + d, load_part(to + d, r.dim - d) + added, r.dim - d);
      }
    }
  }
}

}  // namespace
