// The few words that every binding file needs on top of PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

namespace nlpfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Raises RuntimeError unless `x` is a CPU tensor of this type and number of dimensions.
inline void check_cpu(const Tensor& x, const char* name, ScalarType type, const char* type_name, int64_t dim) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", type_name);
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got ", x.dim());
}

}  // namespace nlpfast
