// Attention on CPUs: O = dropout(softmax(scale Q K^T + mask)) V, tile by tile.
//
// Forward keeps, for QUERY_BLOCK queries, the running maximum, sum and O while it walks over blocks of keys (online
// softmax, Milakov & Gimelshein 2018; tiling and backward after Dao et al., FlashAttention, 2022). With PAIRS the
// weights are rounded to bfloat16 for the product with V, where they lie, two columns in a word.
// The backward is in attention_backward_simd.cpp.
#include "attention_mask.h"

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

// The largest scaled score of each row of a group so far, at once its reference for exponentials; rescales what the
// tiles before left.
void raise_maximum(const Tile& t, int64_t i, const float* s, float factor, const Limits& limits, bool first,
                   Online& online, float* o, int64_t width, Floats (&reference)[GROUP]) {
  const Ints lane = lane_numbers();
  const Floats scale = broadcast(factor);
  Floats top[GROUP];
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
    if (!first && i + r < t.rows) rescale(online.max[i + r], finite, online.sum[i + r], o + (i + r) * width, width);
    online.max[i + r] = max;
    reference[r] = broadcast(finite);
  }
}

// Scores -> unnormalised weights in place, dropped and rescaled; updates the statistics, which are of all weights.
template <bool PAIRS, bool DROPOUT>
void softmax_tile(const AttentionProblem& p, const Tile& t, float factor, bool first, float* s, Online& online,
                  float* o, int64_t width) {
  constexpr int GRAIN = STEP<PAIRS> * LANES;
  const Ints lane = lane_numbers();
  const Floats scale = broadcast(factor);
  const PhiloxKey key{p.seed, p.offset};
  for (int64_t i = 0; i < t.rows; i += GROUP, s += GROUP * TILE_STRIDE) {
    const Limits limits = group_limits<PAIRS>(t, i);
    Floats sum[GROUP] = {}, reference[GROUP];
    raise_maximum(t, i, s, factor, limits, first, online, o, width, reference);
    const auto columns = [&]<bool MASKED>(int32_t j) {
      PhiloxWords words[STEP<PAIRS>];
      for (int u = 0; u < STEP<PAIRS>; ++u)
        if (DROPOUT)
          words[u] = philox(key, static_cast<uint32_t>(t.j0 + j + u * LANES), static_cast<uint32_t>((t.i0 + i) / GROUP),
                            t.head);
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; ++r) {
        const float* x = s + r * TILE_STRIDE + j;
        Floats weight[STEP<PAIRS>];
#pragma GCC unroll 2
        for (int u = 0; u < STEP<PAIRS>; ++u) {
          Floats e = exp(load(x + u * LANES) * scale - reference[r]);
          if (MASKED) e = lane < limits.of[r] - j - u * LANES ? e : 0.0f;
          sum[r] += e;
          weight[u] = e;
          if (DROPOUT) weight[u] = kept(words[u], r, p.drop_threshold) ? e * p.keep_scale : 0.0f;
        }
        if constexpr (PAIRS)
          store(s + r * TILE_STRIDE + j / 2, pairs_of_columns(weight[0], weight[1]));
        else
          store(s + r * TILE_STRIDE + j, weight[0]);
      }
    };
    for (int32_t j = 0; j < limits.whole; j += GRAIN) columns.template operator()<false>(j);
    for (int32_t j = limits.whole; j < limits.partial; j += GRAIN) columns.template operator()<true>(j);
    zero_columns(s, limits.partial / STEP<PAIRS>, limits.extent / STEP<PAIRS>);
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r) online.sum[i + r] += sum_lanes(sum[r]);
  }
}

// Keys and values of one head, ready for the products.
struct Keys {
  const float* kt;
  Rows v;
};

template <bool PAIRS>
struct Workspace {
  float *k, *v, *kt, *v_pairs, *q, *o, *s;

  Workspace(const AttentionProblem& p, const Sequence& s) {
    const int64_t k_width = width_of<PAIRS>(p.D), width = round_up(p.E, LANES);
    take_all({{&k, s.keys * k_width},
              {&v, s.keys * width_of<PAIRS>(p.E)},
              {&kt, round_up(s.keys, PANEL) * k_width},
              {&v_pairs, PAIRS ? round_up(words_of<PAIRS>(s.keys), INNER_GRAIN) * width : 0},
              {&q, QUERY_BLOCK * k_width},
              {&o, QUERY_BLOCK * width},
              {&this->s, TILE}});
  }
};

