// What dropout multiplies the elements of eight rows by.
#pragma once

#include "../philox.h"
#include "dropout.h"

namespace nlpfast::NLPFAST_ISA {

// factors: [DROPOUT_ROWS, width], 0 where an element of this group of rows is dropped; `width` in whole registers.
inline void fill_factors(const Dropping& d, int64_t group, int64_t width, float* factors) {
  for (int64_t c = 0; c < width; c += LANES) {
    const PhiloxWords words = philox({d.seed, d.offset}, (uint32_t)c, (uint32_t)group, 0);
#pragma GCC unroll 8
    for (int64_t row = 0; row < DROPOUT_ROWS; ++row)
      store(factors + row * width + c, (Floats)((Ints)broadcast(d.factor) & kept(words, (int)row, d.threshold)));
  }
}

}  // namespace nlpfast::NLPFAST_ISA
