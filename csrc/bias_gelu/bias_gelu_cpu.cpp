// Binding of the CPU kernels of bias_gelu: argument checks, threads, outputs, and the operations' registration.
#include "bias_gelu.h"

#include <algorithm>

#include "../cpu_capability.h"
#include "../dropout/dropping.h"

namespace nlpfast {

NLPFAST_DEFINE_CHOICE(BiasGeluKernels, bias_gelu_kernels, bias_gelu)

namespace {

// Elements that are worth a thread.
constexpr int64_t GRAIN = 16384;
// Chunks of rows whose sums are added up in the end, at most.
constexpr int64_t CHUNKS = 32;

void set_problem(BiasGelu& p, const Tensor& x, const std::optional<Tensor>& bias, int64_t activation,
                 const std::optional<Tensor>& seed, int64_t threshold) {
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) > 0, "x must be [N, C]");
  p.N = x.size(0), p.C = x.size(1), p.activation = static_cast<Activation>(activation);
  STD_TORCH_CHECK(activation >= 0 && activation <= 2, "activation must be 0, 1 or 2, got ", activation);
  check_contiguous(x, "x", p.N * p.C);
  p.dtype = floating_dtype(x, "x");
  p.x = static_cast<const char*>(x.const_data_ptr());
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float, "bias must be float32");
    check_contiguous(*bias, "bias", p.C);
    p.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  p.dropping = dropping_of(seed, threshold);
}

int64_t groups_of(const BiasGelu& p) { return (p.N + DROPOUT_ROWS - 1) / DROPOUT_ROWS; }

Tensor bias_gelu_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t activation,
                         const std::optional<Tensor>& seed, int64_t threshold) {
  BiasGeluForward p{};
  set_problem(p, x, bias, activation, seed, threshold);
  Tensor out = new_empty(x, {p.N, p.C});
  p.out = static_cast<char*>(out.mutable_data_ptr());
  if (p.N > 0)
    parallel_for(0, groups_of(p), std::max<int64_t>(1, GRAIN / (DROPOUT_ROWS * p.C)),
                 [&](int64_t begin, int64_t end) { bias_gelu_kernels().forward(p, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> bias_gelu_backward(const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias,
                                              int64_t activation, const std::optional<Tensor>& seed,
                                              int64_t threshold) {
  BiasGeluBackward p{};
  set_problem(p, x, bias, activation, seed, threshold);
  check_contiguous(grad, "grad", p.N * p.C);
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type(), "grad must have the dtype of x");
  Tensor dx = new_empty(x, {p.N, p.C});
  p.grad = static_cast<const char*>(grad.const_data_ptr());
  p.dx = static_cast<char*>(dx.mutable_data_ptr());
  const int64_t groups = groups_of(p);
  p.groups_per_chunk = std::max<int64_t>(1, (groups + CHUNKS - 1) / CHUNKS);
  const int64_t chunks = (groups + p.groups_per_chunk - 1) / p.groups_per_chunk;
  Tensor partial = new_empty(x, {chunks, p.C}, ScalarType::Float), d_bias = new_empty(x, {p.C}, ScalarType::Float);
  p.partial = static_cast<float*>(partial.mutable_data_ptr());
  if (chunks > 0)
    parallel_for(0, chunks, std::max<int64_t>(1, GRAIN / (DROPOUT_ROWS * p.groups_per_chunk * p.C)),
                 [&](int64_t begin, int64_t end) { bias_gelu_kernels().backward(p, begin, end); });
  auto* total = static_cast<float*>(d_bias.mutable_data_ptr());
  std::fill_n(total, p.C, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t c = 0; c < p.C; ++c) total[c] += p.partial[chunk * p.C + c];
  return {dx, d_bias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("bias_gelu_forward", TORCH_BOX(&bias_gelu_forward));
  m.impl("bias_gelu_backward", TORCH_BOX(&bias_gelu_backward));
}

}  // namespace nlpfast
