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
  // The inputs of row r are at x[b * rows + r] for its b-th block.
  IntegerTile(const EncodedProducts& p, const IntegerInputs* x, long begin, long rows, long most)
      : p_(p.products), x_(x), begin_(begin), rows_(rows), weights_(kPanels),
        sums_(kTileOutputs * most) {}

  // Multiplies the rows of a span with the weights of some outputs.
  void multiply(const Span& span, long first, long count) {
    const Matrix<Bfloat16> matrix(p_, span.group);
    std::fill_n(sums_.data(), kTileOutputs * span.count, 0.0f);
    for (long b = 0; b < p_.dim / kBlock; ++b)
      for (long panel = 0; panel < count; panel += kPanelRows) {
        const IntegerInputs* x = x_ + b * rows_ + span.first - begin_;
        add(matrix, first, panel, count, b, x, span.count, sums_.data() + panel * span.count);
      }
    for (long panel = 0; panel < count; panel += kPanelRows)
      for (long r = 0; r < span.count; ++r)
        finish(span, r, first + panel, std::min(kPanelRows, count - panel),
               sums_.data() + panel * span.count + r * kPanelRows);
  }

 private:
  // Adds the products of a block with the weights of a panel. Beyond the last row of weights its
  // values are taken again.
  void add(const Matrix<Bfloat16>& matrix, long first, long panel, long count, long b,
           const IntegerInputs* x, long rows, float* sums) {
    for (long part = 0; part < kPanels; ++part) {
      const uint8_t* blocks[kLanes];
      for (long i = 0; i < kLanes; ++i) {
        const long row = first + std::min(panel + part * kLanes + i, count - 1);
        blocks[i] = reinterpret_cast<const uint8_t*>(matrix.row(row, 0)) + b * kBlockBytes<D>;
      }
      if (rows == 1)
        add_single<D>(blocks, kBlockBytes<D>, *x, sums + part * kLanes);
      else
        take_weights<D>(blocks, kBlockBytes<D>, weights_.data() + part);
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
  const long begin_, rows_;
  LineAligned<IntegerWeights> weights_;
  LineAligned<float> sums_;
};

template <class D>
void multiply_integer_window(const EncodedProducts& p, long begin, long end, int threads) {
  const Products& products = p.products;
  const std::vector<Span> spans = spans_of(products, begin, end);
  const long rows = end - begin, blocks = products.dim / kBlock;
  LineAligned<IntegerInputs> x(rows * blocks);
#pragma omp parallel for num_threads(threads) if (rows * products.dim > kFewElements)
  for (long r = 0; r < rows; ++r) {
    const auto* from = static_cast<const Bfloat16*>(products.x) + (begin + r) * products.x_stride;
    for (long b = 0; b < blocks; ++b) take_inputs(from + b * kBlock, x.data() + b * rows + r);
  }
  long most = 0;
  for (const Span& span : spans) most = std::max(most, span.count);
  const long width =
      std::max(kPanelRows, tile_width(products, long(spans.size()), threads, kTileOutputs));
  const long columns = (products.outputs + width - 1) / width;
#pragma omp parallel num_threads(threads)
  {
    IntegerTile<D> tile(p, x.data(), begin, rows, most);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < columns * long(spans.size()); ++i) {
      const long first = i % columns * width;
      tile.multiply(spans[i / columns], first, std::min(width, products.outputs - first));
    }
  }
}

template <class D>
void multiply_integers(const EncodedProducts& p, int threads) {
  const long* starts = p.products.starts;
  const long past = starts[p.products.groups];
  for (long begin = starts[0]; begin < past; begin += kWindow)
    multiply_integer_window<D>(p, begin, std::min(past, begin + kWindow), threads);
}
using MultiplyIntegers = void (*)(const EncodedProducts&, int);
template <class D>
constexpr MultiplyIntegers integer_products() {
  if constexpr (IntegersOf<D>::kIsKnown) return multiply_integers<D>;
  return nullptr;
}

}  // namespace

#endif
