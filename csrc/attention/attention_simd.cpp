// Attention on CPUs, float32: O = dropout(softmax(scale Q K^T + mask)) V, tile by tile.
//
// Forward keeps, for QUERY_BLOCK queries, the running maximum, sum and O while it walks over blocks of keys (online
// softmax, Milakov & Gimelshein 2018; tiling and backward after Dao et al., FlashAttention, 2022).
// The backward is in attention_backward_simd.cpp.
#include "attention_tile.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

struct Online {
  float max[QUERY_BLOCK], sum[QUERY_BLOCK];
};

// Moves the sums of a row from one maximum to the next.
void rescale(float before, float now, float& sum, float* o, int64_t width) {
  const float correction = std::exp(before - now);
  sum *= correction;
  for (int64_t e = 0; e < width; e += LANES) store(o + e, load(o + e) * correction);
}

// Scores -> unnormalised probabilities in place; updates the statistics and rescales `o` to the new maximum.
void softmax_tile(const AttentionProblem& p, const Tile& t, float* s, Online& online, float* o, int64_t width) {
  const Ints lane = lane_numbers();
  const Floats scale = broadcast(p.scale);
  for (int64_t i = 0; i < t.rows; i += GROUP, s += GROUP * TILE_STRIDE) {
    const Limits limits = group_limits(t, i);
    Floats top[GROUP], sum[GROUP], reference[GROUP];
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r) top[r] = broadcast(-INF);
    for (int32_t j = 0; j < limits.whole; j += LANES)
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; ++r) top[r] = maximum(load(s + r * TILE_STRIDE + j) * scale, top[r]);
    for (int32_t j = limits.whole; j < limits.of[GROUP - 1]; j += LANES)
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; ++r)
        top[r] = maximum(lane < limits.of[r] - j ? load(s + r * TILE_STRIDE + j) * scale : -INF, top[r]);
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r) {
      const float max = std::max(online.max[i + r], max_lanes(top[r]));
      // A row whose scores are all -inf or NaN so far: any finite reference gives 0 and NaN.
      const float finite = max == -INF ? 0.0f : max;
      if (t.j0 > 0) rescale(online.max[i + r], finite, online.sum[i + r], o + (i + r) * width, width);
      online.max[i + r] = max;
      reference[r] = broadcast(finite);
      sum[r] = Floats{};
    }
    for (int32_t j = 0; j < limits.whole; j += LANES)
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; ++r) {
        float* x = s + r * TILE_STRIDE + j;
        const Floats e = exp(load(x) * scale - reference[r]);
        sum[r] += e;
        store(x, e);
      }
    for (int32_t j = limits.whole; j < limits.partial; j += LANES)
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; ++r) {
        float* x = s + r * TILE_STRIDE + j;
        const Floats e = lane < limits.of[r] - j ? exp(load(x) * scale - reference[r]) : 0.0f;
        sum[r] += e;
        store(x, e);
      }
    zero_columns(s, limits.partial, limits.extent);
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r) online.sum[i + r] += sum_lanes(sum[r]);
  }
}

void drop_tile(const AttentionProblem& p, const Tile& t, float* s) {
  const PhiloxKey key{p.seed, p.offset};
  for (int64_t i = 0; i < t.rows; i += GROUP, s += GROUP * TILE_STRIDE) {
    const int64_t limit = t.limit(i + GROUP - 1);
    for (int64_t j = 0; j < limit; j += LANES) {
      const PhiloxWords words =
          philox(key, static_cast<uint32_t>(t.j0 + j), static_cast<uint32_t>((t.i0 + i) / GROUP), t.head);
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; ++r) {
        float* x = s + r * TILE_STRIDE + j;
        store(x, kept(words, r, p.drop_threshold) ? load(x) * p.keep_scale : 0.0f);
      }
    }
  }
}

void forward_strip(const AttentionForward& p, int64_t head, int64_t first_block, int64_t last_block) {
  const int64_t b = head / p.H, h = head % p.H, q_width = round_up(p.D, LANES), width = round_up(p.E, LANES);
  const int64_t keys = visible_keys(p, b);
  float *k_space, *v_space, *kt, *q_space, *o, *s;
  take_all({{&k_space, keys * q_width},
            {&v_space, keys * width},
            {&kt, round_up(keys, PANEL) * q_width},
            {&q_space, QUERY_BLOCK * q_width},
            {&o, QUERY_BLOCK * width},
            {&s, TILE}});
  const Rows k = pack(p.k, head_of(p.k, b, h / p.G), keys, p.D, k_space);
  const Rows v = pack(p.v, head_of(p.v, b, h / p.G), keys, p.E, v_space);
  pack_transposed(k, keys, p.D, kt);

  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t i0 = block * QUERY_BLOCK, rows = std::min(QUERY_BLOCK, p.L - i0);
    const Rows q = pack(p.q, head_of(p.q, b, h) + i0 * p.q.row, rows, p.D, q_space);
    Online online;
    std::fill_n(online.max, QUERY_BLOCK, -INF);
    std::fill_n(online.sum, QUERY_BLOCK, 0.0f);
    const int64_t end = p.causal ? std::clamp<int64_t>(i0 + rows + p.diagonal, 0, keys) : keys;
    if (end == 0) std::fill_n(o, rows * width, 0.0f);
    for (int64_t j0 = 0; j0 < end; j0 += KEY_BLOCK) {
      const Tile t = make_tile(p, head, i0, j0, end);
      multiply<false, false, Trim::columns>(
          {q.data, q.stride, kt + j0 * p.D, PANEL, p.D, s, TILE_STRIDE, rows, t.cols, p.D, t.edge});
      softmax_tile(p, t, s, online, o, width);
      if (p.drop_threshold > 0) drop_tile(p, t, s);
      accumulate<false, Trim::k_end>(j0 == 0,
                                     {s, TILE_STRIDE, v.row(j0), v.stride, 1, o, width, rows, p.E, t.cols, t.edge});
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = online.sum[i];
      write_row(p.out + (head * p.L + i0 + i) * p.E, o + i * width, p.E, sum == 0.0f ? 0.0f : 1.0f / sum);
      const double lse = online.max[i] + std::log(static_cast<double>(sum));
      const int64_t index = head * p.L + i0 + i;
      p.lse[index] = sum == 0.0f ? -INF : static_cast<float>(lse);
      p.lse_low[index] = sum == 0.0f ? 0.0f : static_cast<float>(lse - p.lse[index]);
    }
  }
}

void forward(const AttentionForward& p, int64_t begin, int64_t end) {
  const int64_t blocks = query_blocks(p);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t strip = folded(unit % p.strips, p.strips);
    forward_strip(p, unit / p.strips, strip * blocks / p.strips, (strip + 1) * blocks / p.strips);
  }
}

}  // namespace

extern const AttentionKernels attention{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
