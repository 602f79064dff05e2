// nlpfast._C: what the build knows about itself and the CPU. No tensors pass through here (see library.cpp).
#include <pybind11/pybind11.h>

#include "cpu_capability.h"

namespace py = pybind11;

namespace {

const char* capability_name() {
  switch (nlpfast::cpu_capability()) {
    case nlpfast::CpuCapability::avx512_amx:
      return "AVX512_AMX";
    case nlpfast::CpuCapability::avx512_bf16:
      return "AVX512_BF16";
    case nlpfast::CpuCapability::avx512:
      return "AVX512";
    case nlpfast::CpuCapability::avx2:
      return "AVX2";
    default:
      return "DEFAULT";
  }
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = NLPFAST_COMPILER;
  info["torch"] = NLPFAST_TORCH_VERSION;
  info["instruction_sets"] = NLPFAST_INSTRUCTION_SETS;
  info["cuda"] = NLPFAST_CUDA_VERSION;
  info["sanitizers"] = NLPFAST_SANITIZERS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU capability of nlpfast's native library.";
  m.def("build_info", &build_info,
        "Return how the native library was built: compiler, torch (headers), instruction_sets, cuda, sanitizers.");
  m.def("cpu_capability", &capability_name,
        "Return the instruction set in use: DEFAULT, AVX2, AVX512, AVX512_BF16 or AVX512_AMX (lowered by "
        "ATEN_CPU_CAPABILITY).");
}
