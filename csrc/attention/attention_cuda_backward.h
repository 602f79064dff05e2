// The backward kernel of attention over few keys on CUDA devices (see attention_cuda.cu).
#pragma once

#include "attention_cuda_tile.h"

namespace nlpfast::cuda {
namespace {

// Whether dropout leaves a weight: those that it takes have a sign. NaN, of which exp2_of makes none with one, stays.
__device__ __forceinline__ bool stays(float weight) { return !(__float_as_uint(weight) >> 31); }

template <int N>
__device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < N; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) x[i][e] = 0.0f;
}

// Where chunk c of query r's weights lies.
template <int KEYS>
__device__ __forceinline__ int weight_place(int r, int c) {
  return r * KEYS + (c ^ r % 8) * 8;
}

// Gradients of scores at pairs of query and key, from elsewhere, of some heads.
struct PairSlopes {
  static constexpr int MAX_HEADS = 32;
  const float* slopes;       // [P, n]
  const int64_t* pairs;      // [P, 3]: sequence, query, key
  const int *order, *begin;  // the pairs of row r of all queries are order[begin[r]] to before order[begin[r + 1]]
  int n;
  uint16_t heads[MAX_HEADS];
};

// A row of a table of slopes in shared memory; eight rows begin in different banks.
template <int KEYS>
constexpr int SLOPES = KEYS + 8;

// What a warp does before it adds them to its queries, those from i0 on of head h: a table of them, zeros elsewhere.
template <int KEYS>
__device__ __forceinline__ void lay_out(const PairSlopes& added, const Problem& p, const Head& head, int h, int i0,
                                        float* table) {
  const int lane = threadIdx.x % 32, i = i0 + lane;
  int number = 0;
  while (number < added.n && added.heads[number] != h) ++number;
  // the head before is done with the table
  __syncwarp();
  for (int n = lane; n < TILE * SLOPES<KEYS>; n += 32) table[n] = 0.0f;
  __syncwarp();
  if (number < added.n && lane < TILE && i < head.queries) {
    const int64_t row = static_cast<int64_t>(head.b) * p.L + i;
    for (int o = added.begin[row]; o < added.begin[row + 1]; ++o) {
      const int64_t pair = added.order[o];
      table[lane * SLOPES<KEYS> + added.pairs[3 * pair + 2]] += added.slopes[pair * added.n + number];
    }
  }
  __syncwarp();
}

// Weights of a warp's 16 rows, which negative ones dropout takes, out of products s, and the shift of their slopes: the
// sum of weights times the gradients of weights, less the gradient of lse. ds: the latter, with TWICE only on the way.
template <class E, int D, int KEYS, bool TWICE>
__device__ __forceinline__ void weigh_rows(const Problem& p, const Seeds& seeds, const Head& head, int h, int i0,
                                           const Left<E, D>& upstream, const Places<E, D>& values,
                                           float (&s)[KEYS / 8][4], float (&ds)[TWICE ? 2 : KEYS / 8][4],
                                           float (&shift)[2]) {
  const int g = threadIdx.x % 32 / 4, least = head.least_of(p, i0), most = head.most_of(p, i0);
  const int limits[2] = {head.limit(p, i0 + g), head.limit(p, i0 + g + 8)};
  float maximum[2], total[2];
  exponentials<KEYS>(s, least, most, limits, p.scale, maximum, total);
  const float inverse[2] = {total[0] == 0.0f ? 0.0f : 1.0f / total[0], total[1] == 0.0f ? 0.0f : 1.0f / total[1]};
#pragma unroll
  for (int j = 0; j < KEYS / 8; j += 2) {
    if (j * 8 >= most) continue;
    const int kept = TWICE ? 0 : j;
    if constexpr (TWICE) upstream.multiply_keys(ds[0], ds[1], values, j);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j + half][e] *= inverse[e / 2];
    if (p.dropping.threshold)
      for_dropped(p.dropping, seeds, static_cast<unsigned>(head.b * p.H + h), i0, 0, j,
                  [&](int tile, int e) { s[tile][e] = -s[tile][e]; });
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (!p.dropping.threshold || stays(s[j + half][e])) shift[e / 2] += s[j + half][e] * ds[kept + half][e];
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    shift[r] += __shfl_xor_sync(ALL_LANES, shift[r], 1);
    shift[r] += __shfl_xor_sync(ALL_LANES, shift[r], 2);
    shift[r] *= p.dropping.factor;
    if (p.grad_lse && i0 + g + 8 * r < head.queries) shift[r] -= p.grad_lse[head.lse_place(p, h, i0 + g + 8 * r)];
  }
}

