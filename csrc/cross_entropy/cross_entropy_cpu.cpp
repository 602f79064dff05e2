// Binding of the CPU kernels of cross entropy: argument checks, threads, outputs, and the operations' registration.
#include "../cpu_capability.h"
#include "../stable.h"
#include "cross_entropy.h"

namespace nlpfast {

NLPFAST_DEFINE_CHOICE(CrossEntropyKernels, cross_entropy_kernels, cross_entropy)

namespace {

// Gradients from this size on do not stay in a cache until they are used.
constexpr int64_t STREAMED_BYTES = int64_t{16} << 20;
// Elements that are worth a thread.
constexpr int64_t GRAIN = 32768;

struct Options {
  int64_t ignore_index, pad_index;
  double on_target, on_other;
};

Rows rows_of(const Tensor& x) { return {static_cast<char*>(x.mutable_data_ptr()), x.stride(0), x.stride(1)}; }

void set_problem(CrossEntropy& p, const Tensor& input, const Tensor& target, const Options& options) {
  STD_TORCH_CHECK(input.is_cpu() && input.dim() == 3, "input must be a CPU tensor [B, T, V]");
  STD_TORCH_CHECK(input.size(2) <= 1 || input.stride(2) == 1, "the classes of a row of input must lie together");
  check_cpu(target, "target", ScalarType::Long, "int64", 2);
  STD_TORCH_CHECK(target.size(0) == input.size(0) && target.size(1) == input.size(1) && target.is_contiguous(),
                  "target must be contiguous [B, T]");
  p.dtype = floating_dtype(input, "input");
  p.T = input.size(1), p.V = input.size(2);
  p.input = rows_of(input);
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  p.ignore_index = options.ignore_index, p.pad_index = options.pad_index;
  p.on_target = (float)options.on_target, p.on_other = (float)options.on_other;
  p.stream = input.numel() * size_of(p.dtype) >= STREAMED_BYTES;
  // Kernels index with targets: a wrong one must not be read with.
  for (int64_t i = 0; i < target.numel(); ++i)
    STD_TORCH_CHECK(p.target[i] == p.ignore_index || (p.target[i] >= 0 && p.target[i] < p.V), "target ", p.target[i],
                    " lies outside of the classes 0..", p.V - 1);
  STD_TORCH_CHECK(p.pad_index >= -1 && p.pad_index < p.V, "pad_index ", p.pad_index, " lies outside of the classes");
}

template <class F>
void for_rows(const Tensor& input, F&& f) {
  const int64_t rows = input.size(0) * input.size(1), V = input.size(2);
  if (rows > 0) parallel_for(0, rows, std::max<int64_t>(1, GRAIN / std::max<int64_t>(1, V)), f);
}

void check_gradient(const Tensor& gradient, const Tensor& input) {
  STD_TORCH_CHECK(gradient.is_cpu() && gradient.dim() == 3 && gradient.scalar_type() == input.scalar_type(),
                  "gradient must be a CPU tensor [B, T, V] in the dtype of input");
  for (int64_t dim = 0; dim < 3; ++dim)
    STD_TORCH_CHECK(gradient.size(dim) == input.size(dim), "gradient must have the sizes of input");
  STD_TORCH_CHECK(gradient.size(2) <= 1 || gradient.stride(2) == 1,
                  "the classes of a row of gradient must lie together");
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results run_forward(const Tensor& input, const Tensor& target, const Options& options, const Tensor* gradient,
                    double grad_scale) {
  CrossEntropyForward p{};
  set_problem(p, input, target, options);
  const int64_t B = input.size(0), T = input.size(1);
  Tensor loss = new_empty(input, {B, T}, ScalarType::Float), nll = new_empty(input, {B, T}, ScalarType::Float);
  Tensor correct = new_empty(input, {B, T}, ScalarType::Bool);
  Tensor statistics = new_empty(input, {B, T, 2}, ScalarType::Float);
  p.loss = static_cast<float*>(loss.mutable_data_ptr()), p.nll = static_cast<float*>(nll.mutable_data_ptr());
  p.correct = static_cast<bool*>(correct.mutable_data_ptr());
  p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  p.grad_scale = (float)grad_scale;
  if (gradient) p.gradient = rows_of(*gradient);
  for_rows(input, [&](int64_t begin, int64_t end) { cross_entropy_kernels().forward(p, begin, end); });
  return {loss, nll, correct, statistics};
}

Results cross_entropy_forward(const Tensor& input, const Tensor& target, int64_t ignore_index, int64_t pad_index,
                              double on_target, double on_other) {
  return run_forward(input, target, {ignore_index, pad_index, on_target, on_other}, nullptr, 0.0);
}

Results cross_entropy_forward_out(const Tensor& input, const Tensor& target, int64_t ignore_index, int64_t pad_index,
                                  double on_target, double on_other, double grad_scale, const Tensor& gradient) {
  check_gradient(gradient, input);
  return run_forward(input, target, {ignore_index, pad_index, on_target, on_other}, &gradient, grad_scale);
}

void run_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target, const Tensor& statistics,
                  const Options& options, const Tensor& gradient) {
  CrossEntropyBackward p{};
  set_problem(p, input, target, options);
  check_cpu(grad_loss, "grad_loss", ScalarType::Float, "float32", 2);
  check_cpu(statistics, "statistics", ScalarType::Float, "float32", 3);
  STD_TORCH_CHECK(grad_loss.is_contiguous() && grad_loss.numel() == target.numel() && statistics.is_contiguous() &&
                      statistics.numel() == 2 * target.numel(),
                  "grad_loss and statistics must be contiguous, one and two numbers a row");
  check_gradient(gradient, input);
  p.grad_loss = static_cast<const float*>(grad_loss.const_data_ptr());
  p.statistics = static_cast<const float*>(statistics.const_data_ptr());
  p.gradient = rows_of(gradient);
  for_rows(input, [&](int64_t begin, int64_t end) { cross_entropy_kernels().backward(p, begin, end); });
}

Tensor cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                              const Tensor& statistics, int64_t ignore_index, int64_t pad_index, double on_target,
                              double on_other) {
  Tensor gradient = new_empty(input, {input.size(0), input.size(1), input.size(2)});
  run_backward(grad_loss, input, target, statistics, {ignore_index, pad_index, on_target, on_other}, gradient);
  return gradient;
}

void cross_entropy_backward_out(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                const Tensor& statistics, int64_t ignore_index, int64_t pad_index, double on_target,
                                double on_other, const Tensor& gradient) {
  run_backward(grad_loss, input, target, statistics, {ignore_index, pad_index, on_target, on_other}, gradient);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("cross_entropy_forward", TORCH_BOX(&cross_entropy_forward));
  m.impl("cross_entropy_forward_out", TORCH_BOX(&cross_entropy_forward_out));
  m.impl("cross_entropy_backward", TORCH_BOX(&cross_entropy_backward));
  m.impl("cross_entropy_backward_out", TORCH_BOX(&cross_entropy_backward_out));
}

}  // namespace nlpfast
