// What a matrix product reads: its arguments, the sizes of its parts, and its weights, plain or packed,
// as they are or converted.
#pragma once

#include "arithmetic.h"
#include "groups.h"

namespace {

// As profiles/kernels/products.py lays it out.
struct Products {
  const void* x;  // [rows, dim]
  long x_stride;
  const void* const* weights;  // Of each group, [outputs, dim] or [outputs, bytes of a row].
  const void* const* biases;   // Of each group, [outputs]; or null.
  const long* starts;          // The first row of each group, and the number of rows.
  long groups, outputs, dim, weight_stride;  // The stride in bytes.
  long group_size;
  int bits;  // 0: the weights are plain.
  void* out;  // [rows, outputs]
  long out_stride;
  int adds;  // Each result, once it is rounded, is added to what is there.
};

// Weights and rows whose products are summed at once, in registers.
#if defined(__AVX512F__)
constexpr long kWeights = 4, kRows = 6;
#else
constexpr long kWeights = 4, kRows = 3;
#endif
// Outputs of a tile, and dimensions that are summed before the next weights are taken.
constexpr long kOutputs = 64, kDepth = 1024;
// Most outputs of a part with few rows. The first weights of a part are not fetched early, so that
// parts are wide.
constexpr long kMostOutputs = 16 * kOutputs;
// Rows whose inputs are held in another form at once.
constexpr long kWindow = 512;
// So few rows take 16-bit weights as they are, where one instruction converts a vector. So few blocks
// of rows wait for the memory: lines are fetched one by one, between products. More blocks wait for
// the arithmetic, which that would slow. Without AVX-512 and AVX2, lines are fetched in bursts. With fewer rows
// than kFetching, the processor itself fetches weights in time.
#if defined(__AVX512F__)
constexpr long kFewRows = 12, kWaiting = 2, kFetching = 2;
#elif defined(USES_AVX2)
constexpr long kFewRows = 12, kWaiting = 2, kFetching = 1;
#else
constexpr long kFewRows = 0, kWaiting = 0, kFetching = 2;
#endif
// Up to so many rows, each weight is multiplied with all rows before the next one, if the inputs of
// these rows have at most so many bytes: they stay in the first-level cache.
constexpr long kSharedRows = 4 * kRows, kKeptInputs = 1 << 15;
constexpr long kAnyRows = 1L << 62;
// Rows of weights that are fetched before their turn.
constexpr long kAhead = 2 * kWeights;
// Where one block of rows waits for the memory: bytes of each of kWeights rows instead. Lines of rows
// that are 4 KiB apart share a set of the first-level cache, which holds 12 of them at most.
constexpr long kLead = 2560;
// So few elements are converted by one thread.
constexpr long kFewElements = 1 << 18;
// Tiles for each thread: who loses its core holds up the rest for a part of one.
constexpr long kTiles = 8;

// Elements from one row to the next such that rows do not compete for the same lines of a cache.
template <class E>
long apart(long size) { return size + (size * sizeof(E) % 1024 ? 0 : 64 / sizeof(E)); }

// Weights of a matrix, plain elements of T or packed.
template <class T>
class Matrix {
 public:
  Matrix(const Products& p, long group)
      : packing_{p.dim, p.group_size, p.bits}, group_(group),
        from_(static_cast<const char*>(p.weights[group])), stride_(p.weight_stride),
        outputs_(p.outputs) {}
  long group() const { return group_; }
  // The row of an output; of plain elements, from one on.
  const char* row(long output, long d) const {
    return from_ + output * stride_ + (packing_.bits ? 0 : d * sizeof(T));
  }
  void unpack(long output, long d, long size, T* to) const {
    unpack_part(packing_, reinterpret_cast<const uint8_t*>(row(output, 0)), d, size, to);
  }
  // Fetches elements from one on of an output, if there is such an output. Inline: a compiler leaves
  // out calls of a function that only fetches.
  INLINE void fetch(long output, long d, long size) const {
    if (output >= outputs_) return;
    const char* from = row(output, 0);
    if (!packing_.bits) return fetch_run(from + d * sizeof(T), size * sizeof(T));
    fetch_run(from + d * packing_.bits / 8, size * packing_.bits / 8);
    fetch_run(from + packing_.shared_at(d / packing_.group), size / packing_.group * 4);
  }

 private:
  const Packing packing_;
  const long group_;
  const char* from_;
  const long stride_, outputs_;
};

// Weights that are multiplied where they are.
template <class T>
class InPlace {
 public:
  // Whether rows are read where the matrix is stored, so that they can be fetched early.
  static constexpr bool kIsInPlace = true;
  InPlace(const Products&, long) {}
  void take(const Matrix<T>& matrix, long first, long count, long d, long, const T** rows) {
    for (long w = 0; w < count; ++w)
      rows[w] = reinterpret_cast<const T*>(matrix.row(first + w, d));
  }
};

// Weights that are converted to E.
template <class T, class E>
class Converted {
 public:
  static constexpr bool kIsInPlace = false;
  Converted(const Products& p, long depth)
      : is_packed_(p.bits), stride_(apart<E>(depth)), row_(depth), kept_(kOutputs * stride_) {}
  void take(const Matrix<T>& matrix, long first, long count, long d, long size, const E** rows) {
    for (long w = 0; w < count; ++w) {
      E* to = kept_.data() + w * stride_;
      rows[w] = to;
      matrix.fetch(first + w + kAhead, d, size);
      if constexpr (std::is_same_v<T, E>) {
        matrix.unpack(first + w, d, size, to);
      } else if (is_packed_) {
        matrix.unpack(first + w, d, size, row_.data());
        convert(row_.data(), size, to);
      } else {
        convert(reinterpret_cast<const T*>(matrix.row(first + w, d)), size, to);
      }
    }
  }

 private:
  static void convert(const T* from, long size, E* to) {
#if !defined(__AVX512F__)
    // Compilers make vectors of what they have of this loop.
    if constexpr (std::is_same_v<T, Bfloat16>) {
      for (long d = 0; d < size; ++d) to[d] = to_float(from[d]);
      return;
    }
#endif
    for (long d = 0; d < size; d += kLanes) store(to + d, load_part(from + d, size - d));
  }

  const bool is_packed_;
  const long stride_;
  LineAligned<T> row_;
  LineAligned<E> kept_;
};

// Inputs of T, and weights that were converted to float32.
template <class T>
struct WideInputs : Wide<float> {
  static const float* queries(const T* q, long group, long dim, float* kept) {
    return Wide<T>::queries(q, group, dim, kept);
  }
};

// Dimensions that are summed at once: whole groups, and whole blocks of files.
constexpr long kBlock = 256;
static_assert(kBlock % kMaxGroup == 0 && kDepth % kBlock == 0);
inline long depth_of(long dim) {
  const long parts = (dim + kDepth - 1) / kDepth;
  return (dim + parts * kBlock - 1) / (parts * kBlock) * kBlock;
}

}  // namespace
