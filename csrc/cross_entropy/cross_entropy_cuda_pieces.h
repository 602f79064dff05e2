// How the CUDA kernels of cross entropy read and write a row, by pieces (see cross_entropy_cuda.cu).
#pragma once

#include "../cuda_unaligned.h"

namespace nlpfast::cuda {
namespace {

// Shared memory: that of sums and maxima, then two numbers that thread 0 keeps there, in bytes; and pieces.
constexpr int KEPT = 2 * WARP_SIZE;
constexpr size_t SCRATCH = (KEPT + 4) * sizeof(float);
// Reads pieces of a row from `first` on, a block's width apart, all of them under way before the first is used. Rows
// are those of `Unaligned`, or begin at multiples of a piece.
template <bool UNALIGNED, class E, int PER, int PIECES>
__device__ __forceinline__ void read_pieces(Piece<E, PER> (&piece)[PIECES], E* row, int V, int first) {
  const int apart = static_cast<int>(blockDim.x) * PER;
  const Unaligned<E> source(row, V);
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    if (first + i * apart >= V) continue;
    if constexpr (UNALIGNED)
      source.begin(piece[i], first + i * apart);
    else
      piece[i].load(row + first + i * apart);
  }
  if constexpr (UNALIGNED)
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
      if (first + i * apart < V) source.complete(piece[i], first + i * apart);
}

// Writes what f makes of them, in one of the rounds over a row. All threads of a block come here.
template <bool UNALIGNED, class E, int PER, int PIECES, class F>
__device__ __forceinline__ void write_pieces(Piece<E, PER> (&piece)[PIECES], E* row, int V, int first, int round,
                                             bool last_round, F f) {
  const int apart = static_cast<int>(blockDim.x) * PER;
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
    if (first + i * apart < V) {
      piece[i].change(f);
      if constexpr (!UNALIGNED) piece[i].store(row + first + i * apart);
    }
  if constexpr (UNALIGNED)
    store_unaligned(Unaligned<E>(row, V), piece, first, round, last_round,
                    reinterpret_cast<uint4*>(shared_memory() + SCRATCH));
}

// Writes what f makes of each of a row's classes. `to` is `from`, or no thread reads there.
template <bool UNALIGNED, int PIECES, class E, class F>
__device__ __forceinline__ void rewrite(E* from, E* to, int V, F f) {
  constexpr int PER = PER_VECTOR<E>;
  const int apart = static_cast<int>(blockDim.x) * PER * PIECES;
  for (int base = 0, round = 0; base < V; base += apart, ++round) {
    const int first = base + static_cast<int>(threadIdx.x) * PER;
    Piece<E, PER> piece[PIECES] = {};
    read_pieces<UNALIGNED>(piece, from, V, first);
    write_pieces<UNALIGNED>(piece, to, V, first, round, base + apart >= V, f);
  }
}

template <bool UNALIGNED, class E>
__device__ __forceinline__ void store_zeros(E* gradient, int V) {
  constexpr int PER = PER_VECTOR<E>;
  const int apart = static_cast<int>(blockDim.x) * PER;
  for (int base = 0, round = 0; base < V; base += apart, ++round) {
    Piece<E, PER> zeros[1] = {};
    write_pieces<UNALIGNED>(zeros, gradient, V, base + static_cast<int>(threadIdx.x) * PER, round, base + apart >= V,
                            [](float) { return 0.0f; });
  }
}

}  // namespace
}  // namespace nlpfast::cuda
