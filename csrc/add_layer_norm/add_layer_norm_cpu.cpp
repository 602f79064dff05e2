// Binding of the CPU kernels of add_layer_norm: argument checks, threads, outputs, and the operations' registration.
#include "add_layer_norm.h"

#include <algorithm>

#include "../cpu_capability.h"
#include "../dropout/dropping.h"

namespace nlpfast {

NLPFAST_DEFINE_CHOICE(AddLayerNormKernels, add_layer_norm_kernels, add_layer_norm)

namespace {

// Elements that are worth a thread.
constexpr int64_t GRAIN = 16384;
// Chunks of rows whose sums are added up in the end, at most.
constexpr int64_t CHUNKS = 32;

const float* floats_of(const Tensor& x, const char* name, int64_t n) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, " must be float32");
  check_contiguous(x, name, n);
  return static_cast<const float*>(x.const_data_ptr());
}

const char* data_of(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }
char* writable(const Tensor& x) { return static_cast<char*>(x.mutable_data_ptr()); }

// What `sum`, which is like the residual, and the options say.
void set_problem(AddLayerNorm& p, const Tensor& sum, const Tensor& weight, const std::optional<Tensor>& seed,
                 int64_t threshold) {
  STD_TORCH_CHECK(sum.dim() == 2 && sum.size(1) > 0, "residual must be [N, C]");
  p.N = sum.size(0), p.C = sum.size(1);
  check_contiguous(sum, "residual", p.N * p.C);
  p.sum_dtype = floating_dtype(sum, "residual");
  p.weight = floats_of(weight, "weight", p.C);
  p.dropping = dropping_of(seed, threshold);
}

int64_t groups_of(const AddLayerNorm& p) { return (p.N + DROPOUT_ROWS - 1) / DROPOUT_ROWS; }

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_forward(const Tensor& part, const Tensor& residual,
                                                          const Tensor& weight, const std::optional<Tensor>& bias,
                                                          const std::optional<Tensor>& seed, int64_t threshold,
                                                          double eps, ScalarType out_dtype) {
  AddLayerNormForward p{};
  set_problem(p, residual, weight, seed, threshold);
  check_contiguous(part, "part", p.N * p.C);
  p.part_dtype = floating_dtype(part, "part");
  if (bias) p.bias = floats_of(*bias, "bias", p.C);
  p.eps = (float)eps;
  Tensor sum = new_empty(residual, {p.N, p.C}), out = new_empty(residual, {p.N, p.C}, out_dtype);
  Tensor statistics = new_empty(residual, {p.N, 2}, ScalarType::Float);
  p.out_dtype = floating_dtype(out, "out_dtype");
  p.part = data_of(part), p.residual = data_of(residual), p.sum = writable(sum), p.out = writable(out);
  p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  if (p.N > 0)
    parallel_for(0, groups_of(p), std::max<int64_t>(1, GRAIN / (DROPOUT_ROWS * p.C)),
                 [&](int64_t begin, int64_t end) { add_layer_norm_kernels().forward(p, begin, end); });
  return {sum, out, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_backward(
    const Tensor& grad_out, const std::optional<Tensor>& grad_sum, const Tensor& sum, const Tensor& statistics,
    const Tensor& weight, const std::optional<Tensor>& seed, int64_t threshold, ScalarType part_dtype) {
  AddLayerNormBackward p{};
  set_problem(p, sum, weight, seed, threshold);
  check_contiguous(grad_out, "grad_out", p.N * p.C);
  p.out_dtype = floating_dtype(grad_out, "grad_out");
  if (grad_sum) {
    check_contiguous(*grad_sum, "grad_sum", p.N * p.C);
    STD_TORCH_CHECK(grad_sum->scalar_type() == sum.scalar_type(), "grad_sum must have the dtype of sum");
    p.grad_sum = data_of(*grad_sum);
  }
  p.statistics = const_cast<float*>(floats_of(statistics, "statistics", 2 * p.N));
  const bool apart = threshold > 0 || part_dtype != sum.scalar_type();
  Tensor d_residual = new_empty(sum, {p.N, p.C}), d_part = new_empty(sum, {apart ? p.N : 0, p.C}, part_dtype);
  p.part_dtype = floating_dtype(d_part, "part_dtype");
  p.sum = data_of(sum), p.grad_out = data_of(grad_out), p.d_residual = writable(d_residual);
  p.d_part = apart ? writable(d_part) : nullptr;
  const int64_t groups = groups_of(p);
  p.groups_per_chunk = std::max<int64_t>(1, (groups + CHUNKS - 1) / CHUNKS);
  const int64_t chunks = (groups + p.groups_per_chunk - 1) / p.groups_per_chunk;
  Tensor partial = new_empty(sum, {chunks, 2, p.C}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  if (chunks > 0)
    parallel_for(0, chunks, std::max<int64_t>(1, GRAIN / (DROPOUT_ROWS * p.groups_per_chunk * p.C)),
                 [&](int64_t begin, int64_t end) { add_layer_norm_kernels().backward(p, begin, end); });
  Tensor d_weight = new_empty(sum, {p.C}, ScalarType::Float), d_bias = new_empty(sum, {p.C}, ScalarType::Float);
  float* const totals[2] = {static_cast<float*>(d_weight.mutable_data_ptr()),
                            static_cast<float*>(d_bias.mutable_data_ptr())};
  for (int64_t which = 0; which < 2; ++which) {
    std::fill_n(totals[which], p.C, 0.0f);
    for (int64_t chunk = 0; chunk < chunks; ++chunk)
      for (int64_t c = 0; c < p.C; ++c) totals[which][c] += p.partial[(2 * chunk + which) * p.C + c];
  }
  return {d_part, d_residual, d_weight, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("add_layer_norm_forward", TORCH_BOX(&add_layer_norm_forward));
  m.impl("add_layer_norm_backward", TORCH_BOX(&add_layer_norm_backward));
}

}  // namespace nlpfast
