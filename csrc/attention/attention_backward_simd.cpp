// Gradients of attention on CPUs, tile by tile.
//
// P = exp(scale S - lse) is recomputed from the saved lse, kept to twice the precision because its rounding is a
// relative error of P (0.4 % at scores of 1e5). With Delta = rowsum(dO * O) - dlse, dP = mask dO V^T / (1 - p) and
// dS = scale P (dP - Delta): dV += P~^T dO, dK += dS^T Q, dQ += dS K (Dao et al., FlashAttention, 2022).
// Keys are walked outside, queries inside, so that dK and dV of a block stay in the cache and need no atomics. The
// only transposes are of K and V, once a head; all five products then read their operands along rows. With PAIRS the
// tile of scores then holds, row by row, P~ of two queries in a word and dS of the same two, and the tile of dP holds
// dS with two keys in a word.
//
// Where single pairs of a query and a key have gradients of their own, from what supervises their probabilities, these
// are added to dS: no row is read or written for them.
//
// Where one tile has all keys, Delta is summed up there, as rowsum(P * dP): O is not read, nor is its rounding felt.
#include "attention_rectangle.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

// What the loops over a tile need to know of a call.
struct Weighing {
  float score_scale, gradient_scale, keep_scale;
  int32_t drop_threshold;
  PhiloxKey key;
  const float *lse, *lse_low;
  float* delta;  // Delta, or where rows are whole -dlse, to which Delta is then added
};

// Rows that lie whole in a tile sum up their own Delta: P replaces the scores, with a sign where it is dropped, and dP
// is dropped and rescaled.
template <bool DROPOUT>
void weigh_group(const Weighing& c, const Tile& t, int64_t i, const Limits& limits, float* s, float* dp) {
  const Ints lane = lane_numbers(), sign = Ints{} + INT32_MIN;
  const Floats scale = broadcast(c.score_scale);
  Floats delta[GROUP] = {};
  const auto columns = [&]<bool MASKED>(int32_t j) {
    PhiloxWords words;
    if (DROPOUT)
      words = philox(c.key, static_cast<uint32_t>(t.j0 + j), static_cast<uint32_t>((t.i0 + i) / GROUP), t.head);
#pragma GCC unroll 8
    for (int r = 0; r < GROUP; ++r) {
      const int64_t at = r * TILE_STRIDE + j;
      Floats e = exp(load(s + at) * scale - c.lse[i + r] - c.lse_low[i + r]), d = load(dp + at);
      if (MASKED) {
        const Ints visible = lane < limits.of[r] - j;
        e = visible ? e : 0.0f;
        d = visible ? d : 0.0f;
      }
      Ints keep;
      if (DROPOUT) {
        keep = kept(words, r, c.drop_threshold);
        d = keep ? d * c.keep_scale : 0.0f;
      }
      delta[r] += e * d;
      store(s + at, DROPOUT ? (Floats)((Ints)e | (~keep & sign)) : e);
      store(dp + at, d);
    }
  };
  for (int32_t j = 0; j < limits.whole; j += LANES) columns.template operator()<false>(j);
  for (int32_t j = limits.whole; j < limits.partial; j += LANES) columns.template operator()<true>(j);
#pragma GCC unroll 8
  for (int r = 0; r < GROUP; ++r) c.delta[i + r] += sum_lanes(delta[r]);
}

