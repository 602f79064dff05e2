// Cross entropy on raw pointers: what the bindings hand to the kernels of an instruction set.
//
// A row is one of B * T, number b * T + t; shapes are as in nlpfast/ops/cross_entropy/reference.py.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace nlpfast {

// Rows of V elements that lie together; strides in elements.
struct Rows {
  char* data;
  int64_t batch, row;
};

struct CrossEntropy {
  Dtype dtype;  // of the logits and their gradient
  int64_t T, V;
  Rows input;             // [B, T, V], only read, unless it is the gradient too
  const int64_t* target;  // [B, T], contiguous
  int64_t ignore_index, pad_index;
  float on_target, on_other;
  Rows gradient;  // [B, T, V], or null
  bool stream;    // whether the gradient is too large to stay in a cache
};

struct CrossEntropyForward : CrossEntropy {
  float *loss, *nll;  // [B, T]
  bool* correct;      // [B, T]
  float* statistics;  // [B, T, 2]: the maximum; the sum of exp(x - maximum) over the classes but the target
  float grad_scale;
};

struct CrossEntropyBackward : CrossEntropy {
  const float* statistics;
  const float* grad_loss;  // [B, T], contiguous
};

// Rows [begin, end).
struct CrossEntropyKernels {
  void (*forward)(const CrossEntropyForward&, int64_t begin, int64_t end);
  void (*backward)(const CrossEntropyBackward&, int64_t begin, int64_t end);
};

// The kernels of the instruction set in use (see cpu_capability.h).
const CrossEntropyKernels& cross_entropy_kernels();

}  // namespace nlpfast
