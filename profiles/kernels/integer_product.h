// Products of groups of rows with K-quants, in integers.
#pragma once

#include "integer_blocks.h"

#if defined(HAS_INTEGER_PRODUCTS)

namespace {

// Outputs of a tile: those of a few panels of weights, which take turns in the first-level cache.
constexpr long kTileOutputs = 2 * kPanelRows;

// Products of the inputs of a window with weights of D.
template <class D>
class IntegerTile {
 public:
  // The inputs of the r-th row held are at x[b * rows + r] for its b-th block.
  IntegerTile(const EncodedProducts& p, const IntegerInputs* x, long rows, long most)
      : p_(p.products), x_(x), rows_(rows), weights_(kPanels), sums_(kTileOutputs * most) {}

  void multiply(const Part& part) {
    for (long done = 0; done < part.count; done += kTileOutputs)
      multiply(part.span, part.first + done, std::min(kTileOutputs, part.count - done));
  }

 private:
  void multiply(const Span& span, long first, long count) {
    const Matrix<Bfloat16> matrix(p_, span.group);
    std::fill_n(sums_.data(), kTileOutputs * span.count, 0.0f);
    for (long b = 0; b < p_.dim / kBlock; ++b)
      for (long panel = 0; panel < count; panel += kPanelRows) {
        const IntegerInputs* x = x_ + b * rows_ + span.at;
        add(matrix, first, panel, count, b, x, span.count, sums_.data() + panel * span.count);
      }
    for (long panel = 0; panel < count; panel += kPanelRows)
      for (long r = 0; r < span.count; ++r)
        finish(span, r, first + panel, std::min(kPanelRows, count - panel),
               sums_.data() + panel * span.count + r * kPanelRows);
  }

  // Adds the products of a block with the weights of a panel. Beyond the last row of weights its
  // values are taken again.
  void add(const Matrix<Bfloat16>& matrix, long first, long panel, long count, long b,
           const IntegerInputs* x, long rows, float* sums) {
    // Behind its last block, a row is followed by that of the next tile.
    const bool is_last = (b + 1) * kBlock == p_.dim;
    const long ahead = is_last ? kTileOutputs * p_.weight_stride - b * kBlockBytes<D>
                               : kBlockBytes<D>;
    for (long part = 0; part < kPanels; ++part) {
      const uint8_t* blocks[kLanes];
      for (long i = 0; i < kLanes; ++i) {
        const long row = first + std::min(panel + part * kLanes + i, count - 1);
        blocks[i] = reinterpret_cast<const uint8_t*>(matrix.row(row, 0)) + b * kBlockBytes<D>;
      }
      if (rows == 1)
        add_single<D>(blocks, ahead, *x, sums + part * kLanes);
      else
        take_weights<D>(blocks, ahead, weights_.data() + part);
    }
    if (rows > 1) add_rows(x, rows, sums);
  }
  void add_rows(const IntegerInputs* x, long rows, float* sums) const {
    const auto block = [&](auto count) INLINE {
      add_block<D, count.value>(weights_.data(), x, sums);
      x += count, sums += count * kPanelRows, rows -= count;
    };
    while (rows >= 12) block(std::integral_constant<long, 12>());
    if (rows >= 6) block(std::integral_constant<long, 6>());
    if (rows >= 4) block(std::integral_constant<long, 4>());
    if (rows >= 2) block(std::integral_constant<long, 2>());
    if (rows >= 1) block(std::integral_constant<long, 1>());
  }
  void finish(const Span& span, long r, long first, long count, const float* sums) const {
    const auto* bias = p_.biases ? static_cast<const Bfloat16*>(p_.biases[span.group]) : nullptr;
    Bfloat16* out = static_cast<Bfloat16*>(p_.out) + (span.first + r) * p_.out_stride + first;
    for (long i = 0; i < count; i += kLanes) {
      Floats sum = load(sums + i);
      if (bias) sum += load_part(bias + first + i, count - i);
      if (p_.adds) sum = rounded<Bfloat16>(sum) + load_part(out + i, count - i);
      store_part(out + i, sum, count - i);
    }
  }

  const Products& p_;
  const IntegerInputs* x_;
  const long rows_;
  LineAligned<IntegerWeights> weights_;
  LineAligned<float> sums_;
};

template <class D>
void multiply_integer_window(const EncodedProducts& p, const Spans& spans, int threads) {
  const Products& products = p.products;
  const std::vector<long> numbers = numbers_of(spans);
  const long rows = long(numbers.size()), blocks = products.dim / kBlock;
  LineAligned<IntegerInputs> x(rows * blocks);
#pragma omp parallel for num_threads(threads) if (rows * products.dim > kFewElements)
  for (long r = 0; r < rows; ++r) {
    const auto* from = static_cast<const Bfloat16*>(products.x) + numbers[r] * products.x_stride;
    for (long b = 0; b < blocks; ++b) take_inputs(from + b * kBlock, x.data() + b * rows + r);
  }
  const std::vector<Part> parts = parts_of(products, spans, threads, kPanelRows);
#pragma omp parallel num_threads(threads)
  {
    IntegerTile<D> tile(p, x.data(), rows, most_rows(spans));
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < parts.size(); ++i) tile.multiply(parts[i]);
  }
}

template <class D>
void multiply_integers(const EncodedProducts& p, int threads) {
  for (const Spans& spans : windows_of(p.products, 1, kAnyRows, true))
    multiply_integer_window<D>(p, spans, threads);
}
using MultiplyIntegers = void (*)(const EncodedProducts&, int);
template <class D>
constexpr MultiplyIntegers integer_products() {
  if constexpr (IntegersOf<D>::kIsKnown) return multiply_integers<D>;
  return nullptr;
}

}  // namespace

#endif
