// What the CUDA kernels of attention share: where rows lie, and a warp's work on 16 of them (see attention_cuda.cu).
#pragma once

#include "../cuda_mma.h"
#include "../cuda_philox.h"

namespace nlpfast::cuda {
namespace {

constexpr int TILE = 16, GROUP = 8;
constexpr float LN_2 = 0.6931471805599453f;

// Strides are in elements and fit in 32 bits: a product of two such numbers that is 64 bits wide is one instruction.
struct Rows {
  char* data;
  int batch, head, row;
};

// Division by a number that is known before the launch of numbers below 2^31 (Granlund and Montgomery, "Division by
// invariant integers using multiplication", 1994).
struct Divisor {
  unsigned value, magic, shift = 31;

  // 0 divides nothing, and is as 1
  Divisor(unsigned by = 1) : value(by ? by : 1) {
    while (uint64_t{1} << (shift - 31) < value) ++shift;
    magic = static_cast<unsigned>(((uint64_t{1} << shift) + value - 1) / value);
  }
  __device__ __forceinline__ int quotient(unsigned n) const { return static_cast<int>(uint64_t{n} * magic >> shift); }
};

struct Problem {
  Rows q, k, v, out, given;  // out: in the backward pass its gradient, and `given` is what it was
  Rows dq, dk, dv;
  float* lse;
  const float* grad_lse;  // may be null
  int lse_batch, lse_head;
  const int64_t *key_lengths, *prefix_lengths, *cu_seq_q, *cu_seq_k;  // each may be null
  Dropping dropping;
  int H, group, L, S, causal;
  Divisor group_size, heads_each;  // `group`, and how many of those that blocks go through a sequence has
  unsigned heads;                  // those that blocks go through: of queries, in the backward pass of keys
  unsigned blocks;                 // of queries of a head, forward where there are many keys
  float scale;
};

// A sequence and one of its heads.
struct Head {
  int b, h, queries, length, keys, prefix, base = 0;  // base: the first of the keys that are looked at
  int q_first, k_first;

  // Number `number` of those that blocks go through.
  __device__ __forceinline__ Head(const Problem& p, unsigned number)
      : b(p.heads_each.quotient(number)), h(static_cast<int>(number - b * p.heads_each.value)) {
    q_first = p.cu_seq_q ? static_cast<int>(p.cu_seq_q[b]) : 0;
    k_first = p.cu_seq_k ? static_cast<int>(p.cu_seq_k[b]) : 0;
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

  // How many keys query i sees, from `base` on; those are the first.
  __device__ __forceinline__ int limit(const Problem& p, int i) const {
    if (i >= queries) return 0;
    int seen = keys;
    if (p.causal) {
      const int to = i + 1 + (p.causal == 2 ? length - queries : 0), most = to > prefix ? to : prefix;
      seen = most < keys ? most : keys;
    }
    return seen > base ? seen - base : 0;
  }

  // How many keys any query sees.
  __device__ __forceinline__ int most(const Problem& p) const { return queries > 0 ? limit(p, queries - 1) : 0; }

  // How many keys each of 16 queries sees, 0 where there are fewer queries.
  __device__ __forceinline__ int least_of(const Problem& p, int first) const {
    return first + TILE <= queries ? limit(p, first) : 0;
  }

  // How many keys any of 16 queries sees.
  __device__ __forceinline__ int most_of(const Problem& p, int first) const {
    const int last = first + TILE - 1 < queries ? first + TILE - 1 : queries - 1;
    return first < queries ? limit(p, last) : 0;
  }

  // Where what there is of query i of head `head`, a number in float32, lies.
  __device__ __forceinline__ int64_t lse_place(const Problem& p, int head, int i) const {
    return int64_t{b} * p.lse_batch + int64_t{head} * p.lse_head + (q_first + i);
  }

  template <class E>
  __device__ __forceinline__ E* row(const Rows& x, int head, int i) const {
    return reinterpret_cast<E*>(x.data) + (int64_t{b} * x.batch + int64_t{head} * x.head + int64_t{i} * x.row);
  }
};

// Where the 16 bytes of chunk c of row r lie, in elements.
template <int D>
__device__ __forceinline__ int place_of(int r, int c) {
  constexpr int CHUNKS = D / 8;
  const int turn = CHUNKS >= 8 ? r : r / 2;
  return r * D + (c ^ (turn % (CHUNKS < 8 ? CHUNKS : 8))) * 8;
}

// Starts to copy rows, and zeros after `inside` of them; each of THREADS threads has one chunk of every STEP-th row.
template <class E, int D, int ROWS, int THREADS>
__device__ __forceinline__ void start_rows(E* to, const E* from, int stride, int inside, int thread) {
  constexpr int CHUNKS = D / 8, STEP = THREADS / CHUNKS;
  // after 8 rows chunks lie as before, after 4 the other half is exchanged
  static_assert(STEP % 4 == 0 && ROWS % STEP == 0);
  const int r = thread / CHUNKS, c = thread % CHUNKS;
  E* const places[2] = {to + place_of<D>(r, c), to + place_of<D>(r + STEP, c) - STEP * D};
  const E* row = from + int64_t{r} * stride + c * 8;
#pragma unroll
  for (int i = 0; i < ROWS / STEP; ++i, row += int64_t{STEP} * stride)
    copy_to_shared(places[STEP % 8 ? i % 2 : 0] + i * STEP * D, row, r + i * STEP < inside);
}

// Where a lane reads four 8 x 8 matrices out of 16 x 16 elements of a matrix, for each 16 of its columns; 16 rows
// further chunks lie as in these, so that an address is one of these and a constant.
template <class E, int D>
struct Places {
  SharedAddress at[D / 16];