// P (dropped, rescaled) replaces the scores, dS replaces dP.
template <bool PAIRS, bool DROPOUT, bool WHOLE>
void gradient_tile(const Weighing& c, const Tile& t, float* s, float* dp) {
  constexpr int N = STEP<PAIRS>;
  const Ints lane = lane_numbers();
  const Floats scale = broadcast(c.score_scale);
  for (int64_t i = 0; i < t.rows; i += GROUP, s += GROUP * TILE_STRIDE, dp += GROUP * TILE_STRIDE) {
    const Limits limits = group_limits<PAIRS>(t, i);
    if (WHOLE) weigh_group<DROPOUT>(c, t, i, limits, s, dp);
    const auto columns = [&]<bool MASKED>(int32_t j) {
      PhiloxWords words[N];
      for (int u = 0; u < N; ++u)
        if (DROPOUT && !WHOLE)
          words[u] = philox(c.key, static_cast<uint32_t>(t.j0 + j + u * LANES),
                            static_cast<uint32_t>((t.i0 + i) / GROUP), t.head);
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; r += N) {
        Floats weight[N][N], ds[N][N];
#pragma GCC unroll 2
        for (int y = 0; y < N; ++y)
#pragma GCC unroll 2
          for (int u = 0; u < N; ++u) {
            const int64_t at = (r + y) * TILE_STRIDE + j + u * LANES, row = i + r + y;
            Floats e = load(s + at), d = load(dp + at);
            Ints keep;
            if constexpr (WHOLE) {
              if (DROPOUT) keep = (Ints)e >= 0;
              if (DROPOUT) e = (Floats)((Ints)e & INT32_MAX);
            } else {
              e = exp(e * scale - c.lse[row] - c.lse_low[row]);
              if (DROPOUT) keep = kept(words[u], r + y, c.drop_threshold);
              if (DROPOUT) d = keep ? d * c.keep_scale : 0.0f;
            }
            Floats w = DROPOUT ? keep ? e * c.keep_scale : 0.0f : e;
            d = e * (d - c.delta[row]) * c.gradient_scale;
            if (MASKED) {
              const Ints visible = lane < limits.of[r + y] - j - u * LANES;
              w = visible ? w : 0.0f;
              d = visible ? d : 0.0f;
            }
            weight[y][u] = w;
            ds[y][u] = d;
          }
        float *s_row = s + r * TILE_STRIDE, *dp_row = dp + r * TILE_STRIDE;
        if constexpr (PAIRS) {
#pragma GCC unroll 2
          for (int u = 0; u < N; ++u) {
            store(s_row + j + u * LANES, pairs_of_rows(weight[0][u], weight[1][u]));
            store(s_row + TILE_STRIDE + j + u * LANES, pairs_of_rows(ds[0][u], ds[1][u]));
          }
#pragma GCC unroll 2
          for (int y = 0; y < N; ++y) store(dp_row + y * TILE_STRIDE + j / 2, pairs_of_columns(ds[y][0], ds[y][1]));
        } else {
          // Rows that are whole lie there already, where none is dropped.
          if (DROPOUT || !WHOLE) store(s_row + j, weight[0][0]);
          store(dp_row + j, ds[0][0]);
        }
      }
    };
    const int32_t unmasked = WHOLE ? limits.partial : limits.whole;
    for (int32_t j = 0; j < unmasked; j += N * LANES) columns.template operator()<false>(j);
    for (int32_t j = unmasked; j < limits.partial; j += N * LANES) columns.template operator()<true>(j);
    zero_columns(s, limits.partial, limits.extent);
    zero_columns(dp, limits.partial / N, limits.extent / N);
  }
}

// Queries that are not there, to the end of an inner dimension of pairs of queries: zeros.
void clear_missing_rows(const Tile& t, float* s) {
  const int64_t cols = round_up(t.cols, 2 * LANES), there = words_of<true>(t.rows);
  for (int64_t row = t.rows / 2; row < round_up(there, INNER_GRAIN); ++row)
    for (float* words : {s + 2 * row * TILE_STRIDE, s + (2 * row + 1) * TILE_STRIDE})
      for (int64_t j = 0; j < cols; j += LANES)
        store(words + j, row < there ? (Floats)((UInts)load(words + j) & 0xffffu) : Floats{});
}

// Adds the tile of dS to the gradient of the mask, in sum over what the mask broadcasts.
void add_to_mask(const MaskGradient& m, const Tile& t, const float* ds, float* dmask) {
  const int64_t row_step = m.rows > 1 ? m.columns : 0;
  for (int64_t i = 0; i < t.rows; ++i, ds += TILE_STRIDE) {
    float* to = dmask + i * row_step;
    const int64_t limit = t.limit(i);
    if (m.columns > 1)
      for (int64_t j = 0; j < limit; ++j) to[j] += ds[j];
    else
      for (int64_t j = 0; j < limit; ++j) *to += ds[j];
  }
}

