// The forward kernel of attention over few keys on CUDA devices (see attention_cuda.cu).
#pragma once

#include "attention_cuda_tile.h"

namespace nlpfast::cuda {
namespace {

template <class E, int D, int KEYS, int WARPS>
__global__ void __launch_bounds__(WARPS * 32, KEYS == 64    ? 4
                                              : KEYS == 128 ? 3
                                                            : 1) forward(Problem p) {
  constexpr int K_TILES = KEYS / 8;
  E* memory = reinterpret_cast<E*>(shared_memory());
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // two stages of keys and values, and of each warp's queries
  const auto stage_of = [&](int stage) { return memory + stage * 2 * KEYS * D; };
  E* own = memory + 4 * KEYS * D + warp * 2 * TILE * D;

  const auto start_keys = [&](unsigned number, int stage) {
    if (number < p.heads) {
      const Head head(p, number, p.H);
      const int most = head.most(p);
      const E* k = head.row<E>(p.k, head.h / p.group, head.k_first);
      const E* v = head.row<E>(p.v, head.h / p.group, head.k_first);
      start_rows<E, D, KEYS, WARPS * 32>(stage_of(stage), k, p.k.row, most, threadIdx.x);
      start_rows<E, D, KEYS, WARPS * 32>(stage_of(stage) + KEYS * D, v, p.v.row, most, threadIdx.x);
    }
    close_copies();
  };

  start_keys(blockIdx.x, 0);
  int stage = 0;
  for (unsigned number = blockIdx.x; number < p.heads; number += gridDim.x, stage ^= 1) {
    const Head head(p, number, p.H);
    const int tiles = (head.queries + TILE - 1) / TILE;
    // the n-th tile of queries of this warp: back and forth
    const auto tile_of = [&](int n) { return n % 2 ? (n + 1) * WARPS - 1 - warp : n * WARPS + warp; };
    const auto start_queries = [&](int n) {
      const int i0 = tile_of(n) * TILE;
      const E* q = head.row<E>(p.q, head.h, head.q_first + i0);
      if (i0 < head.queries) start_rows<E, D, TILE, 32>(own + n % 2 * TILE * D, q, p.q.row, head.queries - i0, lane);
      close_copies();
    };
    start_queries(0);
    start_keys(number + gridDim.x, stage ^ 1);
    const auto k = Places<E, D>::across(stage_of(stage)), v = Places<E, D>::down(stage_of(stage) + KEYS * D);
    // the keys of this head are there when the queries are, which were started later
    bool waited = false;
    for (int n = 0; n * WARPS < tiles; ++n) {
      const int i0 = tile_of(n) * TILE;
      start_queries(n + 1);
      if (!waited) {
        // in flight may be the next head's keys and the next queries
        wait_for_copies<2>();
        __syncthreads();
        waited = true;
      } else {
        wait_for_copies<1>();
        __syncwarp();
      }
      if (i0 >= head.queries) continue;
      E* tile = own + n % 2 * TILE * D;
      const int limits[2] = {head.limit(p, i0 + g), head.limit(p, i0 + g + 8)};
      const int least = head.least_of(p, i0), most = head.most_of(p, i0);
      float s[K_TILES][4], maximum[2], total[2];
      multiply_keys<E, D, KEYS>(s, Left<E, D>(tile), k, most);
      exponentials<KEYS>(s, least, most, limits, p.scale * LOG2_E, maximum, total);
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

      // not > 0: NaN in a query is to stay NaN
      const bool empty[2] = {total[0] == 0.0f, total[1] == 0.0f};
      const float factor[2] = {empty[0] ? 0.0f : p.dropping.factor / total[0],
                               empty[1] ? 0.0f : p.dropping.factor / total[1]};
      store_sums<E, D>(o, factor, head.row<E>(p.out, head.h, head.q_first + i0), p.out.row, head.queries - i0);
      if (t == 0) {
        float* lse = p.lse + head.b * p.lse_batch + head.h * p.lse_head + head.q_first + i0;
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (i0 + g + 8 * r < head.queries) lse[g + 8 * r] = empty[r] ? -INFINITY : maximum[r] * LN_2 + logf(total[r]);
      }
      // the place is free for the queries after the next
      __syncwarp();
    }
    // no warp reads these keys any more when the ones after the next are started over them
    wait_for_copies<0>();
    __syncthreads();
  }
}

}  // namespace
}  // namespace nlpfast::cuda
