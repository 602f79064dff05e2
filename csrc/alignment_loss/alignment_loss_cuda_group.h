// The CUDA kernel that groups pairs by query and by key, so that each row has one writer (see alignment_loss_cuda.cu).
#pragma once

#include "alignment_loss_cuda_pairs.h"

namespace nlpfast::cuda {
namespace {

// Pairs by their queries and by their keys, those of a row in the order in which they are given: row r of all B L
// queries has by_query[query_begin[r]] to by_query[query_begin[r + 1] - 1]; of keys likewise. Pairs that lie outside of
// batch, queries or keys are not among them.
struct Grouping {
  const int64_t* pairs;
  int *by_query, *query_begin, *by_key, *key_begin;  // [P], [B L + 1], [P], [B S + 1]
  int* listed;                                       // [P]: the pairs of an entry after those of another
  int64_t P, L, S;
  int B;
};

// Pairs that a thread has on their way when it counts.
constexpr int AT_ONCE = 4;
constexpr unsigned GROUP_WARPS = GROUP_THREADS / WARP_SIZE;

__device__ __forceinline__ unsigned lanes_below() { return (1u << threadIdx.x % WARP_SIZE) - 1; }

// What f makes of a number of each thread of the block, in all of its threads; `scratch` is for a number a warp.
template <class F>
__device__ __forceinline__ int over_block(int x, int* scratch, F f) {
#pragma unroll
  for (unsigned step = WARP_SIZE / 2; step; step /= 2) x = f(x, __shfl_xor_sync(ALL_LANES, x, step));
  __syncthreads();
  if (threadIdx.x % WARP_SIZE == 0) scratch[threadIdx.x / WARP_SIZE] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (unsigned w = 1; w < GROUP_WARPS; ++w) x = f(x, scratch[w]);
  return x;
}

// Lists the pairs of entry b, in their order, from listed[base] on, base being how many there are of entries before;
// returns both. All pairs are read once, several at a time, as that waits for memory and for nothing else; then those
// from the entry's first one to its last.
__device__ __forceinline__ void list_entry(const Grouping& g, int b, int* scratch, int& base, int& count) {
  int earliest = 0x7fffffff;
  base = count = 0;
  for (int64_t from = threadIdx.x; from < g.P; from += AT_ONCE * GROUP_THREADS) {
    Pair pairs[AT_ONCE];
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int64_t i = from + j * GROUP_THREADS;
      // instead of one that is not there, one that is read already
      pairs[j] = Pair(g.pairs + 3 * (i < g.P ? i : from));
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; ++j) {
      const int64_t i = from + j * GROUP_THREADS;
      const bool there = (i < g.P) & pairs[j].is_there(g.B, g.L, g.S), mine = there & (pairs[j].b == b);
      base += there & (pairs[j].b < b);
      count += mine;
      earliest = mine && i < earliest ? static_cast<int>(i) : earliest;
    }
  }
  const auto sum = [](int x, int y) { return x + y; };
  base = over_block(base, scratch, sum), count = over_block(count, scratch, sum);
  int next = base;
  int64_t first = over_block(earliest, scratch, [](int x, int y) { return x < y ? x : y; });
  for (; first < g.P && next < base + count; first += GROUP_THREADS) {
    const int64_t i = first + threadIdx.x;
    bool mine = false;
    if (i < g.P) {
      const Pair pair(g.pairs + 3 * i);
      mine = pair.b == b && pair.is_there(g.B, g.L, g.S);
    }
    const unsigned theirs = __ballot_sync(ALL_LANES, mine), warp = threadIdx.x / WARP_SIZE;
    // the scratch is read no more
    __syncthreads();
    if (threadIdx.x % WARP_SIZE == 0) scratch[warp] = __popc(theirs);
    __syncthreads();
    int place = next + __popc(theirs & lanes_below());
#pragma unroll
    for (unsigned w = 0; w < GROUP_WARPS; ++w) {
      if (w < warp) place += scratch[w];
      next += scratch[w];
    }
    if (mine) g.listed[place] = static_cast<int>(i);
  }
  // a pair is listed by one thread and read by another
  __syncthreads();
}

// What a warp does for one of both orders: counts the pairs of each of the rows that `column` names, adds up, and gives
// each pair its place. Lanes with pairs of one row find each other, so there are no atomics.
__device__ __forceinline__ void order_rows(const Grouping& g, const int* listed, int base, int count, int column,
                                           int rows, int* counted, int* order, int* begin) {
  const int lane = static_cast<int>(threadIdx.x % WARP_SIZE);
  for (int r = lane; r < rows; r += WARP_SIZE) counted[r] = 0;
  __syncwarp();
  // calls f(pair, row, lanes of the same row) where there is a pair, then adds to what is counted of the row
  const auto for_pairs = [&](auto f) {
    for (int first = 0; first < count; first += WARP_SIZE) {
      const bool inside = first + lane < count;
      const int pair = inside ? listed[first + lane] : -1;
      const int row = inside ? static_cast<int>(g.pairs[3 * static_cast<int64_t>(pair) + column]) : -1;
      const unsigned same = __match_any_sync(ALL_LANES, row);
      if (inside) f(pair, row, same);
      __syncwarp();
      if (inside && !(same & lanes_below())) counted[row] += __popc(same);
      __syncwarp();
    }
  };
  for_pairs([](int, int, unsigned) {});
  int before = base;
  for (int first = 0; first < rows; first += WARP_SIZE) {
    const int r = first + lane, own = r < rows ? counted[r] : 0;
    int sum = own;
#pragma unroll
    for (int step = 1; step < static_cast<int>(WARP_SIZE); step *= 2) {
      const int theirs = __shfl_sync(ALL_LANES, sum, lane < step ? lane : lane - step);
      if (lane >= step) sum += theirs;
    }
    if (r < rows) counted[r] = begin[r] = before + sum - own;
    before += __shfl_sync(ALL_LANES, sum, WARP_SIZE - 1);
  }
  __syncwarp();
  for_pairs([&](int pair, int row, unsigned same) { order[counted[row] + __popc(same & lanes_below())] = pair; });
}

// A block an entry of the batch: all of it lists the entry's pairs, then one warp orders them by query, another by key.
__global__ void __launch_bounds__(GROUP_THREADS, 1) group_pairs(Grouping g) {
  int* counted = reinterpret_cast<int*>(shared_memory());
  int* scratch = counted + g.L + g.S;
  const int b = static_cast<int>(blockIdx.x);
  int base, count;
  list_entry(g, b, scratch, base, count);
  const int* listed = g.listed + base;
  if (threadIdx.x < WARP_SIZE)
    order_rows(g, listed, base, count, 1, static_cast<int>(g.L), counted, g.by_query, g.query_begin + b * g.L);
  else if (threadIdx.x < 2 * WARP_SIZE)
    order_rows(g, listed, base, count, 2, static_cast<int>(g.S), counted + g.L, g.by_key, g.key_begin + b * g.S);
  if (b == g.B - 1 && threadIdx.x == 0) g.query_begin[g.B * g.L] = g.key_begin[g.B * g.S] = base + count;
}

}  // namespace
}  // namespace nlpfast::cuda