// Adds the gradients at pairs to the tile's dS, wherever it lies.
template <bool PAIRS>
void add_at_pairs(const AttentionBackward& p, const Sequence& seq, const Tile& t, int64_t h, float* s, float* dp) {
  for (int64_t i = 0; i < t.rows; ++i) {
    const int64_t* begin = p.extra.begin + seq.b * p.L + t.i0 + i;
    for (int64_t at = begin[0]; at < begin[1]; ++at) {
      const int64_t number = p.extra.order[at], j = p.extra.pairs[3 * number + 2] - t.j0;
      if (j < 0 || j >= t.limit(i)) continue;
      const float value = p.extra.values[number * p.H + h];
      if constexpr (PAIRS) {
        auto* of_columns = reinterpret_cast<Bfloat16*>(dp + i * TILE_STRIDE) + j;
        auto* of_rows = reinterpret_cast<Bfloat16*>(s + (i / 2 * 2 + 1) * TILE_STRIDE + j) + i % 2;
        *of_columns = *of_rows = from_float<Bfloat16>(to_float(*of_columns) + value);
      } else {
        dp[i * TILE_STRIDE + j] += value;
      }
    }
  }
}

struct Targets {
  Target dq, dk, dv;  // dq: rows of the rectangle; dk, dv: rows of the block of keys
};

// Scores and dP of a tile, then the products that the rectangle wants. `first`: of the tiles that write dk and dv;
// `first_of_rows`: of those that write dq.
template <bool PAIRS>
void backward_tile(const AttentionBackward& p, const Sequence& seq, const Rectangle& r, const Workspace<PAIRS>& w,
                   const Tile& t, int64_t h, const Rows& k, const Targets& to, bool first, bool first_of_rows) {
  const Queries x = queries_of(p, seq, r, w, h);
  const int64_t i = t.i0 - r.i_begin, j = t.j0 - r.j_begin, edge = t.product_edge();
  const int64_t d = depth_of<PAIRS>(p.D), e = depth_of<PAIRS>(p.E);
  multiply<PAIRS, false, false, Trim::columns>(
      {x.q.row(i), x.q.stride, w.kt + j * d, PANEL, d, w.s, TILE_STRIDE, t.rows, t.cols, d, edge});
  multiply<PAIRS, false, false, Trim::columns>(
      {x.grad.row(i), x.grad.stride, w.vt + j * e, PANEL, e, w.dp, TILE_STRIDE, t.rows, t.cols, e, edge});
  if (p.mask.data) apply_mask(p, seq.b, h, t, w.s, w.dp);
  const Weighing c{p.mask.data ? 1.0f : p.scale,
                   r.dmask ? 1.0f : p.scale,
                   p.keep_scale,
                   p.drop_threshold,
                   {p.seed, p.offset},
                   x.lse + i,
                   x.lse_low + i,
                   x.delta + i};
  if (rows_are_whole(seq))
    p.drop_threshold > 0 ? gradient_tile<PAIRS, true, true>(c, t, w.s, w.dp)
                         : gradient_tile<PAIRS, false, true>(c, t, w.s, w.dp);
  else
    p.drop_threshold > 0 ? gradient_tile<PAIRS, true, false>(c, t, w.s, w.dp)
                         : gradient_tile<PAIRS, false, false>(c, t, w.s, w.dp);
  if (r.dmask)
    return add_to_mask(p.dmask, t, w.dp,
                       r.dmask + i * (p.dmask.rows > 1 ? p.dmask.columns : 0) + (p.dmask.columns > 1 ? j : 0));
  if (p.extra.values) add_at_pairs<PAIRS>(p, seq, t, h, w.s, w.dp);
  if (PAIRS) clear_missing_rows(t, w.s);
  const int64_t pair_rows = STEP<PAIRS> * TILE_STRIDE, rows = depth_of<PAIRS>(t.rows), slot = i / STEP<PAIRS>;
  if (r.want_key_value) {
    accumulate<PAIRS, true, Trim::k_begin>(first, {w.s, pair_rows, x.grad_right.row(slot), x.grad_right.stride, 1,
                                                   to.dv.data, to.dv.stride, t.cols, p.E, rows, edge});
    accumulate<PAIRS, true, Trim::k_begin>(
        first, {PAIRS ? w.s + TILE_STRIDE : w.dp, pair_rows, x.q_right.row(slot), x.q_right.stride, 1, to.dk.data,
                to.dk.stride, t.cols, p.D, rows, edge});
  }
  if (r.want_query)
    accumulate<PAIRS, false, Trim::k_end>(
        first_of_rows, {w.dp, TILE_STRIDE, k.row(words_of<PAIRS>(j)), k.stride, 1, to.dq.data + i * to.dq.stride,
                        to.dq.stride, t.rows, p.D, depth_of<PAIRS>(t.cols), edge});
}

