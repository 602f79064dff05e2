// One step of Adamax on raw pointers: what the binding hands to the kernels of an instruction set.
#pragma once

#include <cstdint>

namespace nlpfast {

// See nlpfast/optim.py; all arrays have n floats.
struct Adamax {
  int64_t n;
  float *param, *mean, *size;
  const float* grad;
  float beta1, complement, beta2, eps;  // complement: 1 - beta1, from more digits
  float rate;                           // lr / (1 - beta1^t)
  float decay;                          // lr times the weight decay
};

// Blocks [begin, end) of ADAMAX_BLOCK elements.
constexpr int64_t ADAMAX_BLOCK = 1024;

struct AdamaxKernels {
  void (*step)(const Adamax&, int64_t begin, int64_t end);
};

// The kernels of the instruction set in use (see cpu_capability.h).
const AdamaxKernels& adamax_kernels();

}  // namespace nlpfast
