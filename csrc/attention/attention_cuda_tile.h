// What the CUDA kernels of attention share: where rows lie, and a warp's work on 16 of them (see attention_cuda.cu).
#pragma once

#include "../cuda_mma.h"
#include "../cuda_philox.h"

namespace nlpfast::cuda {
namespace {

constexpr int TILE = 16, GROUP = 8;
constexpr float LN_2 = 0.6931471805599453f;

struct Rows {
  char* data;
  int64_t batch, head, row;  // strides in elements
};

struct Problem {
  Rows q, k, v, out;  // out: in the backward pass its gradient
  Rows dq, dk, dv;
  float* lse;
  const float* grad_lse;  // may be null
  int64_t lse_batch, lse_head;
  const int64_t *key_lengths, *prefix_lengths, *cu_seq_q, *cu_seq_k;  // each may be null
  Dropping dropping;
  int H, group, L, S, causal;
  unsigned heads;  // those that blocks go through: of queries, in the backward pass of keys
  float scale;
};

// A sequence and one of its heads.
struct Head {
  int b, h, queries, length, keys, prefix;
  int64_t q_first, k_first;

  // Number `number`, if a sequence has so many heads.
  __device__ __forceinline__ Head(const Problem& p, unsigned number, unsigned heads)
      : b(static_cast<int>(number / heads)), h(static_cast<int>(number % heads)) {
    q_first = p.cu_seq_q ? p.cu_seq_q[b] : 0, k_first = p.cu_seq_k ? p.cu_seq_k[b] : 0;
    queries = p.cu_seq_q ? static_cast<int>(p.cu_seq_q[b + 1] - q_first) : p.L;
    keys = length = p.cu_seq_k ? static_cast<int>(p.cu_seq_k[b + 1] - k_first) : p.S;
    prefix = 0;
    if (p.key_lengths) {
      const int64_t n = p.key_lengths[b];
      keys = n < 0 ? 0 : n < length ? static_cast<int>(n) : length;
    }
    if (p.prefix_lengths) {
      const int64_t n = p.prefix_lengths[b];
      prefix = n < length ? static_cast<int>(n) : length;
    }
  }

  // How many keys query i sees; those are the first.
  __device__ __forceinline__ int limit(const Problem& p, int i) const {
    if (i >= queries) return 0;
    if (!p.causal) return keys;
    const int to = i + 1 + (p.causal == 2 ? length - queries : 0), seen = to > prefix ? to : prefix;
    return seen < keys ? seen : keys;
  }

  // How many keys any query sees.
  __device__ __forceinline__ int most(const Problem& p) const {
    const int seen = queries > 0 ? limit(p, queries - 1) : 0;
    return seen > 0 ? seen : 0;
  }

  // How many keys any of 16 queries sees.
  __device__ __forceinline__ int most_of(const Problem& p, int first) const {
    const int last = first + TILE - 1 < queries ? first + TILE - 1 : queries - 1;
    return first < queries ? limit(p, last) : 0;
  }

  template <class E>
  __device__ __forceinline__ E* row(const Rows& x, int head, int64_t i) const {
    return reinterpret_cast<E*>(x.data) + b * x.batch + head * x.head + i * x.row;
  }
};

// Where the 16 bytes of chunk c of row r lie, in elements.
template <int D>
__device__ __forceinline__ int place_of(int r, int c) {
  constexpr int CHUNKS = D / 8;
  const int turn = CHUNKS >= 8 ? r : r / 2;
  return r * D + (c ^ (turn % (CHUNKS < 8 ? CHUNKS : 8))) * 8;
}

// Starts to copy rows, and zeros after `inside` of them.
template <class E, int D, int ROWS>
__device__ __forceinline__ void start_rows(E* to, const E* from, int64_t stride, int inside, int thread, int threads) {
  constexpr int CHUNKS = D / 8;
  for (int n = thread; n < ROWS * CHUNKS; n += threads) {
    const int r = n / CHUNKS, c = n % CHUNKS;
    // where there is nothing to read, the address is one that there is
    copy_to_shared(to + place_of<D>(r, c), r < inside ? from + r * stride + c * 8 : from, r < inside);
  }
}

// 16 rows as the first matrix of products over D.
template <class E, int D>
struct Left {
  uint32_t word[D / 16][4];

  __device__ __forceinline__ explicit Left(const E* rows) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 0; d < D / 16; ++d)
      load_matrices(word[d], rows + place_of<D>(lane % 8 + lane / 8 % 2 * 8, 2 * d + lane / 16));
  }

