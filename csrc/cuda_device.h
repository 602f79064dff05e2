// What the CUDA kernels share: element types, vectors of 16 bytes, sums and maxima over a block.
//
// The same source is compiled by nvcc, and by the C++ compiler with NLPFAST_EMULATE_CUDA, for tests without a GPU; what
// has no counterpart in C++ stands in the two parts at the top, and nowhere else.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef NLPFAST_EMULATE_CUDA
#include "cuda_emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace nlpfast::cuda {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

#ifdef NLPFAST_EMULATE_CUDA

// The block's shared memory: as many bytes as the launch asked for.
inline unsigned char* shared_memory() { return emulator::machine().shared.data(); }

// As of a GPU, NaN has no sign.
inline float exp2_of(float x) { return std::fabs(std::exp2(x)); }

template <class T>
T load_once(const T* p) {
  return *p;
}

template <class T>
void store_once(T* p, T x) {
  *p = x;
}

inline void store_vector(void* p, const uint32_t (&word)[4]) { std::memcpy(p, word, sizeof word); }

inline float to_float(Float16 x) { return static_cast<float>(std::bit_cast<_Float16>(x.bits)); }
inline Float16 to_float16(float x) { return {std::bit_cast<uint16_t>(static_cast<_Float16>(x))}; }

inline Bfloat16 to_bfloat16(float x) {
  const uint32_t bits = __float_as_uint(x);
  // rounding could carry a NaN into infinity: it stays a NaN by its quiet bit
  return {static_cast<uint16_t>(x == x ? (bits + 0x7fff + (bits >> 16 & 1)) >> 16 : bits >> 16 | 0x40)};
}

inline uint32_t pack(Float16, float low, float high) {
  return to_float16(low).bits | static_cast<uint32_t>(to_float16(high).bits) << 16;
}

inline uint32_t pack(Bfloat16, float low, float high) {
  return to_bfloat16(low).bits | static_cast<uint32_t>(to_bfloat16(high).bits) << 16;
}

#else

__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
}

// 2^x to two units in the last place; subnormal results are 0.
__device__ __forceinline__ float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Of what is read or written once: it does not push other things out of the caches.
template <class T>
__device__ __forceinline__ T load_once(const T* p) {
  return __ldcs(p);
}

template <class T>
__device__ __forceinline__ void store_once(T* p, T x) {
  __stcs(p, x);
}

// 16 bytes at once, which the compiler would sometimes write one by one.
__device__ __forceinline__ void store_vector(void* p, const uint32_t (&word)[4]) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(word[0]),
               "r"(word[1]), "r"(word[2]), "r"(word[3])
               : "memory");
}

__device__ __forceinline__ float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
__device__ __forceinline__ Float16 to_float16(float x) { return {__half_as_ushort(__float2half_rn(x))}; }
__device__ __forceinline__ Bfloat16 to_bfloat16(float x) { return {__bfloat16_as_ushort(__float2bfloat16_rn(x))}; }

