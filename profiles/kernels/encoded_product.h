// Encoded rows unpacked, and their products with few rows of inputs.
#pragma once

#include "grouped_codes.h"
#include "k_quants.h"
#include "product.h"

namespace {

template <class T> using F32 = PlainElements<T, float>;
template <class T> using F16 = PlainElements<T, Float16>;
template <class T> using BF16 = PlainElements<T, Bfloat16>;

// In the order of Kind in profiles/encodings.py.
#define FOR_ENCODINGS(DO)                                                                      \
  DO(F32) DO(F16) DO(BF16) DO(Q4_0) DO(Q4_1) DO(Q5_0) DO(Q5_1) DO(Q8_0) DO(Q2_K) DO(Q3_K)      \
  DO(Q4_K) DO(Q5_K) DO(Q6_K) DO(IQ4_NL) DO(MXFP4) DO(INT4) DO(INT8) DO(E4M3) DO(MAP4) DO(BNB8)

// Gives `size` elements of a row from d on, a multiple of kHalf, as T would hold them.
template <class D>
void decode(const EncodedRow& row, long d, long size, float* to) {
  const D decoder(row);
  const long whole = size / D::kUnit * D::kUnit;
  for (long i = 0; i < whole; i += D::kUnit)
    decoder.unit(d + i, [&](auto j, Floats v) INLINE { store(to + i + j * kLanes, v); });
  if (whole == size) return;
  float last[D::kUnit];
  decoder.unit(d + whole, [&](auto j, Floats v) INLINE { store(last + j * kLanes, v); });
  std::memcpy(to + whole, last, (size - whole) * sizeof(float));
}
using Decode = void (*)(const EncodedRow&, long, long, float*);
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
        decode(row, d, size, out);
      } else {
        decode(row, d, size, piece);
        for (long i = 0; i < size; i += kLanes)
          store_part(out + i, load(piece + i), size - i);
      }
    }
  }
}

// As profiles/kernels/encoded.py lays it out.
struct EncodedProducts {
  Products products;
  Encoding how;
  const float* const* tables;  // Of each group's matrix; or null.
  const long* first_rows;      // Each group's first output among the rows of its matrix.
};

// Encoded weights as floats, part by part.
template <class T>
class Decoded {
 public:
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
      decode_({p_.how, bytes, table, p_.first_rows[group] + first + w}, d, size, to);
    }
  }

 private:
  const EncodedProducts& p_;
  const Decode decode_;
  const long stride_;
  LineAligned<float> kept_;
};

template <class T>
void multiply_encoded(const EncodedProducts& p, int threads) {
  multiply_all<T, WideInputs<T>, Decoded<T>>(p.products, threads);
}

}  // namespace
