// Binding of the CPU kernels of dropout: argument checks, threads, output, and the operations' registration.
#include "../cpu_capability.h"
#include "dropping.h"

namespace nlpfast {

NLPFAST_DEFINE_CHOICE(DropoutKernels, dropout_kernels, dropout)

namespace {

// Groups of 512 elements that are worth a thread.
constexpr int64_t GRAIN = 64;

Tensor dropout_forward(const Tensor& x, const Tensor& seed, int64_t threshold) {
  Dropout p{};
  p.dtype = floating_dtype(x, "x");
  p.n = x.numel();
  check_contiguous(x, "x", p.n);
  p.dropping = dropping_of(seed, threshold);
  Tensor out = torch::stable::empty_like(x);
  p.x = static_cast<const char*>(x.const_data_ptr());
  p.out = static_cast<char*>(out.mutable_data_ptr());
  constexpr int64_t GROUP = DROPOUT_COLUMNS * DROPOUT_ROWS;
  if (p.n > 0)
    parallel_for(0, (p.n + GROUP - 1) / GROUP, GRAIN,
                 [&](int64_t begin, int64_t end) { dropout_kernels().forward(p, begin, end); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) {
  m.impl("dropout_forward", TORCH_BOX(&dropout_forward));
  m.impl("dropout_backward", TORCH_BOX(&dropout_forward));
}

}  // namespace nlpfast
