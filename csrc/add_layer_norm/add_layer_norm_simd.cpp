// Residual sum, dropout and layer norm of rows: each tensor is read once and written once.
//
//   s = residual + mask factor part     y = (s - mean) rstd weight + bias
//   g = weight dy     x = (s - mean) rstd     ds += rstd (g - mean(g) - x mean(g x))     d_part = mask factor ds
//
// A row is a few kilobytes and stays in the L1 cache, so the passes over it are those of the formulas: sum, mean,
// variance, output. All is computed in floats; a row of another type is converted on its way in and out, through a
// buffer that is filled up with zeros to whole registers. The mask of eight rows comes from one call of Philox a vector
// of columns, in both directions from the seed.
//
// The gradients of weight and bias are sums over rows: over those of a chunk here, over the chunks by the binding.
// Chunks do not depend on the number of threads, and so neither do the sums' last bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../dropout/factors.h"
#include "../float16.h"
#include "add_layer_norm.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

// What one thread keeps: a buffer for a row of each tensor, and what the mask makes of each element of a group.
struct Scratch {
  int64_t width;
  std::vector<float> rows, factors;
  Scratch(int64_t C, bool drops)
      : width(round_up(C, LANES)), rows(4 * width), factors(drops ? DROPOUT_ROWS * width : 0) {}
  float* row(int64_t number) { return rows.data() + number * width; }
};

// Row `number` of a tensor as floats, followed by zeros up to whole registers: the row itself if it is that already.
const float* read(Dtype dtype, const char* tensor, int64_t number, int64_t C, float* buffer) {
  return with_element(dtype, [&](auto element) -> const float* {
    using Element = decltype(element);
    const Element* row = reinterpret_cast<const Element*>(tensor) + number * C;
    if constexpr (sizeof(Element) == sizeof(float))
      if (C % LANES == 0) return reinterpret_cast<const float*>(row);
    for (int64_t c = 0; c < C; c += LANES) store(buffer + c, load_first(row + c, C - c));
    return buffer;
  });
}

// Where a row is to be written: the row itself, if it is whole registers of floats, or the buffer; `written` then
// brings it to its place.
float* place(Dtype dtype, char* tensor, int64_t number, int64_t C, float* buffer) {
  const bool direct = dtype == Dtype::float32 && C % LANES == 0;
  return direct ? reinterpret_cast<float*>(tensor) + number * C : buffer;
}

void written(Dtype dtype, char* tensor, int64_t number, int64_t C, const float* values) {
  with_element(dtype, [&](auto element) {
    using Element = decltype(element);
    Element* row = reinterpret_cast<Element*>(tensor) + number * C;
    if (reinterpret_cast<const char*>(row) == reinterpret_cast<const char*>(values)) return;
    for (int64_t c = 0; c < C; c += LANES) store_first(row + c, load(values + c), C - c);
  });
}

