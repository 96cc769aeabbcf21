// Products of groups of rows of bfloat16 inputs with weights that are multiplied as integers. A `Form`
// says how both are held: blocks of inputs, and of kPanels panels of kLanes rows of weights.
#pragma once

#include <algorithm>
#include <vector>

#include "integers.h"
#include "product_parts.h"

#if defined(HAS_INTEGER_PRODUCTS)

namespace {

constexpr long kPanelRows = kPanels * kLanes;
// Outputs of a tile: those of a few panels of weights, which take turns in the first-level cache.
constexpr long kTileOutputs = 64;

// A block of kLanes rows of weights, kBlock dimensions of `dim` or what is left of them.
struct WeightBlock {
  const uint8_t* rows[kLanes];
  long number, dim;
  long next_tile;  // Bytes from a row to that of the next tile.

  bool is_last() const { return (number + 1) * kBlock >= dim; }
  // Bytes from a block to the one that is taken after it, where blocks of a row are adjacent.
  long ahead(long block_bytes) const {
    return is_last() ? next_tile - number * block_bytes : block_bytes;
  }
};

template <class Form>
class IntegerTile {
  using Inputs = typename Form::Inputs;
  using Weights = typename Form::Weights;

 public:
  // The inputs of the r-th row held are at x[b * rows + r] for its b-th block.
  IntegerTile(const Products& p, const Inputs* x, long rows, long most)
      : p_(p), x_(x), rows_(rows), weights_(kPanels), sums_(kTileOutputs * most) {}

  void multiply(const Part& part) {
    for (long done = 0; done < part.count; done += kTileOutputs)
      multiply(part.span, part.first + done, std::min(kTileOutputs, part.count - done));
  }

 private:
  void multiply(const Span& span, long first, long count) {
    const Matrix<Bfloat16> matrix(p_, span.group);
    std::fill_n(sums_.data(), kTileOutputs * span.count, 0.0f);
    for (long b = 0; b * kBlock < p_.dim; ++b)
      for (long panel = 0; panel < count; panel += kPanelRows) {
        const Inputs* x = x_ + b * rows_ + span.at;
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
           const Inputs* x, long rows, float* sums) {
    WeightBlock block{{}, b, p_.dim, kTileOutputs * p_.weight_stride};
    for (long part = 0; part < kPanels; ++part) {
      for (long i = 0; i < kLanes; ++i) {
        const long row = first + std::min(panel + part * kLanes + i, count - 1);
        block.rows[i] = reinterpret_cast<const uint8_t*>(matrix.row(row, 0));
      }
      if (rows == 1)
        Form::add_single(block, *x, sums + part * kLanes);
      else
        Form::take_weights(block, weights_.data() + part);
    }
    if (rows > 1) add_rows(x, rows, sums);
  }
  void add_rows(const Inputs* x, long rows, float* sums) const {
    const auto block = [&](auto count) INLINE {
      Form::template add_block<count.value>(weights_.data(), x, sums);
      x += count, sums += count * kPanelRows, rows -= count;
    };
    while (rows >= kMostRows) block(std::integral_constant<long, kMostRows>());
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
  const Inputs* x_;
  const long rows_;
  LineAligned<Weights> weights_;
  LineAligned<float> sums_;
};

template <class Form>
void multiply_integer_window(const Products& p, const Spans& spans, int threads) {
  const std::vector<long> numbers = numbers_of(spans);
  const long rows = long(numbers.size()), blocks = (p.dim + kBlock - 1) / kBlock;
  LineAligned<typename Form::Inputs> x(rows * blocks);
#pragma omp parallel for num_threads(threads) if (rows * p.dim > kFewElements)
  for (long r = 0; r < rows; ++r) {
    const auto* from = static_cast<const Bfloat16*>(p.x) + numbers[r] * p.x_stride;
    for (long b = 0; b < blocks; ++b)
      Form::take_inputs(from + b * kBlock, p.dim - b * kBlock, x.data() + b * rows + r);
  }
  const std::vector<Part> parts = parts_of(p, spans, threads, kPanelRows);
#pragma omp parallel num_threads(threads)
  {
    IntegerTile<Form> tile(p, x.data(), rows, most_rows(spans));
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < parts.size(); ++i) tile.multiply(parts[i]);
  }
}

template <class Form>
void multiply_integers(const Products& p, int threads) {
  for (const Spans& spans : windows_of(p, 1, kAnyRows, true))
    multiply_integer_window<Form>(p, spans, threads);
}

}  // namespace

#endif
