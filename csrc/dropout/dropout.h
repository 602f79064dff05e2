// Dropout on raw pointers: what the binding hands to the kernels of an instruction set.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace nlpfast {

// Values of the random bits of an element.
constexpr int64_t DROPPED_OF = 65536;

// How elements are dropped.
struct Dropping {
  uint64_t seed = 0;
  uint32_t offset = 0;
  int32_t threshold = 0;  // what has 16 random bits below it is dropped; 0 for no dropout
  float factor = 1;       // of what stays
};

// Columns of the matrix that a tensor's elements count as, and rows that share a call of Philox.
constexpr int64_t DROPOUT_COLUMNS = 64, DROPOUT_ROWS = 8;

// Element e of x is in row e / 64 and column e % 64 (see nlpfast/ops/dropout/reference.py).
struct Dropout {
  Dtype dtype;
  int64_t n;
  const char* x;
  char* out;  // may be x
  Dropping dropping;
};

// Groups [begin, end) of 8 rows.
struct DropoutKernels {
  void (*forward)(const Dropout&, int64_t begin, int64_t end);
};

// The kernels of the instruction set in use (see cpu_capability.h).
const DropoutKernels& dropout_kernels();

}  // namespace nlpfast