// Gradients of the keys [begin, end) of a key head that no query sees.
void zero_keys(const AttentionBackward& p, const Sequence& s, int64_t key_head, int64_t begin, int64_t end) {
  if (begin >= end) return;
  zero_rows(p, p.dk, rows_at(p.dtype, p.dk, s.b, key_head, s.k_first + begin), end - begin, p.D);
  zero_rows(p, p.dv, rows_at(p.dtype, p.dv, s.b, key_head, s.k_first + begin), end - begin, p.E);
}

// Packs keys and values of the rectangle; returns the keys as second operand of dQ.
template <bool PAIRS>
Rows pack_keys(const AttentionBackward& p, const Sequence& s, const Rectangle& r, const Workspace<PAIRS>& w) {
  const int64_t keys = r.j_end - r.j_begin, head = r.h_begin / p.G, first = s.k_first + r.j_begin;
  const Rows k = pack<PAIRS>(p, p.k, rows_at(p.dtype, p.k, s.b, head, first), keys, p.D, w.k);
  const Rows v = pack<PAIRS>(p, p.v, rows_at(p.dtype, p.v, s.b, head, first), keys, p.E, w.v);
  if (p.mask.data) clean_unseen<PAIRS>(p, s, r.h_begin, r.h_end, r.j_begin, r.j_end, w.k, w.v);
  pack_transposed(k, keys, depth_of<PAIRS>(p.D), w.kt);
  pack_transposed(v, keys, depth_of<PAIRS>(p.E), w.vt);
  return r.want_query ? as_right_operand<PAIRS>(k, keys, p.D, w.k_pairs) : k;
}

template <bool PAIRS>
void backward_rectangle(const AttentionBackward& p, const Sequence& s, const Rectangle& r) {
  const Workspace<PAIRS> w(p, r);
  const Rows k = pack_keys(p, s, r, w);
  const int64_t key_head = r.h_begin / p.G, rows = r.i_end - r.i_begin;
  const auto dq_result = [&](int64_t h) { return rows_at(p.dtype, p.dq, s.b, h, s.q_first + r.i_begin); };
  const auto dq_of = [&](int64_t h) {
    return target<PAIRS>(p, p.dq, dq_result(h), w.dq + (h - r.h_begin) * r.slots() * w.dq_width, p.D);
  };
  // A mask may hide any tile, so nothing is known of which one comes first.
  const bool add_only = p.mask.data;
  for (int64_t h = r.h_begin; h < r.h_end; ++h) {
    pack_queries(p, s, r, w, h);
    if (!r.want_query) continue;
    // The first block of keys writes dq of the rows that see it; rows before them see no key.
    const bool none = r.j_begin == r.j_end || add_only;
    const int64_t blind = none ? rows : std::min(r.i_end, first_row(s, r.i_begin, 0)) - r.i_begin;
    const Target dq = dq_of(h);
    for (int64_t i = 0; i < blind; ++i) std::fill_n(dq.data + i * dq.stride, round_up(p.D, LANES), 0.0f);
  }
  for (int64_t j0 = r.j_begin; j0 < r.j_end; j0 += KEY_BLOCK) {
    const int64_t cols = std::min(KEY_BLOCK, r.j_end - j0);
    char* dk = rows_at(p.dtype, p.dk, s.b, key_head, s.k_first + j0);
    char* dv = rows_at(p.dtype, p.dv, s.b, key_head, s.k_first + j0);
    bool first = true;
    Targets to{{}, target<PAIRS>(p, p.dk, dk, w.dk, p.D), target<PAIRS>(p, p.dv, dv, w.dv, p.E)};
    for (int64_t h = r.h_begin; h < r.h_end; ++h) {
      to.dq = dq_of(h);
      for (int64_t i0 = first_row(s, r.i_begin, j0); i0 < r.i_end; i0 += QUERY_BLOCK) {
        const Tile t = make_tile(p, s, h, i0, j0, r.j_end);
        if (mask_hides(p, s.b, h, t)) continue;
        backward_tile(p, s, r, w, t, h, k, to, first, j0 == 0 && !add_only);
        first = false;
      }
    }
    if (!r.want_key_value) continue;
    if (first) zero_keys(p, s, key_head, j0, j0 + cols);
    if (first) continue;
    write_back(p, to.dk, p.dk, dk, cols, p.D);
    write_back(p, to.dv, p.dv, dv, cols, p.E);
  }
  for (int64_t h = r.h_begin; r.want_query && h < r.h_end; ++h) write_back(p, dq_of(h), p.dq, dq_result(h), rows, p.D);
}