// The same where the row's other keys are not here: by lse and by the output, of which the sum is dO O. `grad` are the
// warp's rows of dO in shared memory.
template <class E, int D, int KEYS>
__device__ __forceinline__ void weigh_some(const Problem& p, const Seeds& seeds, const Head& head, int h, int i0,
                                           const E* grad, float (&s)[KEYS / 8][4], float (&shift)[2]) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4, least = head.least_of(p, i0), most = head.most_of(p, i0);
  float lse[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int i = i0 + g + 8 * r;
    lse[r] = 0.0f;
    if (i < head.queries) {
      lse[r] = p.lse[head.lse_place(p, h, i)] * LOG2_E;
      const E* given = head.row<E>(p.given, h, head.q_first + i);
#pragma unroll
      for (int c = t; c < D / 8; c += 4) {
        Piece<E, 8> x, y;
        x.take(*reinterpret_cast<const uint4*>(given + c * 8));
        y.take(*reinterpret_cast<const uint4*>(grad + place_of<D>(g + 8 * r, c)));
#pragma unroll
        for (int e = 0; e < 8; ++e) shift[r] += x.get(e) * y.get(e);
      }
    }
    shift[r] += __shfl_xor_sync(ALL_LANES, shift[r], 1);
    shift[r] += __shfl_xor_sync(ALL_LANES, shift[r], 2);
    if (p.grad_lse && i < head.queries) shift[r] -= p.grad_lse[head.lse_place(p, h, i)];
  }
  const int limits[2] = {head.limit(p, i0 + g), head.limit(p, i0 + g + 8)};
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j) {
    if (j / 2 * 16 >= most) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) s[j][e] = exp2_of(fmaf(s[j][e], fabsf(p.scale) * LOG2_E, -lse[e / 2]));
    if (j * 8 + 8 > least)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (j * 8 + 2 * t + e % 2 >= limits[e / 2]) s[j][e] = 0.0f;
    if (p.dropping.threshold && j % 2)
      for_dropped(p.dropping, seeds, static_cast<unsigned>(head.b * p.H + h), i0, head.base, j - 1,
                  [&](int tile, int e) { s[tile][e] = -s[tile][e]; });
  }
}

