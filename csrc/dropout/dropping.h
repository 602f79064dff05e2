// What a binding makes of the seed and the probability of dropout.
#pragma once

#include "../stable.h"
#include "dropout.h"

namespace nlpfast {

// Of `threshold` out of DROPPED_OF; 0 is for no dropout, which needs no seed.
inline Dropping dropping_of(const std::optional<Tensor>& seed, int64_t threshold) {
  STD_TORCH_CHECK(threshold >= 0 && threshold < DROPPED_OF, "threshold must be in [0, ", DROPPED_OF, "), got ",
                  threshold);
  if (threshold == 0) return {};
  STD_TORCH_CHECK(seed.has_value(), "seed must be given with dropout");
  check_cpu(*seed, "seed", ScalarType::Long, "int64", 1);
  check_contiguous(*seed, "seed", 2);
  const auto* words = static_cast<const int64_t*>(seed->const_data_ptr());
  return {static_cast<uint64_t>(words[0]), static_cast<uint32_t>(words[1]), static_cast<int32_t>(threshold),
          static_cast<float>((double)DROPPED_OF / (double)(DROPPED_OF - threshold))};
}

}  // namespace nlpfast
