// The CUDA kernels of attention's probabilities at pairs (see alignment_loss_cuda.cu).
#pragma once

#include "../cuda_device.h"

namespace nlpfast::cuda {
namespace {

constexpr int MAX_HEADS = 128, WARPS = 4, ROWS = 4;
constexpr unsigned GROUP_THREADS = 256;

struct Rows {
  char* data;
  int64_t batch, head, row;  // strides in elements

  template <class E>
  __device__ __forceinline__ E* at(int64_t b, int64_t h, int64_t i) const {
    return reinterpret_cast<E*>(data) + b * batch + h * head + i * row;
  }
};

struct Problem {
  Rows query, key, d_query, d_key;  // of gradients that are not wanted data is null
  const int64_t* pairs;
  const float *lse, *coefficients;                         // [B, H, L], [P, n]
  float *terms, *d_lse;                                    // [P, n], [B, H, L]; d_lse may be null
  const int *by_query, *query_begin, *by_key, *key_begin;  // see Grouping
  const int64_t* lengths;                                  // [B], may be null
  int64_t* found;                                          // [B, L]
  int64_t P, L, S;
  int B, H, Hk, D, n, lanes, shift;  // lanes of a head, 1 << shift
  float scale;
  uint16_t heads[MAX_HEADS], key_heads[MAX_HEADS];

  // Which of the heads that a warp has side by side is this lane's, its place in it, and how many heads these are.
  __device__ __forceinline__ int head_of(unsigned lane) const { return static_cast<int>(lane >> shift); }
  __device__ __forceinline__ int place_of(unsigned lane) const { return static_cast<int>(lane) & (lanes - 1); }
  __device__ __forceinline__ int together() const { return 32 >> shift; }
};

struct Pair {
  int64_t b = 0, t = 0, s = 0;

  Pair() = default;
  __device__ __forceinline__ explicit Pair(const int64_t* p) : b(p[0]), t(p[1]), s(p[2]) {}
  __device__ __forceinline__ bool is_there(int64_t B, int64_t L, int64_t S) const {
    // without jumps, which would have loads wait for each other
    const auto within = [](int64_t x, int64_t n) { return static_cast<uint64_t>(x) < static_cast<uint64_t>(n); };
    return within(b, B) & within(t, L) & within(s, S);
  }
};

// 16 bytes of a row, from element d on; where VECTORS is false, rows may begin anywhere and end within them.
template <class E, bool VECTORS>
struct Chunk {
  static constexpr int PER = PER_VECTOR<E>;
  Piece<E, PER> piece = {};

