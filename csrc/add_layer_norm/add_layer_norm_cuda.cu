// Residual sum, dropout and layer norm on CUDA devices.
//
//     s = residual + mask factor part     y = (s - mean) rstd weight + bias
//     g = weight dy     x = (s - mean) rstd
//     ds = rstd (g - mean(g) - x mean(g x)) + the gradient of s that comes from elsewhere     d_part = mask factor ds
//
// Each tensor is read once and written once. A thread has eight channels of eight rows, for which one call of Philox in
// each channel decides; the rows go through its registers some at a time. Threads with the same threadIdx.y have a
// group of eight rows together, and where rows are short a block has several. In the backward pass a block goes through
// its groups in order and leaves one sum of each channel for the gradients of weight and bias, which PyTorch adds up:
// there are no atomics, and the bits are the same every time.
//
// Where C is no multiple of eight, rows begin anywhere and are read and written an element at a time (VECTORS is
// false).
//
// Legend: N rows, C channels; statistics are mean and rstd of each row.
#include "../cuda_launch.h"
#include "add_layer_norm_cuda_row.h"

namespace nlpfast::cuda {
namespace {

// Threads of a block where rows are short, and blocks of the backward pass at most.
constexpr unsigned THREADS = 128, BLOCKS = 1056;

struct Shape {
  dim3 block;
  size_t shared;
};

// A group is as many threads as its channels need, in whole warps.
Shape shape_of(int64_t C) {
  const unsigned x = static_cast<unsigned>((C + COLUMNS * WARP_SIZE - 1) / (COLUMNS * WARP_SIZE)) * WARP_SIZE;
  const unsigned y = x < THREADS ? THREADS / x : 1;
  const size_t scratch = size_t{y} * FORWARD_ROWS * WARP_SIZE * sizeof(float), totals = 2 * C * sizeof(float);
  return {{x, y}, scratch > totals ? scratch : totals};
}

unsigned blocks_of(int64_t groups, const Shape& shape) {
  return static_cast<unsigned>((groups + shape.block.y - 1) / shape.block.y);
}

void check_contiguous_on(const Tensor& x, const char* name, const Tensor& residual) {
  check_on_device(x, name, residual);
  STD_TORCH_CHECK(x.is_contiguous() && x.dim() == 2 && x.size(0) == residual.size(0) && x.size(1) == residual.size(1),
                  name, " must be contiguous [N, C]");
  STD_TORCH_CHECK(x.size(1) % COLUMNS || reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0, name,
                  " must begin at a multiple of 16 bytes");
}

const float* floats_of(const Tensor& x, const char* name, const Tensor& residual, int64_t n) {
  check_on_device(x, name, residual);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == n, name, " must be ", n,
                  " contiguous float32");
  return static_cast<const float*>(x.const_data_ptr());
}

Problem problem_of(const Tensor& residual, const Tensor& weight, const std::optional<Tensor>& seed, int64_t threshold) {
  STD_TORCH_CHECK(residual.dim() == 2 && residual.size(1) > 0 && residual.size(1) <= MAX_CHANNELS,
                  "residual must be [N, C], C up to ", MAX_CHANNELS);
  check_contiguous_on(residual, "residual", residual);
  Problem p{};
  p.N = residual.size(0), p.C = static_cast<int>(residual.size(1));
  const int64_t groups = (p.N + GROUP - 1) / GROUP;
  STD_TORCH_CHECK(groups <= 0x7fffffff, "there are too many rows");
  p.groups = static_cast<unsigned>(groups);
  p.weight = floats_of(weight, "weight", residual, p.C);
  STD_TORCH_CHECK(threshold >= 0 && threshold < 65536, "threshold must be in [0, 65536)");
  if (threshold == 0) return p;
  STD_TORCH_CHECK(seed && seed->scalar_type() == ScalarType::Long && seed->is_contiguous() && seed->numel() == 2,
                  "seed must be two int64 with dropout");
  check_on_device(*seed, "seed", residual);
  p.dropping = {static_cast<const int64_t*>(seed->const_data_ptr()), static_cast<int>(threshold),
                static_cast<float>(65536.0 / static_cast<double>(65536 - threshold))};
  return p;
}

// Calls f with the types of part, sum and norm that there are kernels for: all the same, or a sum in float32 of 16 bits
// from the layer before and for the layer that comes, or for that alone.
template <class F>
void with_types(Dtype part, Dtype sum, Dtype out, int C, F&& with) {
  const auto are = [&](Dtype a, Dtype b, Dtype c) { return part == a && sum == b && out == c; };
  constexpr Dtype S = Dtype::float32, B = Dtype::bfloat16, H = Dtype::float16;
  const auto f = [&]<class P, class R, class O>() {
    C % COLUMNS ? with.template operator()<P, R, O, false>() : with.template operator()<P, R, O, true>();
  };
  if (are(S, S, S)) return f.template operator()<float, float, float>();
  if (are(B, B, B)) return f.template operator()<Bfloat16, Bfloat16, Bfloat16>();
  if (are(H, H, H)) return f.template operator()<Float16, Float16, Float16>();
  if (are(B, S, B)) return f.template operator()<Bfloat16, float, Bfloat16>();
  if (are(H, S, H)) return f.template operator()<Float16, float, Float16>();
  if (are(B, S, S)) return f.template operator()<Bfloat16, float, float>();
  if (are(H, S, S)) return f.template operator()<Float16, float, float>();
  STD_TORCH_CHECK(false, "there are no kernels for these dtypes of part, residual and norm");
}

std::tuple<Tensor, Tensor, Tensor> cuda_add_layer_norm_forward(const Tensor& part, const Tensor& residual,
                                                               const Tensor& weight, const std::optional<Tensor>& bias,
                                                               const std::optional<Tensor>& seed, int64_t threshold,
                                                               double eps, ScalarType out_dtype) {
  Problem p = problem_of(residual, weight, seed, threshold);
  check_contiguous_on(part, "part", residual);
  if (bias) p.bias = floats_of(*bias, "bias", residual, p.C);
  p.eps = static_cast<float>(eps);
  Tensor sum = new_empty(residual, {p.N, p.C}), out = new_empty(residual, {p.N, p.C}, out_dtype);
  Tensor statistics = new_empty(residual, {p.N, 2}, ScalarType::Float);
  p.part = part.const_data_ptr(), p.residual = residual.const_data_ptr();
  p.sum = sum.mutable_data_ptr(), p.out = out.mutable_data_ptr();
  p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  if (p.N > 0) {
    const OnDevice guard(residual);
    const Shape shape = shape_of(p.C);
    with_types(floating_dtype(part, "part"), floating_dtype(residual, "residual"), floating_dtype(out, "out_dtype"),
               p.C, [&]<class Part, class Sum, class Out, bool VECTORS>() {
                 launch<&forward<Part, Sum, Out, VECTORS>>({blocks_of(p.groups, shape)}, shape.block, shape.shared, p);
               });
  }
  return {sum, out, statistics};
}

// The gradients of part and residual, and sums [blocks, 2, C] of those of weight and bias.
std::tuple<Tensor, Tensor, Tensor> cuda_add_layer_norm_backward(const Tensor& grad_out,
                                                                const std::optional<Tensor>& grad_sum,
                                                                const Tensor& sum, const Tensor& statistics,
                                                                const Tensor& weight, const std::optional<Tensor>& seed,
                                                                int64_t threshold, ScalarType part_dtype) {
  Problem p = problem_of(sum, weight, seed, threshold);
  check_contiguous_on(grad_out, "grad_out", sum);
  if (grad_sum) {
    check_contiguous_on(*grad_sum, "grad_sum", sum);
    STD_TORCH_CHECK(grad_sum->scalar_type() == sum.scalar_type(), "grad_sum must have the dtype of the sum");
    p.grad_sum = grad_sum->const_data_ptr();
  }
  p.statistics = const_cast<float*>(floats_of(statistics, "statistics", sum, 2 * p.N));
  const bool apart = threshold > 0 || part_dtype != sum.scalar_type();
  const Shape shape = shape_of(p.C);
  const unsigned wanted = blocks_of(p.groups, shape), blocks = wanted < BLOCKS ? wanted : BLOCKS;
  Tensor d_part = new_empty(sum, {apart ? p.N : 0, p.C}, part_dtype), d_residual = new_empty(sum, {p.N, p.C});
  Tensor sums = new_empty(sum, {static_cast<int64_t>(blocks), 2, p.C}, ScalarType::Float);
  p.grad_out = grad_out.const_data_ptr(), p.sum = const_cast<void*>(sum.const_data_ptr());
  p.d_part = apart ? d_part.mutable_data_ptr() : nullptr, p.d_residual = d_residual.mutable_data_ptr();
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  if (p.N > 0) {
    const OnDevice guard(sum);
    with_types(floating_dtype(d_part, "part_dtype"), floating_dtype(sum, "sum"), floating_dtype(grad_out, "grad_out"),
               p.C, [&]<class Part, class Sum, class Out, bool VECTORS>() {
                 launch<&backward<Part, Sum, Out, VECTORS>>({blocks}, shape.block, shape.shared, p);
               });
  }
  return {d_part, d_residual, sums};
}

}  // namespace
}  // namespace nlpfast::cuda

STABLE_TORCH_LIBRARY_IMPL(nlpfast, NLPFAST_CUDA_KEY, m) {
  m.impl("cuda_add_layer_norm_forward", TORCH_BOX(&nlpfast::cuda::cuda_add_layer_norm_forward));
  m.impl("cuda_add_layer_norm_backward", TORCH_BOX(&nlpfast::cuda::cuda_add_layer_norm_backward));
}
