// The element types of tensors that kernels take as raw pointers.
#pragma once

#include <cstdint>

namespace nlpfast {

enum class Dtype { float32, bfloat16, float16, boolean };

constexpr int64_t size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : dtype == Dtype::boolean ? 1 : 2; }

}  // namespace nlpfast
