// Launches of CUDA kernels from a library that needs no CUDA build of PyTorch.
//
// The library loads with a CPU build too: what it wants of PyTorch's CUDA part, the current stream and a guard of the
// current device, is looked up when it is first used. Compiled with NLPFAST_EMULATE_CUDA the kernels run on the CPU
// (see cuda_emulator.h), and are registered for tensors there.
#pragma once

#include <atomic>
#include <tuple>
#include <vector>

#include "cuda_device.h"
#include "stable.h"

#ifdef NLPFAST_EMULATE_CUDA
#define NLPFAST_CUDA_KEY CPU
#else
#include <dlfcn.h>
#define NLPFAST_CUDA_KEY CUDA
#endif

namespace nlpfast::cuda {

// Raises RuntimeError unless `x` is where `input` is, which is a device for which there are kernels.
inline void check_on_device(const Tensor& x, const char* name, const Tensor& input) {
#ifdef NLPFAST_EMULATE_CUDA
  STD_TORCH_CHECK(input.is_cpu() && x.is_cpu(), name, " must be a CPU tensor, where kernels are emulated");
#else
  STD_TORCH_CHECK(input.is_cuda() && x.is_cuda() && x.get_device_index() == input.get_device_index(), name,
                  " must be on the CUDA device of input");
#endif
}

// Whether the rows of a tensor lie side by side and each begins at a multiple of 16 bytes.
inline bool rows_on_vectors(const Tensor& x) {
  const int64_t last = x.dim() - 1, per = 16 / static_cast<int64_t>(x.element_size());
  bool aligned = x.stride(last) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < last; ++dim) aligned = aligned && (x.size(dim) <= 1 || x.stride(dim) % per == 0);
  return aligned;
}

// The same, and each ends there.
inline bool whole_vectors(const Tensor& x) {
  return x.size(x.dim() - 1) % (16 / static_cast<int64_t>(x.element_size())) == 0 && rows_on_vectors(x);
}

// Numbers that lie together; raises RuntimeError unless they are n of this type, on the device of `input`.
template <class T>
T* numbers_of(const Tensor& x, const char* name, const Tensor& input, ScalarType type, int64_t n) {
  check_on_device(x, name, input);
  STD_TORCH_CHECK(x.scalar_type() == type && x.is_contiguous() && x.numel() == n, name, " must be ", n, " contiguous ",
                  type);
  return static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
}

#ifdef NLPFAST_EMULATE_CUDA

struct OnDevice {
  explicit OnDevice(const Tensor&) {}
};

template <auto KERNEL, class... P>
void launch(dim3 grid, dim3 block, size_t shared, const P&... arguments) {
  emulator::launch(KERNEL, grid, block, shared, arguments...);
}

// As few as that a block has several of what it goes through.
inline unsigned multiprocessors(const Tensor&) { return 1; }
// Those of sm_90 for bfloat16, and of sm_80 for other types, so that both are emulated.
inline size_t shared_per_block(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? MAX_SHARED : size_t{163} << 10;
}

#else

// A function of PyTorch's CUDA part, in C; raises RuntimeError where that is not loaded.
template <class F>
F* function_of_torch(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  void* found = library ? dlsym(library, name) : nullptr;
  STD_TORCH_CHECK(found, "this PyTorch has no ", name, ": install one that is built with CUDA");
  return reinterpret_cast<F*>(found);
}

// Of the innermost OnDevice of this thread.
inline thread_local cudaStream_t current_stream;
inline thread_local int current_device;

// Makes the device of a tensor the current one, and its current stream that of launches.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& x) {
    static const auto create = function_of_torch<int32_t(int32_t, void**)>("aoti_torch_create_cuda_guard");
    static const auto stream = function_of_torch<int32_t(int32_t, void**)>("aoti_torch_get_current_cuda_stream");
    const int32_t device = x.get_device_index();
    STD_TORCH_CHECK(create(device, &guard_) == 0, "device ", device, " cannot be made the current one");
    void* found = nullptr;
    const int32_t failed = stream(device, &found);
    if (failed) release();
    STD_TORCH_CHECK(!failed, "device ", device, " has no current stream");
    current_stream = static_cast<cudaStream_t>(found), current_device = device;
  }
  ~OnDevice() { release(); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  void release() {
    static const auto remove = function_of_torch<int32_t(void*)>("aoti_torch_delete_cuda_guard");
    remove(guard_);
  }
  void* guard_ = nullptr;
};

// What a block may have without asking for it, and devices that are told apart.
constexpr size_t PLAIN_SHARED = 48 << 10;
constexpr int DEVICES = 64;

// Launches a kernel on the device and the stream of the innermost OnDevice.
template <auto KERNEL, class... P>
void launch(dim3 grid, dim3 block, size_t shared, const P&... arguments) {
  if (shared > PLAIN_SHARED) {
    // how much each device gives a block of this kernel already
    static std::atomic<size_t> given[DEVICES];
    if (const int device = current_device % DEVICES; given[device] < shared) {
      const cudaError_t error =
          cudaFuncSetAttribute(KERNEL, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared));
      STD_TORCH_CHECK(error == cudaSuccess, "a block cannot have ", shared,
                      " bytes of shared memory: ", cudaGetErrorString(error));
      given[device] = shared;
    }
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = current_stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, KERNEL, arguments...);
  STD_TORCH_CHECK(error == cudaSuccess, "a kernel was not launched: ", cudaGetErrorString(error));
}

// What a device says of itself, asked for once.
template <cudaDeviceAttr ATTRIBUTE>
int attribute_of(const Tensor& x) {
  static std::atomic<int> known[DEVICES];
  const int device = x.get_device_index();
  int value = known[device % DEVICES];
  if (!value) {
    const cudaError_t error = cudaDeviceGetAttribute(&value, ATTRIBUTE, device);
    STD_TORCH_CHECK(error == cudaSuccess, "device ", device, " does not answer: ", cudaGetErrorString(error));
    known[device % DEVICES] = value;
  }
  return value;
}

inline unsigned multiprocessors(const Tensor& x) {
  return static_cast<unsigned>(attribute_of<cudaDevAttrMultiProcessorCount>(x));
}

inline size_t shared_per_block(const Tensor& x) {
  return static_cast<size_t>(attribute_of<cudaDevAttrMaxSharedMemoryPerBlockOptin>(x));
}

#endif

}  // namespace nlpfast::cuda