void run(const AttentionBackward& p, const Sequence& s, const Rectangle& r) {
  // The gradient of a mask is asked for rarely: one way of computing it is enough.
  if (HAS_PAIRS && p.dtype == Dtype::bfloat16 && !r.dmask)
    backward_rectangle<HAS_PAIRS>(p, s, r);
  else
    backward_rectangle<false>(p, s, r);
}

// One tile of dmask, in sum over all the tiles of scores that it reaches.
void mask_unit(const AttentionBackward& p, int64_t unit) {
  const MaskGradient& m = p.dmask;
  const int64_t columns = (m.columns + KEY_BLOCK - 1) / KEY_BLOCK, rows = query_blocks(m.rows);
  const int64_t slice = unit / (rows * columns), i0 = unit / columns % rows * QUERY_BLOCK;
  const int64_t j0 = unit % columns * KEY_BLOCK, batch = slice / m.head, head = slice % m.head;
  const int64_t i_end = m.rows > 1 ? std::min(i0 + QUERY_BLOCK, p.L) : p.L;
  const int64_t j_end = m.columns > 1 ? std::min(j0 + KEY_BLOCK, p.S) : p.S;
  float* data = m.data + (slice * m.rows + i0) * m.columns + j0;
  for (int64_t i = 0; i < std::min(m.rows - i0, QUERY_BLOCK); ++i)
    std::fill_n(data + i * m.columns, std::min(m.columns - j0, KEY_BLOCK), 0.0f);
  for (int64_t b = m.batch > 1 ? batch : 0; b < (m.batch > 1 ? batch + 1 : p.B); ++b) {
    const Sequence s = sequence_of(p, b);
    for (int64_t h = m.head > 1 ? head : 0; h < (m.head > 1 ? head + 1 : p.H); ++h)
      run(p, s, {h, h + 1, i0, i_end, j0, std::clamp(s.keys, j0, j_end), false, false, data});
  }
}

}  // namespace

void backward(const AttentionBackward& p, Gradients wanted, int64_t begin, int64_t end) {
  const TileConfiguration tiles(p.dtype == Dtype::bfloat16);
  const int64_t key_blocks = (p.S + KEY_BLOCK - 1) / KEY_BLOCK, key_heads = p.H / p.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (wanted == Gradients::mask) {
      mask_unit(p, unit);
    } else if (wanted == Gradients::query) {
      const int64_t head = unit / p.strips, strip = folded(unit % p.strips, p.strips), h = head % p.H;
      const Sequence s = sequence_of(p, head / p.H);
      const int64_t blocks = query_blocks(s.L), i_begin = strip * blocks / p.strips * QUERY_BLOCK;
      const int64_t i_end = std::min(s.L, (strip + 1) * blocks / p.strips * QUERY_BLOCK);
      if (i_begin < i_end) run(p, s, {h, h + 1, i_begin, i_end, 0, s.keys, true, false, nullptr});
    } else {
      const bool all = wanted == Gradients::all;
      const int64_t head = all ? unit : unit / key_blocks, key_head = head % key_heads;
      const Sequence s = sequence_of(p, head / key_heads);
      const int64_t j_begin = all ? 0 : std::min(s.S, folded(unit % key_blocks, key_blocks) * KEY_BLOCK);
      const int64_t j_end = all ? s.S : std::min(s.S, j_begin + KEY_BLOCK), h = key_head * p.G;
      zero_keys(p, s, key_head, std::max(s.keys, j_begin), j_end);
      if (all || j_begin < s.keys)
        run(p, s, {h, h + p.G, 0, s.L, j_begin, std::min(s.keys, j_end), all, true, nullptr});
    }
  }
}

}  // namespace nlpfast::NLPFAST_ISA
