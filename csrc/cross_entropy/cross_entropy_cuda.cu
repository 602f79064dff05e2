// Cross entropy on CUDA devices: a block a row, which may also write the row's gradient.
//
//     total = sum_v exp(x_v - top),  nll = log total + top - x_target,  loss = sum_v q_v (log total + top - x_v)
//     dx_v = g (exp(x_v - top) / total - q_v)
//
// whole_row holds a row in registers: it is read once and its gradient written once. A thread's pieces are a block's
// width apart, all of them under way before the first is used. Longer rows are left to long_row, which reads them
// twice, the second time from the L2 cache; in its first pass each thread keeps a maximum of its own and a sum relative
// to it (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
//
// A row is described relative to the largest of its *other* logits, those that are not the target's: rest = sum over
// v != target of exp(x_v - largest), which lies between 1 and V, so that nothing cancels and nothing vanishes in a row
// whose target is far above all others. A piece that holds the target, or the class without mass, is looked at class by
// class; the gradients of both are put right when the others are written.
//
// A piece is 16 bytes. Where rows begin anywhere, as with an odd number of classes, it is put together out of two
// (Unaligned). Sums are added in an order that depends on V and the dtype alone. There are no atomics.
//
// Legend: B sequences, T rows of each, V classes.
#include "../cuda_launch.h"
#include "cross_entropy_cuda_row.h"

namespace nlpfast::cuda {
namespace {

constexpr int LONG_THREADS = 1024, GRADIENT_THREADS = 256;

// The shared memory of a block that holds so many pieces of a row.
template <bool UNALIGNED>
constexpr size_t shared_of(int pieces, int threads) {
  return SCRATCH + (UNALIGNED ? edges_of(pieces, threads) : 0);
}

template <class E, bool UNALIGNED, int THREADS, int PIECES>
void launch_forward(const Problem& p, unsigned rows) {
  launch<&whole_row<E, PER_VECTOR<E>, THREADS, PIECES, UNALIGNED>>({rows}, {THREADS},
                                                                   shared_of<UNALIGNED>(PIECES, THREADS), p);
}

// The smallest kernel that holds the row.
template <class E, bool UNALIGNED>
void forward(const Problem& p, unsigned rows) {
  constexpr int PER = PER_VECTOR<E>;
  const int pieces = (p.V + PER - 1) / PER;
  if (pieces <= 128) return launch_forward<E, UNALIGNED, 128, 1>(p, rows);
  if (pieces <= 512) return launch_forward<E, UNALIGNED, 128, 4>(p, rows);
  if (pieces <= 2048) return launch_forward<E, UNALIGNED, 256, 8>(p, rows);
  if (pieces <= 4096) return launch_forward<E, UNALIGNED, 512, 8>(p, rows);
  if (pieces <= 8192) return launch_forward<E, UNALIGNED, 1024, 8>(p, rows);
  launch<&long_row<E, PER, LONG_THREADS, UNALIGNED>>({rows}, {LONG_THREADS}, shared_of<UNALIGNED>(AHEAD, LONG_THREADS),
                                                     p);
}

template <class E, bool UNALIGNED>
void backward(const Problem& p, unsigned rows) {
  launch<&gradient_row<E, PER_VECTOR<E>, GRADIENT_THREADS, UNALIGNED>>({rows}, {GRADIENT_THREADS},
                                                                       shared_of<UNALIGNED>(1, GRADIENT_THREADS), p);
}

void check_rows(const Tensor& x, const char* name, const Tensor& input) {
  check_on_device(x, name, input);
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(2) <= 1 || x.stride(2) == 1), name,
                  " must be [B, T, V], the classes of a row side by side");
  STD_TORCH_CHECK(x.scalar_type() == input.scalar_type(), name, " must have the dtype of input");
  for (int64_t dim = 0; dim < 3; ++dim)
    STD_TORCH_CHECK(x.size(dim) == input.size(dim), name, " must have the sizes of input");
}

Rows rows_of(const Tensor& x) { return {static_cast<char*>(x.mutable_data_ptr()), x.stride(0), x.stride(1)}; }

Problem problem_of(const Tensor& input, const Tensor& target, int64_t ignore_index, int64_t pad_index, double on_target,
                   double on_other) {
  check_rows(input, "input", input);
  check_on_device(target, "target", input);
  STD_TORCH_CHECK(target.scalar_type() == ScalarType::Long && target.dim() == 2 && target.is_contiguous() &&
                      target.size(0) == input.size(0) && target.size(1) == input.size(1),
                  "target must be contiguous int64 [B, T]");
  STD_TORCH_CHECK(input.size(2) <= (1 << 30), "there are too many classes");
  STD_TORCH_CHECK(pad_index >= -1 && pad_index < input.size(2), "pad_index ", pad_index, " is no class");
  STD_TORCH_CHECK(input.size(0) * input.size(1) <= 0x7fffffff, "there are too many rows");
  Problem p{};
  p.x = rows_of(input);
  p.target = static_cast<const int64_t*>(target.const_data_ptr());
  p.T = static_cast<unsigned>(input.size(1)), p.V = static_cast<int>(input.size(2)),
  p.pad_index = static_cast<int>(pad_index);
  p.ignore_index = ignore_index;
  // 1 - on_target is taken before it is rounded
  p.on_target = static_cast<float>(on_target), p.off_target = static_cast<float>(1.0 - on_target);
  p.on_other = static_cast<float>(on_other);
  return p;
}