  __device__ __forceinline__ void load(const E* row, int d, int D) {
    if constexpr (VECTORS) {
      // others read it too: it may stay in the caches
      piece.take(*reinterpret_cast<const uint4*>(row + d));
    } else {
#pragma unroll
      for (int j = 0; j < PER; ++j) piece.set(j, d + j < D ? to_float(row[d + j]) : 0.0f);
    }
  }
  __device__ __forceinline__ void store(E* row, int d, int D) const {
    if constexpr (VECTORS) {
      piece.store(row + d);
    } else {
#pragma unroll
      for (int j = 0; j < PER; ++j)
        if (d + j < D) row[d + j] = from_float<E>(piece.get(j));
    }
  }
  __device__ __forceinline__ float get(int j) const { return piece.get(j); }
  __device__ __forceinline__ float dot(const Chunk& other) const {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < PER; ++j) sum += get(j) * other.get(j);
    return sum;
  }
};

// The logarithm of each head's probability at a pair: a warp a pair, `lanes` of it a head.
template <class E, bool VECTORS>
__global__ void __launch_bounds__(WARPS * 32, 6) forward(Problem p) {
  const int64_t number = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.y;
  if (number >= p.P) return;
  Pair pair(p.pairs + 3 * number);
  const bool there = pair.is_there(p.B, p.L, p.S);
  if (!there) pair = {};
  const int at = p.place_of(threadIdx.x);
  const E *queries = p.query.at<E>(pair.b, 0, pair.t), *keys = p.key.at<E>(pair.b, 0, pair.s);
  const int64_t lse_place = pair.b * p.H * p.L + pair.t;
  for (int first = 0; first < p.n; first += p.together()) {
    const int i = first + p.head_of(threadIdx.x);
    const bool mine = there && i < p.n;
    const int h = mine ? p.heads[i] : 0;
    float score = 0.0f;
    if (mine) {
      const E *q = queries + h * p.query.head, *k = keys + p.key_heads[i] * p.key.head;
      // once but for very long rows: several at a time would take a division to count them
#pragma unroll 1
      for (int d = at * PER_VECTOR<E>; d < p.D; d += p.lanes * PER_VECTOR<E>) {
        Chunk<E, VECTORS> x, y;
        x.load(q, d, p.D), y.load(k, d, p.D);
        score += x.dot(y);
      }
    }
    for (int step = p.lanes / 2; step; step /= 2) score += __shfl_xor_sync(ALL_LANES, score, step);
    if (at || i >= p.n) continue;
    const float lse = mine ? p.lse[lse_place + h * p.L] : NAN;
    // a query that sees no key gives none a probability
    p.terms[number * p.n + i] = lse == -INFINITY ? -INFINITY : p.scale * score - lse;
  }
}

// Sums of a chunk of a row, which are added to what is there.
template <class E, bool VECTORS>
struct Sums {
  static constexpr int PER = PER_VECTOR<E>;
  float sum[PER] = {};