template <bool PAIRS>
Keys pack_keys(const AttentionProblem& p, const Sequence& s, int64_t h, const Workspace<PAIRS>& w) {
  const char *k_rows = rows_at(p.dtype, p.k, s.b, h / p.G, s.k_first),
             *v_rows = rows_at(p.dtype, p.v, s.b, h / p.G, s.k_first);
  const Rows k = pack<PAIRS>(p, p.k, k_rows, s.keys, p.D, w.k), v = pack<PAIRS>(p, p.v, v_rows, s.keys, p.E, w.v);
  if (p.mask.data) clean_unseen<PAIRS>(p, s, h, h + 1, 0, s.keys, w.k, w.v);
  pack_transposed(k, s.keys, depth_of<PAIRS>(p.D), w.kt);
  return {w.kt, as_right_operand<PAIRS>(v, s.keys, p.E, w.v_pairs)};
}

// The output of a block of queries, and its lse.
void write_out(const AttentionForward& p, const Sequence& s, int64_t h, int64_t i0, int64_t rows, const Online& online,
               const float* o, int64_t width) {
  char* out = rows_at(p.dtype, p.out, s.b, h, s.q_first + i0);
  with_element(p.dtype, [&](auto element) {
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = online.sum[i];
      write_row(reinterpret_cast<decltype(element)*>(out) + i * p.out.row, o + i * width, p.E,
                sum == 0.0f ? 0.0f : 1.0f / sum);
      const double lse = online.max[i] + std::log(static_cast<double>(sum));
      const int64_t index = lse_index(p, s, h, i0 + i);
      p.lse[index] = sum == 0.0f ? -INF : static_cast<float>(lse);
      p.lse_low[index] = sum == 0.0f ? 0.0f : static_cast<float>(lse - p.lse[index]);
    }
  });
}

template <bool PAIRS>
void forward_strip(const AttentionForward& p, const Sequence& s, int64_t h, int64_t first_block, int64_t last_block) {
  if (first_block == last_block) return;
  const int64_t width = round_up(p.E, LANES), depth = depth_of<PAIRS>(p.D);
  const Workspace<PAIRS> w(p, s);
  const Keys keys = pack_keys<PAIRS>(p, s, h, w);
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t i0 = block * QUERY_BLOCK, rows = std::min(QUERY_BLOCK, s.L - i0);
    const Rows q = pack<PAIRS>(p, p.q, rows_at(p.dtype, p.q, s.b, h, s.q_first + i0), rows, p.D, w.q);
    Online online;
    std::fill_n(online.max, QUERY_BLOCK, -INF);
    std::fill_n(online.sum, QUERY_BLOCK, 0.0f);
    const int64_t end = std::clamp<int64_t>(std::max(i0 + rows + s.diagonal, s.prefix), 0, s.keys);
    bool first = true;
    for (int64_t j0 = 0; j0 < end; j0 += KEY_BLOCK) {
      const Tile t = make_tile(p, s, h, i0, j0, end);
      if (mask_hides(p, s.b, h, t)) continue;
      multiply<PAIRS, false, false, Trim::columns>({q.data, q.stride, keys.kt + j0 * depth, PANEL, depth, w.s,
                                                    TILE_STRIDE, rows, t.cols, depth, t.product_edge()});
      if (p.mask.data) apply_mask(p, s.b, h, t, w.s, nullptr);
      const float factor = p.mask.data ? 1.0f : p.scale;
      if (p.drop_threshold > 0)
        softmax_tile<PAIRS, true>(p, t, factor, first, w.s, online, w.o, width);
      else
        softmax_tile<PAIRS, false>(p, t, factor, first, w.s, online, w.o, width);
      const float* v = keys.v.row(words_of<PAIRS>(j0));
      accumulate<PAIRS, false, Trim::k_end>(first, {w.s, TILE_STRIDE, v, keys.v.stride, 1, w.o, width, rows, p.E,
                                                    depth_of<PAIRS>(t.cols), t.product_edge()});
      first = false;
    }
    if (first) std::fill_n(w.o, rows * width, 0.0f);
    write_out(p, s, h, i0, rows, online, w.o, width);
  }
}

void forward(const AttentionForward& p, int64_t begin, int64_t end) {
  const TileConfiguration tiles(p.dtype == Dtype::bfloat16);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t head = unit / p.strips, strip = folded(unit % p.strips, p.strips);
    const Sequence s = sequence_of(p, head / p.H);
    const int64_t blocks = query_blocks(s.L), h = head % p.H;
    const int64_t first = strip * blocks / p.strips, last = (strip + 1) * blocks / p.strips;
    if (HAS_PAIRS && p.dtype == Dtype::bfloat16)
      forward_strip<HAS_PAIRS>(p, s, h, first, last);
    else
      forward_strip<false>(p, s, h, first, last);
  }
}

}  // namespace

extern const AttentionKernels attention{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
