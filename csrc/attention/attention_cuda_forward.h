// The forward kernels of attention on CUDA devices (see attention_cuda.cu).
#pragma once

#include "attention_cuda_tile.h"

namespace nlpfast::cuda {
namespace {

// Writes what a warp has of 16 rows from i0 on: sums of values, maxima and sums of weights in base 2.
template <class E, int D>
__device__ __forceinline__ void finish_rows(const Problem& p, const Head& head, int i0, const float (&o)[D / 8][4],
                                            const float (&maximum)[2], const float (&total)[2]) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // not > 0: NaN in a query is to stay NaN
  const bool empty[2] = {total[0] == 0.0f, total[1] == 0.0f};
  const float factor[2] = {empty[0] ? 0.0f : p.dropping.factor / total[0],
                           empty[1] ? 0.0f : p.dropping.factor / total[1]};
  store_sums<E, D>(o, factor, head.row<E>(p.out, head.h, head.q_first + i0), p.out.row, head.queries - i0);
  if (t) return;
#pragma unroll
  for (int r = 0; r < 2; ++r)
    if (const int i = i0 + g + 8 * r; i < head.queries)
      p.lse[head.lse_place(p, head.h, i)] = empty[r] ? -INFINITY : maximum[r] * LN_2 + logf(total[r]);
}

template <class E, int D, int KEYS, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, KEYS == 64 ? 4 : 3) forward(Problem p) {
  constexpr int K_TILES = KEYS / 8;
  E* memory = reinterpret_cast<E*>(shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4;
  // two stages of keys and values, and each warp's queries
  const auto stage_of = [&](int stage) { return memory + stage * 2 * KEYS * D; };
  E* own = memory + 4 * KEYS * D + warp * TILE * D;

  const auto start_keys = [&](unsigned number, int stage) {
    if (number < p.heads) {
      const Head head(p, number);
      const int most = head.most(p);
      const int shared = p.group_size.quotient(head.h);
      const E *k = head.row<E>(p.k, shared, head.k_first), *v = head.row<E>(p.v, shared, head.k_first);
      start_rows<E, D, KEYS, WARPS * 32>(stage_of(stage), k, p.k.row, most, threadIdx.x);
      start_rows<E, D, KEYS, WARPS * 32>(stage_of(stage) + KEYS * D, v, p.v.row, most, threadIdx.x);
    }
    close_copies();
  };

  start_keys(blockIdx.x, 0);
  int stage = 0;
  for (unsigned number = blockIdx.x; number < p.heads; number += gridDim.x, stage ^= 1) {
    const Head head(p, number);
    const int tiles = (head.queries + TILE - 1) / TILE;
    // the n-th tile of queries of this warp: back and forth
    const auto tile_of = [&](int n) { return n % 2 ? (n + 1) * WARPS - 1 - warp : n * WARPS + warp; };
    const auto start_queries = [&](int n) {
      const int i0 = tile_of(n) * TILE;
      const E* q = head.row<E>(p.q, head.h, head.q_first + i0);
      if (i0 < head.queries) start_rows<E, D, TILE, 32>(own, q, p.q.row, head.queries - i0, lane);
      close_copies();
    };
    start_queries(0);
    start_keys(number + gridDim.x, stage ^ 1);
    const auto k = Places<E, D>::across(stage_of(stage)), v = Places<E, D>::down(stage_of(stage) + KEYS * D);
    for (int n = 0; n * WARPS < tiles; ++n) {
      const int i0 = tile_of(n) * TILE;
      if (n == 0) {
        // the keys of this head are there when the queries are; in flight may be the next head's
        wait_for_copies<1>();
        __syncthreads();
      } else {
        wait_for_copies<0>();
        __syncwarp();
      }
      if (i0 >= head.queries) continue;
      const Left<E, D> left(own, p.scale);
      // their place is free for the queries after these
      __syncwarp();
      start_queries(n + 1);
      const int limits[2] = {head.limit(p, i0 + g), head.limit(p, i0 + g + 8)};
      const int least = head.least_of(p, i0), most = head.most_of(p, i0);
      float s[K_TILES][4], maximum[2], total[2];
      multiply_keys<E, D, KEYS>(s, left, k, most);
      exponentials<KEYS>(s, least, most, limits, p.scale, maximum, total);
      if (p.dropping.threshold) {
        const Seeds seeds(p.dropping);
#pragma unroll
        for (int j = 0; j < K_TILES; j += 2)
          if (j * 8 < most)
            for_dropped(p.dropping, seeds, number, i0, 0, j, [&](int tile, int e) { s[tile][e] = 0.0f; });
      }
      float o[D / 8][4] = {};
#pragma unroll
      for (int j = 0; j < K_TILES; j += 2)
        if (j * 8 < most) add_rows<E, D>(o, weights_of<E>(s[j], s[j + 1]).word, v, j / 2);
      finish_rows<E, D>(p, head, i0, o, maximum, total);
    }
    // no warp reads these keys any more when the ones after the next are started over them
    wait_for_copies<0>();
    __syncthreads();
  }
}

// Where there are more keys than registers hold, a block has WARPS tiles of queries of a head, and the keys that they
// see go by, KEYS at a time and the next under way: sums and weights are relative to the largest score so far.
template <class E, int D, int KEYS, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, 3) forward_chunked(Problem p) {
  constexpr int K_TILES = KEYS / 8, ROWS = WARPS * TILE;
  E* memory = reinterpret_cast<E*>(shared_memory());
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4;
  const auto stage_of = [&](int stage) { return memory + stage % 2 * 2 * KEYS * D; };
  E* own = memory + 4 * KEYS * D + warp * TILE * D;

  Head head(p, blockIdx.x / p.blocks);
  // with a causal mask the last queries have the most to do, and come first
  const int first = static_cast<int>(p.blocks - 1 - blockIdx.x % p.blocks) * ROWS, i0 = first + warp * TILE;
  if (first >= head.queries) return;
  const int last = first + ROWS < head.queries ? first + ROWS : head.queries, seen = head.limit(p, last - 1);
  const int shared = p.group_size.quotient(head.h);
  const auto start_keys = [&](int base, int stage) {
    if (base < seen) {
      const E *k = head.row<E>(p.k, shared, head.k_first + base), *v = head.row<E>(p.v, shared, head.k_first + base);
      start_rows<E, D, KEYS, WARPS * 32>(stage_of(stage), k, p.k.row, seen - base, threadIdx.x);
      start_rows<E, D, KEYS, WARPS * 32>(stage_of(stage) + KEYS * D, v, p.v.row, seen - base, threadIdx.x);
    }
    close_copies();
  };
  const E* q = head.row<E>(p.q, head.h, head.q_first + i0);
  start_rows<E, D, TILE, 32>(own, q, p.q.row, head.queries - i0, threadIdx.x % 32);
  start_keys(0, 0);
  const Seeds seeds(p.dropping);
  float o[D / 8][4] = {}, highest[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f};
  for (int stage = 0; head.base < seen; head.base += KEYS, ++stage) {
    start_keys(head.base + KEYS, stage + 1);
    wait_for_copies<1>();
    __syncthreads();
    const int least = head.least_of(p, i0), most = head.most_of(p, i0);
    if (most > 0) {
      const auto k = Places<E, D>::across(stage_of(stage)), v = Places<E, D>::down(stage_of(stage) + KEYS * D);
      const int limits[2] = {head.limit(p, i0 + g), head.limit(p, i0 + g + 8)};
      float s[K_TILES][4], maximum[2], total[2], part[D / 8][4] = {}, scales[2], before[2];
      multiply_keys<E, D, KEYS>(s, Left<E, D>(own, p.scale), k, most);
      exponentials<KEYS>(s, least, most, limits, p.scale, maximum, total);
#pragma unroll
      for (int j = 0; j < K_TILES; j += 2) {
        if (j * 8 >= most) continue;
        if (p.dropping.threshold)
          for_dropped(p.dropping, seeds, static_cast<unsigned>(head.b * p.H + head.h), i0, head.base, j,
                      [&](int tile, int e) { s[tile][e] = 0.0f; });
        add_rows<E, D>(part, weights_of<E>(s[j], s[j + 1]).word, v, j / 2);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // a row that sees none of these; NaN is no 0
        const float here = total[r] == 0.0f ? -INFINITY : maximum[r], top = fmaxf(highest[r], here);
        const float base = top == -INFINITY ? 0.0f : top;
        scales[r] = exp2_of(here - base), before[r] = exp2_of(highest[r] - base);
        sum[r] = sum[r] * before[r] + total[r] * scales[r];
        highest[r] = top;
      }
#pragma unroll
      for (int d = 0; d < D / 8; ++d)
#pragma unroll
        for (int e = 0; e < 4; ++e) o[d][e] = o[d][e] * before[e / 2] + part[d][e] * scales[e / 2];
    }
    // no warp reads these keys any more when the ones after the next are started over them
    __syncthreads();
  }
  wait_for_copies<0>();
  if (i0 < head.queries) finish_rows<E, D>(p, head, i0, o, highest, sum);
}

}  // namespace
}  // namespace nlpfast::cuda
