// Encoded rows unpacked, and their products with few rows of inputs.
#pragma once

#include "grouped_codes.h"
#include "integer_product.h"
#include "product.h"
#include "small_blocks.h"

namespace {

template <class T> using F32 = PlainElements<T, float>;
template <class T> using F16 = PlainElements<T, Float16>;
template <class T> using BF16 = PlainElements<T, Bfloat16>;

// In the order of Kind in profiles/encodings.py.
#define FOR_ENCODINGS(DO)                                                                      \
  DO(F32) DO(F16) DO(BF16) DO(Q4_0) DO(Q4_1) DO(Q5_0) DO(Q5_1) DO(Q8_0) DO(Q2_K) DO(Q3_K)      \
  DO(Q4_K) DO(Q5_K) DO(Q6_K) DO(IQ4_NL) DO(MXFP4) DO(INT4) DO(INT8) DO(E4M3) DO(MAP4) DO(BNB8)

// Gives `size` elements of a row from d on, a multiple of kBlock, as T would hold them. Meanwhile the
// same elements of the row that begins `ahead` bytes later are fetched.
template <class D>
void decode(const EncodedRow& row, long d, long size, long ahead, float* to) {
  const D decoder(row);
  const long whole = size / D::kUnit * D::kUnit;
  const uint8_t* next = row.bytes + ahead + d / kBlock * kBlockBytes<D>;
  for (long i = 0; i < whole; i += D::kUnit) {
    if (i % kBlock == 0) fetch_run(next + i / kBlock * kBlockBytes<D>, kBlockBytes<D>);
    decoder.unit(d + i, [&](auto j, Floats v) INLINE { store(to + i + j * kLanes, v); });
  }
  if (whole == size) return;
  float last[D::kUnit];
  decoder.unit(d + whole, [&](auto j, Floats v) INLINE { store(last + j * kLanes, v); });
  std::memcpy(to + whole, last, (size - whole) * sizeof(float));
}
#if defined(HAS_INTEGER_PRODUCTS)
inline MultiplyIntegers integer_products_of(int kind) {
#define NAME_INTEGERS(D) integer_products<D<Bfloat16>>(),
  static const MultiplyIntegers of[] = {FOR_ENCODINGS(NAME_INTEGERS)};
#undef NAME_INTEGERS
  return of[kind];
}
#endif
using Decode = void (*)(const EncodedRow&, long, long, long, float*);
template <class T>
Decode decode_of(int kind) {
#define NAME_DECODE(D) decode<D<T>>,
  static const Decode of[] = {FOR_ENCODINGS(NAME_DECODE)};
#undef NAME_DECODE
  return of[kind];
}

// Elements that are unpacked before they are stored as another dtype.
constexpr long kPiece = 1024;

// Unpacks rows from one on; `first` is its number in the matrix.
template <class T>
void unpack_encoded(const Encoding& how, const uint8_t* from, long rows, long stride, long first,
                    const float* table, T* to, long out_stride, int threads) {
  const Decode decode = decode_of<T>(how.kind);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * how.dim > 1 << 16)
  for (long r = 0; r < rows; ++r) {
    const EncodedRow row{how, from + r * stride, table, first + r};
    alignas(64) float piece[kPiece];
    for (long d = 0; d < how.dim; d += kPiece) {
      const long size = std::min(kPiece, how.dim - d);
      T* out = to + r * out_stride + d;
      if constexpr (std::is_same_v<T, float>) {
        decode(row, d, size, 0, out);
      } else {
        decode(row, d, size, 0, piece);
        const long whole = size / kLanes * kLanes;
        for (long i = 0; i < whole; i += kLanes) store_exact(out + i, load(piece + i));
        if (whole < size) store_part(out + whole, load(piece + whole), size - whole);
      }
    }
  }
}

// Encoded weights as floats, part by part.
template <class T>
class Decoded {
 public:
  static constexpr bool kIsInPlace = false;
  Decoded(const Products& p, long depth)
      : p_(reinterpret_cast<const EncodedProducts&>(p)), decode_(decode_of<T>(p_.how.kind)),
        stride_(apart<float>(depth)), kept_(kOutputs * stride_) {}
  void take(const Matrix<T>& matrix, long first, long count, long d, long size,
            const float** rows) {
    const long group = matrix.group();
    const float* table = p_.tables ? p_.tables[group] : nullptr;
    for (long w = 0; w < count; ++w) {
      float* to = kept_.data() + w * stride_;
      rows[w] = to;
      const auto* bytes = reinterpret_cast<const uint8_t*>(matrix.row(first + w, 0));
      const long ahead = kAhead * p_.products.weight_stride;
      decode_({p_.how, bytes, table, p_.first_rows[group] + first + w}, d, size, ahead, to);
    }
  }

 private:
  const EncodedProducts& p_;
  const Decode decode_;
  const long stride_;
  LineAligned<float> kept_;
};

