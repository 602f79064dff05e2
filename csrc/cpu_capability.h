// Which instruction set the CPU kernels use: the best that the CPU and the operating system offer, lowered by
// ATEN_CPU_CAPABILITY (default, avx2, avx512), the variable that lowers PyTorch's own kernels; PyTorch ignores the
// further value avx512_bf16, which means AVX-512 with bfloat16 products but no AMX.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace nlpfast {

enum class CpuCapability { baseline, avx2, avx512, avx512_bf16, avx512_amx };

namespace detail {

// AMX with bf16, and the kernel's permission to keep tile registers (asked for once per process). A library that
// computes the tiles in software needs neither.
inline bool has_amx() {
#if defined(NLPFAST_EMULATE_AMX)
  return true;
#elif defined(__x86_64__) && defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
  constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
  return bf16 && tile && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
#else
  return false;
#endif
}

inline CpuCapability hardware_capability() {
#if defined(__x86_64__)
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return CpuCapability::baseline;
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (!avx512) return CpuCapability::avx2;
  if (!__builtin_cpu_supports("avx512bf16")) return CpuCapability::avx512;
  return has_amx() ? CpuCapability::avx512_amx : CpuCapability::avx512_bf16;
#else
  return CpuCapability::baseline;
#endif
}

}  // namespace detail

inline CpuCapability cpu_capability() {
  static const CpuCapability capability = [] {
    const CpuCapability best = detail::hardware_capability();
    const char* wish = std::getenv("ATEN_CPU_CAPABILITY");
    CpuCapability limit = CpuCapability::avx512_amx;
    if (wish && !std::strcmp(wish, "default")) limit = CpuCapability::baseline;
    if (wish && !std::strcmp(wish, "avx2")) limit = CpuCapability::avx2;
    if (wish && !std::strcmp(wish, "avx512")) limit = CpuCapability::avx512;
    if (wish && !std::strcmp(wish, "avx512_bf16")) limit = CpuCapability::avx512_bf16;
    return best < limit ? best : limit;
  }();
  return capability;
}

// Defines `const Kernels& chosen_kernels()`, which returns the object `name` of the instruction set in use: each has
// one in a namespace of its own.
#if defined(__x86_64__)
#define NLPFAST_DEFINE_CHOICE(Kernels, chosen_kernels, name) \
  NLPFAST_DECLARE(Kernels, name, baseline)                   \
  NLPFAST_DECLARE(Kernels, name, avx2)                       \
  NLPFAST_DECLARE(Kernels, name, avx512)                     \
  NLPFAST_DECLARE(Kernels, name, avx512_bf16)                \
  NLPFAST_DECLARE(Kernels, name, avx512_amx)                 \
  const Kernels& chosen_kernels() {                          \
    switch (cpu_capability()) {                              \
      case CpuCapability::avx512_amx:                        \
        return avx512_amx::name;                             \
      case CpuCapability::avx512_bf16:                       \
        return avx512_bf16::name;                            \
      case CpuCapability::avx512:                            \
        return avx512::name;                                 \
      case CpuCapability::avx2:                              \
        return avx2::name;                                   \
      default:                                               \
        return baseline::name;                               \
    }                                                        \
  }
#else
#define NLPFAST_DEFINE_CHOICE(Kernels, chosen_kernels, name) \
  NLPFAST_DECLARE(Kernels, name, baseline)                   \
  const Kernels& chosen_kernels() { return baseline::name; }
#endif
#define NLPFAST_DECLARE(Kernels, name, isa) \
  namespace isa {                           \
  extern const Kernels name;                \
  }

}  // namespace nlpfast
