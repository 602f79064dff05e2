// Binding of the CPU kernel of Adamax: argument checks, threads, and the operation's registration.
#include "adamax.h"

#include "../cpu_capability.h"
#include "../stable.h"

namespace nlpfast {

NLPFAST_DEFINE_CHOICE(AdamaxKernels, adamax_kernels, adamax)

namespace {

// Blocks that are worth a thread.
constexpr int64_t GRAIN = 16;

float* floats_of(const Tensor& x, const char* name, int64_t n) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, " must be float32");
  check_contiguous(x, name, n);
  return static_cast<float*>(x.mutable_data_ptr());
}

void adamax_step(const Tensor& param, const Tensor& grad, const Tensor& mean, const Tensor& size, double beta1,
                 double beta2, double eps, double rate, double decay) {
  Adamax p{};
  p.n = param.numel();
  p.param = floats_of(param, "param", p.n), p.grad = floats_of(grad, "grad", p.n);
  p.mean = floats_of(mean, "mean", p.n), p.size = floats_of(size, "size", p.n);
  p.beta1 = (float)beta1, p.complement = (float)(1.0 - beta1), p.beta2 = (float)beta2;
  p.eps = (float)eps, p.rate = (float)rate, p.decay = (float)decay;
  if (p.n > 0)
    parallel_for(0, (p.n + ADAMAX_BLOCK - 1) / ADAMAX_BLOCK, GRAIN,
                 [&](int64_t begin, int64_t end) { adamax_kernels().step(p, begin, end); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(nlpfast, CPU, m) { m.impl("adamax_step", TORCH_BOX(&adamax_step)); }

}  // namespace nlpfast