#if defined(__AVX512F__)
// Elsewhere, products of many rows sum in vectors of fewer lanes, and a single row must do as they do.
// Sums the products of a row of inputs, from dimension d on, with kWeights rows of weights as they
// are decoded. Three times as fast as the memory, decoding would wait for it at the end of each row.
template <class D>
void add_products(const EncodedRow* weights, const float* x, long d, long size, Floats* sums) {
  Floats dots[kWeights] = {};
  const D decoders[kWeights] = {D(weights[0]), D(weights[1]), D(weights[2]), D(weights[3])};
  const long stride = weights[1].bytes - weights[0].bytes;
  const uint8_t* next = weights[0].bytes + kAhead * stride + d / kBlock * kBlockBytes<D>;
  for (const long end = d + size; d < end; next += kBlockBytes<D>) {
    for (long w = 0; w < kWeights; ++w) fetch_run(next + w * stride, kBlockBytes<D>);
    for (const long past = std::min(d + kBlock, end); d < past; d += D::kUnit)
      for (long w = 0; w < kWeights; ++w) {
        Floats dot = dots[w];
        decoders[w].unit(d, [&](auto i, Floats v) INLINE { dot += v * load(x + d + i * kLanes); });
        dots[w] = dot;
      }
  }
  for (long i = 0; i < kWeights; ++i) sums[i] = dots[i];
}
using AddProducts = void (*)(const EncodedRow*, const float*, long, long, Floats*);
template <class T>
AddProducts add_products_of(int kind) {
#define NAME_PRODUCTS(D) add_products<D<T>>,
  static const AddProducts of[] = {FOR_ENCODINGS(NAME_PRODUCTS)};
#undef NAME_PRODUCTS
  return of[kind];
}

// A row of inputs for each span, times encoded weights: with the sums in the order of Tile's.
template <class T>
class SingleRows {
 public:
  SingleRows(const EncodedProducts& p, const Spans& spans)
      : encoded_(p), p_(p.products), add_(add_products_of<T>(p.how.kind)),
        stride_((p_.dim + kBlock - 1) / kBlock * kBlock), x_(long(spans.size()) * stride_) {
    for (const Span& span : spans) {
      const T* from = static_cast<const T*>(p_.x) + span.first * p_.x_stride;
      // Zeros fill the last unit up.
      for (long d = 0; d < stride_; d += kLanes)
        store(x_.data() + span.at * stride_ + d,
              d < p_.dim ? load_part(from + d, p_.dim - d) : Floats{});
    }
  }

  void multiply(const Part& part) const {
    const long group = part.span.group, first = part.first, past = first + part.count;
    const Matrix<T> matrix(p_, group);
    const float* table = encoded_.tables ? encoded_.tables[group] : nullptr;
    const T* bias = p_.biases ? static_cast<const T*>(p_.biases[group]) : nullptr;
    T* out = static_cast<T*>(p_.out) + part.span.first * p_.out_stride;
    for (long w = first; w < past; w += kWeights) {
      const auto row = [&](long i) -> EncodedRow {
        const long at = std::min(w + i, past - 1);
        return {encoded_.how, reinterpret_cast<const uint8_t*>(matrix.row(at, 0)), table,
                encoded_.first_rows[group] + at};
      };
      const EncodedRow rows[kWeights] = {row(0), row(1), row(2), row(3)};
      Floats sums{};
      const long depth = depth_of(p_.dim);
      for (long d = 0; d < p_.dim; d += depth) {
        Floats dots[kWeights];
        add_(rows, x_.data() + part.span.at * stride_, d, std::min(depth, p_.dim - d), dots);
        sums = four_sums_of(dots) + sums;
      }
      finish(sums, bias ? bias + w : nullptr, out + w, std::min(kWeights, past - w));
    }
  }

 private:
  void finish(Floats sums, const T* bias, T* out, long count) const {
    if (bias) sums += load_part(bias, count);
    if (p_.adds) sums = rounded<T>(sums) + load_part(out, count);
    store_part(out, sums, count);
  }

  const EncodedProducts& encoded_;
  const Products& p_;
  const AddProducts add_;
  const long stride_;  // Between rows of inputs.
  LineAligned<float> x_;
};

template <class T>
void multiply_single_rows(const EncodedProducts& p, int threads) {
  for (const Spans& spans : windows_of(p.products, 1, 1, true)) {
    const std::vector<Part> parts = parts_of(p.products, spans, threads);
    const SingleRows<T> rows(p, spans);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (size_t i = 0; i < parts.size(); ++i) rows.multiply(parts[i]);
  }
}
#endif

template <class T>
void multiply_encoded(const EncodedProducts& p, int threads) {
#if defined(HAS_INTEGER_PRODUCTS)
  if constexpr (std::is_same_v<T, Bfloat16>)
    if (const auto multiply = integer_products_of(p.how.kind)) return multiply(p.products, threads);
#endif
  long least = 1;
#if defined(__AVX512F__)
  multiply_single_rows<T>(p, threads);
  least = 2;
#endif
  multiply_all<T, WideInputs<T>, Decoded<T>>(p.products, threads, least);
}

}  // namespace
