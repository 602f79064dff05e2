// The few words that every binding file needs on top of PyTorch's stable ABI.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <optional>
#include <thread>

#include "dtype.h"

namespace nlpfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A new tensor on the device of `x`, and of its dtype where none is given. torch::stable's function of this name looks
// the operator up by its name in every call.
inline Tensor new_empty(const Tensor& x, std::initializer_list<int64_t> sizes,
                        std::optional<ScalarType> type = std::nullopt) {
  int32_t dtype = 0, device = 0;
  if (type)
    dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*type));
  else
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(x.get(), sizes.begin(), static_cast<int64_t>(sizes.size()),
                                                          &dtype, nullptr, &device, x.get_device_index(), nullptr,
                                                          &made));
  return Tensor(made);
}

// Raises RuntimeError unless `x` is a CPU tensor of this type and number of dimensions.
inline void check_cpu(const Tensor& x, const char* name, ScalarType type, const char* type_name, int64_t dim) {
  STD_TORCH_CHECK(x.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(x.scalar_type() == type, name, " must be ", type_name);
  STD_TORCH_CHECK(x.dim() == dim, name, " must have ", dim, " dimensions, got ", x.dim());
}

// The dtype of a floating tensor that kernels serve; raises RuntimeError for any other.
inline Dtype floating_dtype(const Tensor& x, const char* name) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  return type == ScalarType::Float ? Dtype::float32 : type == ScalarType::BFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

// Raises RuntimeError unless `x` is a contiguous CPU tensor with n elements.
inline void check_contiguous(const Tensor& x, const char* name, int64_t n) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.numel() == n, name, " must be a contiguous CPU tensor with ", n,
                  " elements");
}

// Whether this process was forked and has run no other program since: PF_FORKNOEXEC among the flags of Linux.
inline bool is_a_fork() {
  char text[512] = "";
  if (FILE* file = std::fopen("/proc/self/stat", "r")) {
    text[std::fread(text, 1, sizeof text - 1, file)] = 0;
    std::fclose(file);
  }
  // after the name of the program, in brackets: state, five numbers, flags
  const char* numbers = std::strrchr(text, ')');
  unsigned flags = 0;
  return numbers && std::sscanf(numbers, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 && (flags & 0x40);
}

// The process that loaded this library, 0 if that was a fork already.
inline const pid_t first_process = is_a_fork() ? 0 : getpid();

// PyTorch's parallel_for, also in a process forked from one that has used several threads. That process has OpenMP's
// pool but not its threads, and would wait for them for ever; a new thread gets a pool of its own.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain_size, const F& f) {
  if (getpid() == first_process || end - begin <= grain_size || torch::stable::get_num_threads() == 1)
    return torch::stable::parallel_for(begin, end, grain_size, f);
  std::exception_ptr error;
  std::thread([&] {
    try {
      torch::stable::parallel_for(begin, end, grain_size, f);
    } catch (...) {
      error = std::current_exception();
    }
  }).join();
  if (error) std::rethrow_exception(error);
}

}  // namespace nlpfast