  // Row and chunk of the first 16 x 16.
  __device__ __forceinline__ Places(const E* matrix, int r, int c) {
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      at[d] = shared_address(matrix + place_of<D>(r, 2 * d + c));
      keep_in_register(at[d]);
    }
  }
  // Those for products of other rows with these, and those for products over these.
  __device__ __forceinline__ static Places across(const E* matrix) {
    const int lane = threadIdx.x % 32;
    return {matrix, lane / 16 * 8 + lane % 8, lane / 8 % 2};
  }
  __device__ __forceinline__ static Places down(const E* matrix) {
    const int lane = threadIdx.x % 32;
    return {matrix, lane / 8 % 2 * 8 + lane % 8, lane / 16};
  }
  // Of rows 16 `step` on.
  __device__ __forceinline__ SharedAddress of(int d, int step) const {
    return at[d] + step * TILE * D * static_cast<int>(sizeof(E));
  }
};

// 16 rows as the first matrix of products over D; their opposites if they are for a scale below 0, so that a maximum of
// products is one of scores.
template <class E, int D>
struct Left {
  uint32_t word[D / 16][4];

  __device__ __forceinline__ explicit Left(const E* rows, float scale = 1.0f) {
    const auto places = Places<E, D>::down(rows);
#pragma unroll
    for (int d = 0; d < D / 16; ++d) load_matrices(word[d], places.at[d]);
    if (scale < 0.0f)
#pragma unroll
      for (int d = 0; d < D / 16; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) word[d][i] ^= 0x80008000u;
  }

  // The products with keys 8 j to 8 j + 15, which lie `across`.
  __device__ __forceinline__ void multiply_keys(float (&s)[4], float (&next)[4], const Places<E, D>& keys,
                                                int j) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) s[e] = next[e] = 0.0f;
#pragma unroll
    for (int d = 0; d < D / 16; ++d) {
      uint32_t r[4];
      load_matrices(r, keys.of(d, j / 2));
      multiply<E>(s, word[d], {r[0], r[1]});
      multiply<E>(next, word[d], {r[2], r[3]});
    }
  }
};