const float* scale_of(const std::optional<Tensor>& scale, const Tensor& input) {
  if (!scale) return nullptr;
  check_on_device(*scale, "grad_scale", input);
  STD_TORCH_CHECK(scale->scalar_type() == ScalarType::Float && scale->numel() == 1, "grad_scale must be one float32");
  return static_cast<const float*>(scale->const_data_ptr());
}

// Calls f.template operator()<E, UNALIGNED>() for the dtype, and for rows that begin anywhere or not.
template <class F>
void with_elements(const Tensor& input, bool aligned, F&& f) {
  const auto with = [&]<class E>() { aligned ? f.template operator()<E, false>() : f.template operator()<E, true>(); };
  const Dtype dtype = floating_dtype(input, "input");
  if (dtype == Dtype::float32) return with.template operator()<float>();
  if (dtype == Dtype::bfloat16) return with.template operator()<Bfloat16>();
  with.template operator()<Float16>();
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Results cuda_cross_entropy_forward(const Tensor& input, const Tensor& target, int64_t ignore_index, int64_t pad_index,
                                   double on_target, double on_other, const std::optional<Tensor>& grad_scale,
                                   const std::optional<Tensor>& gradient) {
  Problem p = problem_of(input, target, ignore_index, pad_index, on_target, on_other);
  STD_TORCH_CHECK(grad_scale.has_value() == gradient.has_value(), "a gradient has a scale, and the other way round");
  bool aligned = whole_vectors(input);
  if (gradient) {
    check_rows(*gradient, "gradient", input);
    p.gradient = rows_of(*gradient), p.scale = scale_of(grad_scale, input);
    aligned = aligned && whole_vectors(*gradient);
  }
  const int64_t B = input.size(0), T = input.size(1);
  Tensor loss = new_empty(input, {B, T}, ScalarType::Float), nll = new_empty(input, {B, T}, ScalarType::Float);
  Tensor correct = new_empty(input, {B, T}, ScalarType::Bool);
  Tensor statistics = new_empty(input, {B, T, 2}, ScalarType::Float);
  p.loss = static_cast<float*>(loss.mutable_data_ptr()), p.nll = static_cast<float*>(nll.mutable_data_ptr());
  p.correct = static_cast<bool*>(correct.mutable_data_ptr());
  p.statistics = static_cast<float*>(statistics.mutable_data_ptr());
  if (B * T > 0) {
    const OnDevice guard(input);
    with_elements(input, aligned,
                  [&]<class E, bool UNALIGNED>() { forward<E, UNALIGNED>(p, static_cast<unsigned>(B * T)); });
  }
  return {loss, nll, correct, statistics};
}

void cuda_cross_entropy_backward(const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                                 const Tensor& statistics, const std::optional<Tensor>& grad_scale,
                                 int64_t ignore_index, int64_t pad_index, double on_target, double on_other,
                                 bool rescale, const Tensor& gradient) {
  Problem p = problem_of(input, target, ignore_index, pad_index, on_target, on_other);
  check_rows(gradient, "gradient", input);
  check_on_device(grad_loss, "grad_loss", input);
  check_on_device(statistics, "statistics", input);
  STD_TORCH_CHECK(grad_loss.scalar_type() == ScalarType::Float && grad_loss.dim() == 2 &&
                      grad_loss.size(0) == input.size(0) && grad_loss.size(1) == input.size(1),
                  "grad_loss must be float32 [B, T]");
  STD_TORCH_CHECK(statistics.scalar_type() == ScalarType::Float && statistics.is_contiguous() &&
                      statistics.numel() == 2 * target.numel(),
                  "statistics must be contiguous float32 [B, T, 2]");
  STD_TORCH_CHECK(!rescale || grad_scale, "to rescale, grad_scale is needed");
  p.gradient = rows_of(gradient), p.scale = scale_of(grad_scale, input), p.rescale = rescale;
  p.upstream = static_cast<const float*>(grad_loss.const_data_ptr());
  p.upstream_batch = grad_loss.stride(0), p.upstream_row = grad_loss.stride(1);
  p.statistics = const_cast<float*>(static_cast<const float*>(statistics.const_data_ptr()));
  const int64_t rows = input.size(0) * input.size(1);
  if (rows == 0) return;
  const OnDevice guard(input);
  const bool aligned = whole_vectors(gradient) && (rescale || whole_vectors(input));
  with_elements(input, aligned,
                [&]<class E, bool UNALIGNED>() { backward<E, UNALIGNED>(p, static_cast<unsigned>(rows)); });
}

}  // namespace
}  // namespace nlpfast::cuda

STABLE_TORCH_LIBRARY_IMPL(nlpfast, NLPFAST_CUDA_KEY, m) {
  m.impl("cuda_cross_entropy_forward", TORCH_BOX(&nlpfast::cuda::cuda_cross_entropy_forward));
  m.impl("cuda_cross_entropy_backward", TORCH_BOX(&nlpfast::cuda::cuda_cross_entropy_backward));
}
