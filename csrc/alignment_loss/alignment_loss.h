// Log probabilities of attention at single pairs, on raw pointers: what the bindings hand to the kernels.
//
// Shapes are as in nlpfast/ops/alignment_loss/reference.py. A unit of work is a batch entry and a key head with the
// query heads that read it, number b * Hk + hk: no two units write to the same row.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace nlpfast {

// [B, heads, rows, D], a row's elements side by side; strides in elements. Null for what is not wanted.
struct Heads {
  char* data;
  int64_t batch, head, row;
};

struct AlignmentLoss {
  Dtype dtype;                // of query and key
  int64_t H, Hk, L, S, D, n;  // n heads asked for
  Heads query, key;           // only read
  const int64_t* pairs;       // [P, 3], contiguous: batch entry, query, key
  // Numbers of the pairs of batch entry b, from begin[b] up to begin[b + 1]: by queries, and by keys (for the
  // backward).
  const int64_t *by_query, *by_key, *begin;
  const int64_t* heads;  // [n]
  float scale;
};

struct AlignmentLossForward : AlignmentLoss {
  const float* lse;  // [B, H, L], contiguous
  float* terms;      // [P, n]
};

struct AlignmentLossBackward : AlignmentLoss {
  const float* coefficients;  // [P, n]
  Heads d_query, d_key;       // added to, in the dtype of query and key
  float* d_lse;               // [B, H, L], contiguous, added to; or null
};

// Units [begin, end).
struct AlignmentLossKernels {
  void (*forward)(const AlignmentLossForward&, int64_t begin, int64_t end);
  void (*backward)(const AlignmentLossBackward&, int64_t begin, int64_t end);
};

// The kernels of the instruction set in use (see cpu_capability.h).
const AlignmentLossKernels& alignment_loss_kernels();

}  // namespace nlpfast