// What a warp does for its 16 queries, those from i0 on of head h: their dQ, and what the keys need of them. `added` is
// a table of slopes to be added, where PAIRS is true; with CHUNKED there are other keys besides, before or after these.
template <class E, int D, int KEYS, bool TWICE, bool PAIRS, bool CHUNKED>
__device__ __forceinline__ void slopes_of_queries(const Problem& p, const Seeds& seeds, const Head& head, int h, int i0,
                                                  const E* q, const E* grad, const E* k, const E* v, E* weights,
                                                  E* slopes, const float* added) {
  constexpr int K_TILES = KEYS / 8;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int most = head.most_of(p, i0);
  // no query of these sees one of these keys
  if (CHUNKED && head.base && most == 0) return;
  float s[K_TILES][4], ds[TWICE ? 2 : K_TILES][4], shift[2] = {0.0f, 0.0f};
  multiply_keys<E, D, KEYS>(s, Left<E, D>(q + warp * TILE * D, p.scale), Places<E, D>::across(k), most);
  const Left<E, D> upstream(grad + warp * TILE * D);
  const auto values = Places<E, D>::across(v), keys = Places<E, D>::down(k);
  if constexpr (!TWICE) multiply_keys<E, D, KEYS>(ds, upstream, values, most);
  if constexpr (CHUNKED)
    weigh_some<E, D, KEYS>(p, seeds, head, h, i0, grad + warp * TILE * D, s, shift);
  else
    weigh_rows<E, D, KEYS, TWICE>(p, seeds, head, h, i0, upstream, values, s, ds, shift);
  float dq[D / 8][4] = {};
#pragma unroll
  for (int j = 0; j < K_TILES; j += 2) {
    if (j * 8 >= most) continue;
    const int kept = TWICE ? 0 : j;
    if constexpr (TWICE) upstream.multiply_keys(ds[0], ds[1], values, j);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        float &weight = s[j + half][e], &slope = ds[kept + half][e];
        if (p.dropping.threshold) {
          // 0 times an infinity would be NaN
          const bool on = stays(weight) && p.dropping.factor != 0.0f;
          slope = fabsf(weight) * ((on ? slope * p.dropping.factor : 0.0f) - shift[e / 2]);
          weight = on ? weight * p.dropping.factor : 0.0f;
        } else {
          slope = weight * (slope - shift[e / 2]);
        }
        if constexpr (PAIRS) slope += added[(g + e / 2 * 8) * SLOPES<KEYS> + (j + half) * 8 + 2 * t + e % 2];
      }
    const Weights left = weights_of<E>(s[j], s[j + 1]), right = weights_of<E>(ds[kept], ds[kept + 1]);
    add_rows<E, D>(dq, right.word, keys, j / 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int place = weight_place<KEYS>(warp * TILE + g + i % 2 * 8, j + i / 2) + 2 * t;
      *reinterpret_cast<uint32_t*>(weights + place) = left.word[i];
      *reinterpret_cast<uint32_t*>(slopes + place) = right.word[i];
    }
  }
  const float scales[2] = {p.scale, p.scale};
  E* to = head.row<E>(p.dq, h, head.q_first + i0);
  // the same lanes wrote them
  if (CHUNKED && head.base)
    store_sums<E, D, true>(dq, scales, to, p.dq.row, head.queries - i0);
  else
    store_sums<E, D>(dq, scales, to, p.dq.row, head.queries - i0);
}

// What a warp does for its 16 keys: adds to their gradients what comes from the queries from `begin` on.
template <class E, int D, int KEYS>
__device__ __forceinline__ void add_queries(const Problem& p, const Head& head, int begin, const E* q, const E* grad,
                                            const E* weights, const E* slopes, float (&dk)[D / 8][4],
                                            float (&dv)[D / 8][4]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto queries = Places<E, D>::down(q), upstream = Places<E, D>::down(grad);
  for (int step = 0; step < KEYS / TILE; ++step) {
    // what no query of these sees was not written
    if (warp * TILE >= head.most_of(p, begin + step * TILE)) continue;
    const int place = weight_place<KEYS>(step * TILE + lane / 16 * 8 + lane % 8, 2 * warp + lane / 8 % 2);
    uint32_t a[4];
    load_transposed(a, shared_address(weights + place));
    add_rows<E, D>(dv, a, upstream, step);
    load_transposed(a, shared_address(slopes + place));
    add_rows<E, D>(dk, a, queries, step);
  }
}