  // The products with keys 8 j to 8 j + 15.
  __device__ __forceinline__ void multiply_keys(float (&s)[4], float (&next)[4], const E* keys, int j) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] = next[e] = 0.0f;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t r[4];
      load_matrices(r, keys + place_of<D>(j * 8 + lane / 16 * 8 + lane % 8, 2 * d + lane / 8 % 2));
      multiply<E>(s, word[d], {r[0], r[1]});
      multiply<E>(next, word[d], {r[2], r[3]});
    }
  }
};

// Products of 16 rows with the first keys, 16 at a time, as long as there are any below `most`.
template <class E, int D, int KEYS>
__device__ __forceinline__ void multiply_keys(float (&s)[KEYS / 8][4], const E* rows, const E* keys, int most) {
  const Left<E, D> left(rows);
#pragma unroll
  for (int j = 0; j < KEYS / 8; j += 2) {
    if (j * 8 < most) {
      left.multiply_keys(s[j], s[j + 1], keys, j);
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = s[j + 1][e] = 0.0f;
    }
  }
}

// 16 x 16 numbers as the first matrix of a product.
struct Weights {
  uint32_t word[4];
};

template <class E>
__device__ __forceinline__ Weights weights_of(const float (&a)[4], const float (&b)[4]) {
  return {{pack(E{}, a[0], a[1]), pack(E{}, a[2], a[3]), pack(E{}, b[0], b[1]), pack(E{}, b[2], b[3])}};
}

// Adds the products of 16 x 16 weights with rows 16 `step` to 16 `step` + 15 of a matrix.
template <class E, int D>
__device__ __forceinline__ void add_rows(float (&o)[D / 8][4], const uint32_t (&weights)[4], const E* rows, int step) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int d = 0; d < D / 8; d += 2) {
    uint32_t r[4];
    load_transposed(r, rows + place_of<D>(step * 16 + lane / 8 % 2 * 8 + lane % 8, d + lane / 16));
    multiply<E>(o[d], weights, {r[0], r[1]});
    multiply<E>(o[d + 1], weights, {r[2], r[3]});
  }
}

// Makes weights exp(s - maximum) of products, 0 from the limit on; maximum and sum of rows g and g + 8 in base 2.
template <int KEYS>
__device__ __forceinline__ void exponentials(float (&s)[KEYS / 8][4], const int (&limits)[2], float scale,
                                             float (&maximum)[2], float (&total)[2]) {
  const int t = threadIdx.x % 4;
  maximum[0] = maximum[1] = -INFINITY, total[0] = total[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = j * 8 + 2 * t + e % 2 < limits[e / 2] ? s[j][e] * scale : -INFINITY;
      maximum[e / 2] = fmaxf(maximum[e / 2], s[j][e]);
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    maximum[r] = fmaxf(maximum[r], __shfl_xor_sync(ALL_LANES, maximum[r], 1));
    maximum[r] = fmaxf(maximum[r], __shfl_xor_sync(ALL_LANES, maximum[r], 2));
    // a row that sees nothing: -inf - -inf would be NaN
    if (maximum[r] == -INFINITY) maximum[r] = 0.0f;
  }
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2_of(s[j][e] - maximum[e / 2]);
      total[e / 2] += s[j][e];
    }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
    total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
  }
}

// Calls f(j, e) for what dropout takes away of 16 rows from i0 on and the keys of tiles j and j + 1.
template <class F>
__device__ __forceinline__ void for_dropped(const Dropping& dropping, unsigned head, int i0, int j, F f) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // lane c decides for key c of 16 and rows 0 to 7, lane 16 + c for rows 8 to 15
  const uint32_t bits = survivors(dropping, j * 8 + lane % 16, static_cast<uint32_t>(i0 / GROUP + lane / 16), head);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t theirs = __shfl_sync(ALL_LANES, bits, half * 8 + 2 * t + e % 2 + e / 2 * 16);
      if (!(theirs >> g & 1)) f(j + half, e);
    }
}

// Writes 16 rows of D sums times a factor, of which `inside` are there, 16 bytes a lane: the four lanes of a row
// exchange what they have of four tiles.
template <class E, int D>
__device__ __forceinline__ void store_sums(const float (&o)[D / 8][4], const float (&factor)[2], E* to, int64_t stride,
                                           int inside) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int d = 0; d < D / 8; d += 4)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) word[i] = pack(E{}, o[d + i][2 * r] * factor[r], o[d + i][2 * r + 1] * factor[r]);
#pragma unroll
      for (int step = 1; step < 4; step *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & step) continue;
          const bool upper = t & step;
          const uint32_t theirs = __shfl_xor_sync(ALL_LANES, upper ? word[i] : word[i | step], step);
          (upper ? word[i] : word[i | step]) = theirs;
        }
      const int row = g + 8 * r;
      if (row < inside) store_vector(to + row * stride + (d + t) * 8, word);
    }
}

}  // namespace
}  // namespace nlpfast::cuda