// Both in one instruction.
__device__ __forceinline__ uint32_t pack(Float16, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

__device__ __forceinline__ uint32_t pack(Bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

#endif

constexpr unsigned WARP_SIZE = 32, ALL_LANES = 0xffffffffu;
// The shared memory of a multiprocessor of sm_90 that blocks can have; sm_80 has 163 KB.
constexpr size_t MAX_SHARED = 232448;
constexpr float LOG2_E = 1.4426950408889634f;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bfloat16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class E>
__device__ __forceinline__ E from_float(float x) {
  if constexpr (sizeof(E) == 4)
    return x;
  else if constexpr (__is_same(E, Bfloat16))
    return to_bfloat16(x);
  else
    return to_float16(x);
}

// How many elements there are in 16 bytes, and in a register.
template <class E>
constexpr int PER_VECTOR = 16 / sizeof(E);
template <class E>
constexpr int PER_WORD = 4 / sizeof(E);

// PER elements that are read and written at once: 16 bytes, or a single one, in the low half of its word. They stay in
// as many registers until they are asked for.
template <class E, int PER>
struct Piece {
  static constexpr int WORDS = PER == 1 ? 1 : 4;
  uint32_t word[WORDS];

  __device__ __forceinline__ void take(uint4 v) { word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w; }
  __device__ __forceinline__ void load(const E* p) {
    if constexpr (PER > 1)
      take(load_once(reinterpret_cast<const uint4*>(p)));
    else if constexpr (sizeof(E) == 4)
      word[0] = __float_as_uint(*p);
    else
      word[0] = p->bits;
  }

  __device__ __forceinline__ void store(E* p) const {
    if constexpr (PER > 1)
      store_once(reinterpret_cast<uint4*>(p), uint4{word[0], word[1], word[2], word[3]});
    else if constexpr (sizeof(E) == 4)
      *p = __uint_as_float(word[0]);
    else
      p->bits = static_cast<uint16_t>(word[0]);
  }

  __device__ __forceinline__ float get(int j) const {
    const uint32_t bits = word[j / PER_WORD<E>];
    if constexpr (sizeof(E) == 4)
      return __uint_as_float(bits);
    else if constexpr (__is_same(E, Bfloat16))
      return __uint_as_float(j % 2 ? bits & 0xffff0000u : bits << 16);
    else
      return to_float(Float16{static_cast<uint16_t>(j % 2 ? bits >> 16 : bits)});
  }

  __device__ __forceinline__ void set(int j, float x) {
    uint32_t& bits = word[j / PER_WORD<E>];
    if constexpr (sizeof(E) == 4)
      bits = __float_as_uint(x);
    else if (j % 2)
      bits = (bits & 0xffffu) | static_cast<uint32_t>(from_float<E>(x).bits) << 16;
    else
      bits = (bits & 0xffff0000u) | from_float<E>(x).bits;
  }

  // Makes each element what `f` makes of it.
  template <class F>
  __device__ __forceinline__ void change(F f) {
#pragma unroll
    for (int w = 0; w < WORDS; ++w) {
      if constexpr (sizeof(E) == 4)
        word[w] = __float_as_uint(f(get(w)));
      else
        word[w] = pack(E{}, f(get(2 * w)), PER > 1 ? f(get(2 * w + 1)) : 0.0f);
    }
  }
};

struct Add {
  static constexpr float NONE = 0.0f;
  __device__ static float of(float a, float b) { return a + b; }
};

struct Maximum {
  static constexpr float NONE = -INFINITY;
  __device__ static float of(float a, float b) { return fmaxf(a, b); }
};

// The sum or maximum of each of N numbers over the threads of a block that have the same threadIdx.y, in all of them;
// in an order that depends on nothing but blockDim.x, a multiple of 32. All threads of the block come here. `scratch`
// is shared memory for blockDim.y * N * 32 floats, which nobody else uses meanwhile.
template <class Op, int N>
__device__ __forceinline__ void over_block(float (&x)[N], float* scratch) {
  const unsigned lane = threadIdx.x % WARP_SIZE, warp = threadIdx.x / WARP_SIZE, warps = blockDim.x / WARP_SIZE;
#pragma unroll
  for (unsigned step = WARP_SIZE / 2; step; step /= 2)
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = Op::of(x[i], __shfl_xor_sync(ALL_LANES, x[i], step));
  if (warps == 1) return;
  scratch += threadIdx.y * N * WARP_SIZE;
  // the last use of the scratch is over
  __syncthreads();
  if (lane == 0)
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[i * WARP_SIZE + warp] = x[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] = lane < warps ? scratch[i * WARP_SIZE + lane] : Op::NONE;
#pragma unroll
    for (unsigned step = WARP_SIZE / 2; step; step /= 2) x[i] = Op::of(x[i], __shfl_xor_sync(ALL_LANES, x[i], step));
  }
}

}  // namespace nlpfast::cuda
