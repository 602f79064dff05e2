// Residual sum, dropout and layer norm on raw pointers: what the binding hands to the kernels of an instruction set.
//
// Shapes: N rows of C channels, contiguous, as in nlpfast/ops/add_layer_norm/reference.py.
#pragma once

#include <cstdint>

#include "../dropout/dropout.h"

namespace nlpfast {

struct AddLayerNorm {
  int64_t N, C;
  Dtype part_dtype, sum_dtype, out_dtype;
  Dropping dropping;    // of part
  const float* weight;  // [C]
  float* statistics;    // [N, 2]: the mean, and 1 over the standard deviation
};

struct AddLayerNormForward : AddLayerNorm {
  const char *part, *residual;
  const float* bias;  // [C], or null
  float eps;
  char *sum, *out;
};

struct AddLayerNormBackward : AddLayerNorm {
  const char *grad_out, *grad_sum, *sum;  // grad_sum may be null
  char *d_part, *d_residual;              // d_part may be null
  int64_t groups_per_chunk;
  float* partial;  // [chunks, 2, C]: the gradients of weight and bias over the rows of a chunk
};

// Groups [begin, end) of DROPOUT_ROWS rows; chunks [begin, end) of groups.
struct AddLayerNormKernels {
  void (*forward)(const AddLayerNormForward&, int64_t begin, int64_t end);
  void (*backward)(const AddLayerNormBackward&, int64_t begin, int64_t end);
};

// The kernels of the instruction set in use (see cpu_capability.h).
const AddLayerNormKernels& add_layer_norm_kernels();

}  // namespace nlpfast
