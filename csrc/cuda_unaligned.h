// Rows that begin anywhere, read and written 16 bytes at a time by the CUDA kernels.
#pragma once

#include "cuda_device.h"

namespace nlpfast::cuda {

// Shifts eight words down by some bytes, a multiple of an element's.
template <int SIZE>
__device__ __forceinline__ void shift_down(uint32_t (&word)[8], unsigned bytes) {
#pragma unroll
  for (unsigned step = 4; step; step /= 2)
    if (bytes & 4 * step)
#pragma unroll
      for (unsigned i = 0; i < 8; ++i) word[i] = i + step < 8 ? word[i + step] : 0;
  if (SIZE == 2 && bytes & 2)
#pragma unroll
    for (int i = 0; i < 8; ++i) word[i] = word[i] >> 16 | (i < 7 ? word[i + 1] << 16 : 0);
}

// A row of V elements that begins `shift` elements after a multiple of 16 bytes. A lane has PER elements from `first`
// on, a multiple of PER, and its neighbours those before and after them.
template <class E>
struct Unaligned {
  static constexpr int PER = PER_VECTOR<E>, SIZE = sizeof(E);
  E* row;
  int shift, V;

  __device__ __forceinline__ Unaligned(E* row, int V)
      : row(row), shift(static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / SIZE)), V(V) {}

  // Out of the two multiples of 16 bytes that hold them, of which the second may lie after the row's end, and is not
  // read then; elements after it are anything.
  __device__ __forceinline__ void load(Piece<E, PER>& piece, int first) const {
    const uint4* from = reinterpret_cast<const uint4*>(row - shift + first);
    const uint4 a = from[0], b = shift && first + PER - shift < V ? from[1] : uint4{0, 0, 0, 0};
    uint32_t word[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    shift_down<SIZE>(word, shift * SIZE);
#pragma unroll
    for (int i = 0; i < 4; ++i) piece.word[i] = word[i];
  }

  // All lanes of a warp come here, also those that have nothing. A lane writes the 16 bytes at a multiple of that in
  // which its elements begin, the last of the lane before among them; what belongs to other warps' bytes, or to those
  // at an end of the row, is written by itself.
  __device__ __forceinline__ void store(const Piece<E, PER>& piece, int first) const {
    const int lane = static_cast<int>(threadIdx.x % WARP_SIZE);
    uint32_t word[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[i] = __shfl_sync(ALL_LANES, piece.word[i], lane ? lane - 1 : 0);
      word[i + 4] = piece.word[i];
    }
    shift_down<SIZE>(word, 16 - shift * SIZE);
    const auto is_whole = [&](int lane, int first) {
      return (lane > 0 || shift == 0) && lane < static_cast<int>(WARP_SIZE) && first + PER - shift <= V;
    };
    const bool own = is_whole(lane, first), next = shift > 0 && is_whole(lane + 1, first + PER);
    if (own) {
      const uint32_t whole[4] = {word[0], word[1], word[2], word[3]};
      store_vector(row - shift + first, whole);
    }
    if (own && (next || shift == 0)) return;
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (first + j < V && !(j < PER - shift ? own : next)) row[first + j] = element(piece, j);
  }

 private:
  __device__ __forceinline__ static E element(const Piece<E, PER>& piece, int j) {
    const uint32_t word = piece.word[j / PER_WORD<E>];
    if constexpr (SIZE == 4)
      return __uint_as_float(word);
    else
      return {static_cast<uint16_t>(j % 2 ? word >> 16 : word)};
  }
};

}  // namespace nlpfast::cuda