// Products of 16 rows with the first keys, 32 at a time, as long as there are any below `most`: so many products are
// under way together.
template <class E, int D, int KEYS>
__device__ __forceinline__ void multiply_keys(float (&s)[KEYS / 8][4], const Left<E, D>& left, const Places<E, D>& keys,
                                              int most) {
#pragma unroll
  for (int j = 0; j < KEYS / 8; j += 4) {
    if (j * 8 < most) {
      left.multiply_keys(s[j], s[j + 1], keys, j);
      left.multiply_keys(s[j + 2], s[j + 3], keys, j + 2);
    } else {
#pragma unroll
      for (int i = j; i < j + 4; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) s[i][e] = 0.0f;
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

// Adds the products of 16 x 16 weights with rows 16 `step` to 16 `step` + 15 of a matrix, whose places are `down`.
template <class E, int D>
__device__ __forceinline__ void add_rows(float (&o)[D / 8][4], const uint32_t (&weights)[4], const Places<E, D>& rows,
                                         int step) {
#pragma unroll
  for (int d = 0; d < D / 8; d += 2) {
    uint32_t r[4];
    load_transposed(r, rows.of(d / 2, step));
    multiply<E>(o[d], weights, {r[0], r[1]});
    multiply<E>(o[d + 1], weights, {r[2], r[3]});
  }
}

// Makes weights exp(s - maximum) of products with the keys below `most`, 16 at a time, 0 from the limit of a row on;
// maximum and sum of rows g and g + 8 in base 2. All rows see the keys below `least`, and with ALL all there are.
template <int KEYS, bool ALL>
__device__ __forceinline__ void exponentials_of(float (&s)[KEYS / 8][4], int least, int most, const int (&limits)[2],
                                                float scale, float (&maximum)[2], float (&total)[2]) {
  const int t = threadIdx.x % 4;
  maximum[0] = maximum[1] = -INFINITY, total[0] = total[1] = 0.0f;
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j) {
    if (!ALL && j / 2 * 16 >= most) continue;
    if (!ALL && j * 8 + 8 > least)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (j * 8 + 2 * t + e % 2 >= limits[e / 2]) s[j][e] = -INFINITY;
#pragma unroll
    for (int e = 0; e < 4; ++e) maximum[e / 2] = fmaxf(maximum[e / 2], s[j][e]);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    maximum[r] = fmaxf(maximum[r], __shfl_xor_sync(ALL_LANES, maximum[r], 1));
    maximum[r] = fmaxf(maximum[r], __shfl_xor_sync(ALL_LANES, maximum[r], 2));
    // a row that sees nothing: -inf - -inf would be NaN
    maximum[r] = maximum[r] == -INFINITY ? 0.0f : maximum[r] * scale;
  }
#pragma unroll
  for (int j = 0; j < KEYS / 8; ++j) {
    if (!ALL && j / 2 * 16 >= most) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[j][e] = exp2_of(fmaf(s[j][e], scale, -maximum[e / 2]));
      total[e / 2] += s[j][e];
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    total[r] += __shfl_xor_sync(ALL_LANES, total[r], 1);
    total[r] += __shfl_xor_sync(ALL_LANES, total[r], 2);
  }
}

// The same, without a question for each tile where no row has a limit.
template <int KEYS>
__device__ __forceinline__ void exponentials(float (&s)[KEYS / 8][4], int least, int most, const int (&limits)[2],
                                             float scale, float (&maximum)[2], float (&total)[2]) {
  // not 0, which would make NaN of what is hidden
  scale = fmaxf(fabsf(scale), 1e-30f) * LOG2_E;
  if (least >= KEYS)
    exponentials_of<KEYS, true>(s, least, most, limits, scale, maximum, total);
  else
    exponentials_of<KEYS, false>(s, least, most, limits, scale, maximum, total);
}

// Calls f(j, e) for what dropout takes away of 16 rows from i0 on and the keys of tiles j and j + 1 from `base` on.
template <class F>
__device__ __forceinline__ void for_dropped(const Dropping& dropping, const Seeds& seeds, unsigned head, int i0,
                                            int base, int j, F f) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  // lane c decides for key c of 16 and rows 0 to 7, lane 16 + c for rows 8 to 15
  const uint32_t bits =
      survivors(dropping, seeds, base + j * 8 + lane % 16, static_cast<uint32_t>(i0 / GROUP + lane / 16), head);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const uint32_t theirs = __shfl_sync(ALL_LANES, bits, half * 8 + 2 * t + e % 2 + e / 2 * 16);
      if (!(theirs >> g & 1)) f(j + half, e);
    }
}

// Writes 16 rows of D sums times a factor, of which `inside` are there, 16 bytes a lane: the four lanes of a row
// exchange what they have of four tiles. With ADD they are added to what is there.
template <class E, int D, bool ADD = false>
__device__ __forceinline__ void store_sums(const float (&o)[D / 8][4], const float (&factor)[2], E* to, int stride,
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
      if (row >= inside) continue;
      E* place = to + int64_t{row} * stride + (d + t) * 8;
      if constexpr (ADD) {
        Piece<E, 8> sums, there;
        there.take(*reinterpret_cast<const uint4*>(place));
        sums.take({word[0], word[1], word[2], word[3]});
#pragma unroll
        for (int w = 0; w < 4; ++w)
          word[w] = pack(E{}, sums.get(2 * w) + there.get(2 * w), sums.get(2 * w + 1) + there.get(2 * w + 1));
      }
      store_vector(place, word);
    }
}

}  // namespace
}  // namespace nlpfast::cuda
