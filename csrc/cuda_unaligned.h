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

  // Elements from `first` on lie in two multiples of 16 bytes. `begin` reads the one that holds the first of them, and
  // `complete`, which comes after, takes the rest out of the other, which a lane beside has read as its own.
  __device__ __forceinline__ void begin(Piece<E, PER>& piece, int first) const { piece.load(row - shift + first); }

  // The other may lie after the row's end, and is not read then; elements after the end are anything.
  __device__ __forceinline__ void complete(Piece<E, PER>& piece, int first) const {
    if (shift == 0) return;
    const bool both = first + PER - shift < V;
    const uint4 next = both ? *reinterpret_cast<const uint4*>(row - shift + first + PER) : uint4{0, 0, 0, 0};
    uint32_t word[8] = {piece.word[0], piece.word[1], piece.word[2], piece.word[3], next.x, next.y, next.z, next.w};
    shift_down<SIZE>(word, shift * SIZE);
#pragma unroll
    for (int i = 0; i < 4; ++i) piece.word[i] = word[i];
  }

  // Writes what there is of the 16 bytes at a multiple of that, whose first element is number `from`: all at once, or
  // at the row's ends one by one.
  __device__ __forceinline__ void store(const uint32_t (&word)[4], int from) const {
    Piece<E, PER> piece;
    piece.take({word[0], word[1], word[2], word[3]});
    if (from >= 0 && from + PER <= V)
      piece.store(row + from);
    else
      store_some(piece, from, from < 0 ? -from : 0);
  }

  // Writes elements of a piece one by one, from its element `begin` on.
  __device__ __forceinline__ void store_some(const Piece<E, PER>& piece, int first, int begin) const {
#pragma unroll
    for (int j = 0; j < PER; ++j)
      if (j >= begin && first + j < V) row[first + j] = element(piece, j);
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

// How much shared memory `store_unaligned` wants, in bytes: two rounds of what each warp leaves for the next.
constexpr size_t edges_of(int pieces, int threads) { return 2 * pieces * (threads / WARP_SIZE) * sizeof(uint4); }

// Writes pieces a block's width apart, of which this thread's first is that from `first` on. All threads of a block
// come here, once in each round over a row. A lane writes the 16 bytes at a multiple of that in which its elements
// begin, the last of the lane before among them; those of the last lane of a warp come by shared memory. What the last
// piece has beyond its 16 bytes is written with the next round, or alone if this is the last.
template <class E, int PER, int PIECES>
__device__ __forceinline__ void store_unaligned(const Unaligned<E>& to, const Piece<E, PER> (&piece)[PIECES], int first,
                                                int round, bool last_round, uint4* shared) {
  const int lane = static_cast<int>(threadIdx.x % WARP_SIZE), warp = static_cast<int>(threadIdx.x / WARP_SIZE);
  const int warps = static_cast<int>(blockDim.x / WARP_SIZE), apart = static_cast<int>(blockDim.x) * PER;
  uint4 *own = shared + round % 2 * PIECES * warps, before{};
  // before others write there, which they do in the next round
  if (round && threadIdx.x == 0) before = shared[((round + 1) % 2 + 1) * PIECES * warps - 1];
  if (lane == static_cast<int>(WARP_SIZE) - 1)
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
      own[i * warps + warp] = {piece[i].word[0], piece[i].word[1], piece[i].word[2], piece[i].word[3]};
  __syncthreads();
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int from = first + i * apart - to.shift;
    // the same for all lanes of a warp
    if (from - lane * PER >= to.V) continue;
    if (lane == 0 && i * warps + warp > 0) before = own[i * warps + warp - 1];
    const uint32_t last[4] = {before.x, before.y, before.z, before.w};
    uint32_t word[8];
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint32_t beside = __shfl_sync(ALL_LANES, piece[i].word[w], lane ? lane - 1 : 0);
      word[w] = lane ? beside : last[w], word[w + 4] = piece[i].word[w];
    }
    shift_down<sizeof(E)>(word, 16 - to.shift * sizeof(E));
    to.store({word[0], word[1], word[2], word[3]}, from);
  }
  if (last_round && threadIdx.x == blockDim.x - 1)
    to.store_some(piece[PIECES - 1], first + (PIECES - 1) * apart, PER - to.shift);
}

}  // namespace nlpfast::cuda