  __device__ __forceinline__ void add(float factor, const E* row, int d, int D) {
    Chunk<E, VECTORS> chunk;
    chunk.load(row, d, D);
#pragma unroll
    for (int j = 0; j < PER; ++j) sum[j] += factor * chunk.get(j);
  }
  __device__ __forceinline__ void add_to(E* row, int d, int D) const {
    Chunk<E, VECTORS> chunk;
    chunk.load(row, d, D);
#pragma unroll
    for (int j = 0; j < PER; ++j) chunk.piece.set(j, chunk.get(j) + sum[j]);
    chunk.store(row, d, D);
  }
};

// What a warp adds to the row of a query, and to its lse.
template <class E, bool VECTORS>
__device__ __forceinline__ void add_to_query(const Problem& p, unsigned row) {
  const int begin = p.query_begin[row], end = p.query_begin[row + 1];
  const unsigned L = static_cast<unsigned>(p.L);
  const int64_t b = row / L, t = row % L;
  const int at = p.place_of(threadIdx.x);
  if (begin == end) return;
  for (int i = p.head_of(threadIdx.x); i < p.n; i += p.together()) {
    const int h = p.heads[i];
    for (int d = at * PER_VECTOR<E>; p.d_query.data && d < p.D; d += p.lanes * PER_VECTOR<E>) {
      Sums<E, VECTORS> total;
#pragma unroll 1
      for (int o = begin; o < end; ++o) {
        const int64_t pair = p.by_query[o];
        const E* k = p.key.at<E>(b, p.key_heads[i], p.pairs[3 * pair + 2]);
        total.add(p.scale * p.coefficients[pair * p.n + i], k, d, p.D);
      }
      total.add_to(p.d_query.at<E>(b, h, t), d, p.D);
    }
    if (at || !p.d_lse) continue;
    float total = 0.0f;
#pragma unroll 1
    for (int o = begin; o < end; ++o) total += p.coefficients[static_cast<int64_t>(p.by_query[o]) * p.n + i];
    p.d_lse[(b * p.H + h) * p.L + t] -= total;
  }
}

// What a warp adds to the row of a key, in all heads.
template <class E, bool VECTORS>
__device__ __forceinline__ void add_to_key(const Problem& p, unsigned row) {
  const int begin = p.key_begin[row], end = p.key_begin[row + 1];
  const unsigned S = static_cast<unsigned>(p.S);
  const int64_t b = row / S, s = row % S;
  if (begin == end) return;
  for (int hk = p.head_of(threadIdx.x); hk < p.Hk; hk += p.together()) {
    const auto reads = [&](int i) { return p.key_heads[i] == hk; };
    bool read = false;
#pragma unroll 1
    for (int i = 0; i < p.n; ++i) read = read || reads(i);
    for (int d = p.place_of(threadIdx.x) * PER_VECTOR<E>; read && d < p.D; d += p.lanes * PER_VECTOR<E>) {
      Sums<E, VECTORS> total;
#pragma unroll 1
      for (int o = begin; o < end; ++o) {
        const int64_t pair = p.by_key[o];
#pragma unroll 1
        for (int i = 0; i < p.n; ++i) {
          if (!reads(i)) continue;
          const E* q = p.query.at<E>(b, p.heads[i], p.pairs[3 * pair + 1]);
          total.add(p.scale * p.coefficients[pair * p.n + i], q, d, p.D);
        }
      }
      total.add_to(p.d_key.at<E>(b, hk, s), d, p.D);
    }
  }
}

// A warp a row of queries, and after these a row of keys, if their gradients are wanted.
template <class E, bool VECTORS>
__global__ void __launch_bounds__(WARPS * 32, 6) backward(Problem p) {
  const unsigned number = blockIdx.x * WARPS + threadIdx.y;
  const unsigned queries = p.d_query.data || p.d_lse ? p.B * static_cast<unsigned>(p.L) : 0;
  const unsigned keys = p.d_key.data ? p.B * static_cast<unsigned>(p.S) : 0;
  if (number < queries)
    add_to_query<E, VECTORS>(p, number);
  else if (number - queries < keys)
    add_to_key<E, VECTORS>(p, number - queries);
}

// The key with the largest sum of probabilities over heads for each query: a warp ROWS queries, a lane a key.
template <class E, bool VECTORS>
__global__ void __launch_bounds__(WARPS * 32, 6) largest(Problem p) {
  const unsigned tiles = static_cast<unsigned>((p.L + ROWS - 1) / ROWS), number = blockIdx.x * WARPS + threadIdx.y;
  const int64_t b = number / tiles, t = number % tiles * ROWS;
  if (b >= p.B) return;
  const int64_t keys = p.lengths && p.lengths[b] < p.S ? p.lengths[b] : p.S;
  float best[ROWS];
  int64_t found[ROWS];
#pragma unroll
  for (int r = 0; r < ROWS; ++r) best[r] = -INFINITY, found[r] = -1;
  for (int64_t s = threadIdx.x; s < keys; s += 32) {
    float total[ROWS] = {};
    for (int i = 0; i < p.n; ++i) {
      const int h = p.heads[i];
      const E *k = p.key.at<E>(b, p.key_heads[i], s), *q = p.query.at<E>(b, h, t);
      float score[ROWS] = {};
      for (int d = 0; d < p.D; d += PER_VECTOR<E>) {
        Chunk<E, VECTORS> x, y;
        y.load(k, d, p.D);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          if (t + r >= p.L) continue;
          x.load(q + r * p.query.row, d, p.D);
          score[r] += x.dot(y);
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        if (t + r >= p.L) continue;
        const float lse = p.lse[(b * p.H + h) * p.L + t + r];
        total[r] += lse == -INFINITY ? 0.0f : exp2_of((p.scale * score[r] - lse) * LOG2_E);
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
      if (total[r] > best[r]) best[r] = total[r], found[r] = s;
  }
#pragma unroll
  for (int r = 0; r < ROWS; ++r) {
#pragma unroll
    for (unsigned step = 16; step; step /= 2) {
      const float theirs = __shfl_xor_sync(ALL_LANES, best[r], step);
      const int64_t other = __shfl_xor_sync(ALL_LANES, found[r], step);
      if (theirs > best[r] || (theirs == best[r] && other < found[r])) best[r] = theirs, found[r] = other;
    }
    if (threadIdx.x == 0 && t + r < p.L) p.found[b * p.L + t + r] = found[r];
  }
}

}  // namespace
}  // namespace nlpfast::cuda