// With two stages what comes next is under way meanwhile. PAIRS: there are slopes to be added. CHUNKED: a sequence may
// have more than KEYS keys, and the block goes through them in turn, and through all queries for each. ONE: there are
// no more queries than keys, and as many heads of both, so that nothing is to be kept in registers for the queries
// after these. Where there is, and keys are many, the products dO V^T are computed twice instead of being kept.
template <class E, int D, int KEYS, int STAGES, bool ONE, bool PAIRS, bool CHUNKED>
__global__ void __launch_bounds__(KEYS * 2, KEYS == 64 ? 2 : 1)
    backward(Problem p, const __grid_constant__ PairSlopes added) {
  constexpr bool TWICE = !ONE && KEYS > 64;
  constexpr int THREADS = KEYS / TILE * 32;
  E* memory = reinterpret_cast<E*>(shared_memory());
  const int warp = threadIdx.x / 32;
  // stages of keys and values, and of queries and the gradients of their outputs; weights, and gradients of scores
  const auto keys_of = [&](int stage) { return memory + stage % STAGES * 2 * KEYS * D; };
  const auto rows_of = [&](int stage) { return memory + (STAGES + stage % STAGES) * 2 * KEYS * D; };
  E* weights = memory + 4 * STAGES * KEYS * D;
  E* slopes = weights + KEYS * KEYS;
  float* table = reinterpret_cast<float*>(slopes + KEYS * KEYS) + warp * TILE * SLOPES<KEYS>;

  const auto start_keys = [&](unsigned number, int base, int stage) {
    if (number < p.heads) {
      Head head(p, number);
      head.base = base;
      const int most = head.most(p);
      const E *k = head.row<E>(p.k, head.h, head.k_first + base), *v = head.row<E>(p.v, head.h, head.k_first + base);
      start_rows<E, D, KEYS, THREADS>(keys_of(stage), k, p.k.row, most, threadIdx.x);
      start_rows<E, D, KEYS, THREADS>(keys_of(stage) + KEYS * D, v, p.v.row, most, threadIdx.x);
    }
    close_copies();
  };

  const Seeds seeds(p.dropping);
  int rows_stage = 0, keys_stage = 0;
  for (unsigned number = blockIdx.x; number < p.heads;) {
    Head head(p, number);
    const int blocks = (head.queries + KEYS - 1) / KEYS, items = ONE ? 1 : blocks * p.group;
    // of an item, which has up to KEYS queries: their head, and the first of them
    const auto head_of = [&](int item) { return ONE ? head.h : head.h * p.group + item / blocks; };
    const auto first_of = [&](int item) { return ONE ? 0 : item % blocks * KEYS; };
    // queries of a block of a head of the group
    const auto start_queries = [&](int item, int stage) {
      if (item < items) {
        const int h = head_of(item), i0 = first_of(item);
        start_rows<E, D, KEYS, THREADS>(rows_of(stage), head.row<E>(p.q, h, head.q_first + i0), p.q.row,
                                        head.queries - i0, threadIdx.x);
        start_rows<E, D, KEYS, THREADS>(rows_of(stage) + KEYS * D, head.row<E>(p.out, h, head.q_first + i0), p.out.row,
                                        head.queries - i0, threadIdx.x);
      }
      close_copies();
    };
    for (bool more = true; more; ++keys_stage) {
      more = CHUNKED && head.base + KEYS < head.length;
      const unsigned next = more ? number : number + gridDim.x;
      if (STAGES == 1 || (number == blockIdx.x && head.base == 0)) start_keys(number, head.base, keys_stage);
      start_queries(0, rows_stage);
      if (STAGES > 1) start_keys(next, more ? head.base + KEYS : 0, keys_stage + 1);
      const E *k = keys_of(keys_stage), *v = k + KEYS * D;
      float dk[D / 8][4], dv[D / 8][4];
      clear(dk), clear(dv);

      for (int item = 0; item < items; ++item, ++rows_stage) {
        const int h = head_of(item), begin = first_of(item), i0 = begin + warp * TILE;
        if (STAGES > 1) {
          start_queries(item + 1, rows_stage + 1);
          // in flight may be the next queries, and at first the next keys, which were started before
          item ? wait_for_copies<1>() : wait_for_copies<2>();
        } else {
          wait_for_copies<0>();
        }
        __syncthreads();
        const E *q = rows_of(rows_stage), *grad = q + KEYS * D;
        if constexpr (PAIRS) lay_out<KEYS>(added, p, head, h, i0, table);
        if (i0 < head.queries)
          slopes_of_queries<E, D, KEYS, TWICE, PAIRS, CHUNKED>(p, seeds, head, h, i0, q, grad, k, v, weights, slopes,
                                                               table);
        __syncthreads();
        if constexpr (ONE) clear(dk), clear(dv);
        add_queries<E, D, KEYS>(p, head, begin, q, grad, weights, slopes, dk, dv);
        // the weights, and with one stage the queries too, are written over
        __syncthreads();
        if (STAGES == 1) start_queries(item + 1, rows_stage + 1);
      }
      const int j0 = head.base + warp * TILE;
      const float scales[2] = {p.scale, p.scale}, ones[2] = {1.0f, 1.0f};
      store_sums<E, D>(dk, scales, head.row<E>(p.dk, head.h, head.k_first + j0), p.dk.row, head.length - j0);
      store_sums<E, D>(dv, ones, head.row<E>(p.dv, head.h, head.k_first + j0), p.dv.row, head.length - j0);
      // no warp reads these keys any more when the ones after the next are started over them
      wait_for_copies<0>();
      __syncthreads();
      head.base += KEYS;
    }
    number += gridDim.x;
  }
}

}  // namespace
}  // namespace nlpfast::cuda