// The sum over a row of term(column), a register at a time, on four chains of additions.
template <class F>
inline float sum_of(int64_t width, F&& term) {
  Floats sums[4] = {};
  int64_t c = 0;
  for (; c + 4 * LANES <= width; c += 4 * LANES)
#pragma GCC unroll 4
    for (int64_t u = 0; u < 4; ++u) sums[u] += term(c + u * LANES);
  for (; c < width; c += LANES) sums[0] += term(c);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// s - mean, and 0 past the end of the row.
inline Floats centred(const float* sum, int64_t c, int64_t C, float mean) {
  const Floats value = load(sum + c) - mean;
  return c + LANES <= C ? value : (lane_numbers() < (int32_t)(C - c) ? value : Floats{});
}

void forward_row(const AddLayerNormForward& p, int64_t n, const float* factors, Scratch& scratch) {
  const int64_t C = p.C, width = scratch.width;
  const float* part = read(p.part_dtype, p.part, n, C, scratch.row(0));
  const float* residual = read(p.sum_dtype, p.residual, n, C, scratch.row(1));
  float* made = place(p.sum_dtype, p.sum, n, C, scratch.row(2));
  for (int64_t c = 0; c < width; c += LANES) {
    const Floats x = load(part + c);
    store(made + c, load(residual + c) + (factors ? x * load(factors + c) : x));
  }
  written(p.sum_dtype, p.sum, n, C, made);
  // the norm is of the sum as it is returned, rounded
  const float* sum = p.sum_dtype == Dtype::float32 ? made : read(p.sum_dtype, p.sum, n, C, scratch.row(2));
  const float mean = sum_of(width, [&](int64_t c) { return load(sum + c); }) / (float)C;
  const float variance = sum_of(width, [&](int64_t c) {
    const Floats x = centred(sum, c, C, mean);
    return x * x;
  });
  const float rstd = 1.0f / std::sqrt(variance / (float)C + p.eps);
  p.statistics[2 * n] = mean, p.statistics[2 * n + 1] = rstd;
  const float* weight = read(Dtype::float32, reinterpret_cast<const char*>(p.weight), 0, C, scratch.row(0));
  const float* bias = nullptr;
  if (p.bias) bias = read(Dtype::float32, reinterpret_cast<const char*>(p.bias), 0, C, scratch.row(1));
  float* out = place(p.out_dtype, p.out, n, C, scratch.row(3));
  for (int64_t c = 0; c < width; c += LANES) {
    const Floats y = (load(sum + c) - mean) * rstd * load(weight + c);
    store(out + c, bias ? y + load(bias + c) : y);
  }
  written(p.out_dtype, p.out, n, C, out);
}

void forward(const AddLayerNormForward& p, int64_t begin, int64_t end) {
  Scratch scratch(p.C, p.dropping.threshold > 0);
  for (int64_t group = begin; group < end; ++group) {
    if (p.dropping.threshold > 0) fill_factors(p.dropping, group, scratch.width, scratch.factors.data());
    for (int64_t n = group * DROPOUT_ROWS, row = 0; row < DROPOUT_ROWS && n < p.N; ++n, ++row)
      forward_row(p, n, p.dropping.threshold > 0 ? &scratch.factors[row * scratch.width] : nullptr, scratch);
  }
}

// `totals`: [2, width], the gradients of weight and bias so far.
void backward_row(const AddLayerNormBackward& p, int64_t n, const float* factors, const float* weight, float* totals,
                  Scratch& scratch) {
  const int64_t C = p.C, width = scratch.width;
  const float mean = p.statistics[2 * n], rstd = p.statistics[2 * n + 1];
  const float* slope = read(p.out_dtype, p.grad_out, n, C, scratch.row(0));
  const float* sum = read(p.sum_dtype, p.sum, n, C, scratch.row(1));
  const float* more = p.grad_sum ? read(p.sum_dtype, p.grad_sum, n, C, scratch.row(2)) : nullptr;
  const auto normal = [&](int64_t c) { return (load(sum + c) - mean) * rstd; };
  const float mean_g = sum_of(width, [&](int64_t c) { return load(slope + c) * load(weight + c); }) / (float)C;
  const float mean_gx = sum_of(width,
                               [&](int64_t c) {
                                 const Floats dy = load(slope + c), x = normal(c);
                                 store(totals + c, load(totals + c) + dy * x);
                                 store(totals + width + c, load(totals + width + c) + dy);
                                 return dy * load(weight + c) * x;
                               }) /
                        (float)C;
  float* d_sum = place(p.sum_dtype, p.d_residual, n, C, scratch.row(3));
  for (int64_t c = 0; c < width; c += LANES) {
    const Floats d = rstd * (load(slope + c) * load(weight + c) - mean_g - normal(c) * mean_gx);
    store(d_sum + c, more ? d + load(more + c) : d);
  }
  written(p.sum_dtype, p.d_residual, n, C, d_sum);
  if (!p.d_part) return;
  float* d_part = place(p.part_dtype, p.d_part, n, C, scratch.row(0));
  for (int64_t c = 0; c < width; c += LANES)
    store(d_part + c, load(d_sum + c) * (factors ? load(factors + c) : Floats{} + 1));
  written(p.part_dtype, p.d_part, n, C, d_part);
}

void backward(const AddLayerNormBackward& p, int64_t begin, int64_t end) {
  Scratch scratch(p.C, p.dropping.threshold > 0);
  const int64_t width = scratch.width, groups = (p.N + DROPOUT_ROWS - 1) / DROPOUT_ROWS;
  std::vector<float> totals(2 * width), padded(width);
  const float* weight = read(Dtype::float32, reinterpret_cast<const char*>(p.weight), 0, p.C, padded.data());
  for (int64_t chunk = begin; chunk < end; ++chunk) {
    std::fill(totals.begin(), totals.end(), 0.0f);
    const int64_t first = chunk * p.groups_per_chunk, last = std::min(first + p.groups_per_chunk, groups);
    for (int64_t group = first; group < last; ++group) {
      if (p.dropping.threshold > 0) fill_factors(p.dropping, group, scratch.width, scratch.factors.data());
      for (int64_t n = group * DROPOUT_ROWS, row = 0; row < DROPOUT_ROWS && n < p.N; ++n, ++row)
        backward_row(p, n, p.dropping.threshold > 0 ? &scratch.factors[row * width] : nullptr, weight, totals.data(),
                     scratch);
    }
    for (int64_t which = 0; which < 2; ++which)
      std::memcpy(p.partial + (2 * chunk + which) * p.C, &totals[which * width], p.C * sizeof(float));
  }
}

}  // namespace

extern const AddLayerNormKernels add_layer_norm{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
