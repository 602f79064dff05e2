// Bias, an activation and dropout on raw pointers: what the binding hands to the kernels of an instruction set.
//
// Shapes: N rows of C channels, contiguous, as in nlpfast/ops/bias_gelu/reference.py.
#pragma once

#include <cstdint>

#include "../dropout/dropout.h"

namespace nlpfast {

// GELU by the error function or by a hyperbolic tangent, or ReLU: what the operations' `activation` counts.
enum class Activation : int64_t { erf, tanh, relu };

struct BiasGelu {
  int64_t N, C;
  Dtype dtype;  // of x, and of what is written
  Activation activation;
  Dropping dropping;  // of the result
  const char* x;      // [N, C]
  const float* bias;  // [C], or null
};

struct BiasGeluForward : BiasGelu {
  char* out;
};

struct BiasGeluBackward : BiasGelu {
  const char* grad;
  char* dx;
  int64_t groups_per_chunk;
  float* partial;  // [chunks, C]: the gradient of bias over the rows of a chunk
};

// Groups [begin, end) of DROPOUT_ROWS rows; chunks [begin, end) of groups.
struct BiasGeluKernels {
  void (*forward)(const BiasGeluForward&, int64_t begin, int64_t end);
  void (*backward)(const BiasGeluBackward&, int64_t begin, int64_t end);
};

// The kernels of the instruction set in use (see cpu_capability.h).
const BiasGeluKernels& bias_gelu_kernels();

}  // namespace nlpfast
