// Gradients of attention on CPUs, float32, tile by tile.
//
// P = exp(scale S - lse) is recomputed from the saved lse, kept to twice the precision because its rounding is a
// relative error of P (0.4 % at scores of 1e5). With Delta = rowsum(dO * O) - dlse, dP = mask dO V^T / (1 - p) and
// dS = scale P (dP - Delta): dV += P~^T dO, dK += dS^T Q, dQ += dS K (Dao et al., FlashAttention, 2022).
// Keys are walked outside, queries inside, so that dK and dV of a block stay in the cache and need no atomics. The
// only transposes are of K and V, once a head; all five products then read their operands along rows.
#include "attention_tile.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

// P (dropped, rescaled) replaces the scores, dS replaces dP.
template <bool DROPOUT>
void gradient_tile(const AttentionProblem& p, const Tile& t, float* s, float* dp, const float* lse,
                   const float* lse_low, const float* delta) {
  const Ints lane = lane_numbers();
  const PhiloxKey key{p.seed, p.offset};
  const Floats scale = broadcast(p.scale);
  for (int64_t i = 0; i < t.rows; i += GROUP, s += GROUP * TILE_STRIDE, dp += GROUP * TILE_STRIDE) {
    const Limits limits = group_limits(t, i);
    const auto columns = [&]<bool MASKED>(int32_t j) {
      PhiloxWords words;
      if (DROPOUT)
        words = philox(key, static_cast<uint32_t>(t.j0 + j), static_cast<uint32_t>((t.i0 + i) / GROUP), t.head);
#pragma GCC unroll 8
      for (int r = 0; r < GROUP; ++r) {
        float *score = s + r * TILE_STRIDE + j, *gradient = dp + r * TILE_STRIDE + j;
        Floats e = exp(load(score) * scale - lse[i + r] - lse_low[i + r]), d = load(gradient), kept_e = e;
        if (DROPOUT) {
          const Ints keep = kept(words, r, p.drop_threshold);
          d = keep ? d * p.keep_scale : 0.0f;
          kept_e = keep ? e * p.keep_scale : 0.0f;
        }
        Floats ds = e * (d - delta[i + r]) * scale;
        if (MASKED) {
          const Ints visible = lane < limits.of[r] - j;
          kept_e = visible ? kept_e : 0.0f;
          ds = visible ? ds : 0.0f;
        }
        store(score, kept_e);
        store(gradient, ds);
      }
    };
    for (int32_t j = 0; j < limits.whole; j += LANES) columns.template operator()<false>(j);
    for (int32_t j = limits.whole; j < limits.partial; j += LANES) columns.template operator()<true>(j);
    zero_columns(s, limits.partial, limits.extent);
    zero_columns(dp, limits.partial, limits.extent);
  }
}

// A rectangle of backward work: the query heads [head_begin, head_end) that share one key head, a range of their
// queries and a range of keys. Every split of a head into rectangles walks over the same tiles in the same order.
struct Rectangle {
  int64_t b, head_begin, head_end, i_begin, i_end, j_begin, j_end;
  bool want_query, want_key_value;
};

struct Workspace {
  int64_t q_width, v_width;
  float *k, *v, *kt, *vt, *q, *grad, *lse, *lse_low, *delta, *s, *dp, *dq, *dk, *dv;

  Workspace(const AttentionBackward& p, const Rectangle& r)
      : q_width(round_up(p.D, LANES)), v_width(round_up(p.E, LANES)) {
    const int64_t keys = r.j_end - r.j_begin, queries = (r.head_end - r.head_begin) * (r.i_end - r.i_begin);
    const int64_t panels = round_up(keys, PANEL);
    take_all({{&k, keys * q_width},
              {&v, keys * v_width},
              {&kt, panels * q_width},
              {&vt, panels * v_width},
              {&q, queries * q_width},
              {&grad, queries * v_width},
              {&lse, queries},
              {&lse_low, queries},
              {&delta, queries},
              {&s, TILE},
              {&dp, TILE},
              {&dq, queries * q_width},
              {&dk, KEY_BLOCK * q_width},
              {&dv, KEY_BLOCK * v_width}});
  }
};

// Queries and output gradients of one head in rows; its lse (+inf for empty rows, so that P = 0) and Delta.
struct Queries {
  Rows q, grad;
  float *lse, *lse_low, *delta;
};

Queries queries_of(const AttentionBackward& p, const Rectangle& r, const Workspace& w, int64_t head) {
  const int64_t slot = (head - r.head_begin) * (r.i_end - r.i_begin), h = head % p.H;
  const float* q = head_of(p.q, r.b, h) + r.i_begin * p.q.row;
  const float* grad = head_of(p.grad_out, r.b, h) + r.i_begin * p.grad_out.row;
  return {rows_of(p.q, q, p.D, w.q + slot * w.q_width), rows_of(p.grad_out, grad, p.E, w.grad + slot * w.v_width),
          w.lse + slot, w.lse_low + slot, w.delta + slot};
}

void pack_queries(const AttentionBackward& p, const Rectangle& r, const Workspace& w, int64_t head) {
  const int64_t rows = r.i_end - r.i_begin, slot = (head - r.head_begin) * rows, h = head % p.H;
  pack(p.q, head_of(p.q, r.b, h) + r.i_begin * p.q.row, rows, p.D, w.q + slot * w.q_width);
  pack(p.grad_out, head_of(p.grad_out, r.b, h) + r.i_begin * p.grad_out.row, rows, p.E, w.grad + slot * w.v_width);
  const Queries x = queries_of(p, r, w, head);
  const float* o = head_of(p.out, r.b, h) + r.i_begin * p.out.row;
  for (int64_t i = 0; i < rows; ++i, o += p.out.row) {
    const float* g = x.grad.row(i);
    Floats sum{};
    float tail = 0.0f;
    int64_t e = 0;
    if (p.out.column == 1)
      for (; e + LANES <= p.E; e += LANES) sum += load(o + e) * load(g + e);
    for (; e < p.E; ++e) tail += o[e * p.out.column] * g[e];
    const int64_t index = head * p.L + r.i_begin + i;
    x.delta[i] = sum_lanes(sum) + tail - (p.grad_lse ? p.grad_lse[index] : 0.0f);
    x.lse[i] = p.lse[index] == -INF ? INF : p.lse[index];
    x.lse_low[i] = p.lse_low[index];
  }
}

// Rows of a gradient: in the result itself where it has whole registers, else in scratch memory with padded rows.
struct Target {
  float* data;
  int64_t stride;
};

Target target(float* result, float* space, int64_t columns) {
  return columns % LANES == 0 ? Target{result, columns} : Target{space, round_up(columns, LANES)};
}

void write_back(const Target& from, float* result, int64_t rows, int64_t columns) {
  if (from.data == result) return;
  for (int64_t i = 0; i < rows; ++i) write_row(result + i * columns, from.data + i * from.stride, columns, 1.0f);
}

struct Targets {
  Target dq, dk, dv;  // dq: rows of the rectangle; dk, dv: rows of the block of keys
};

// Scores and dP of a tile, then the products that the rectangle wants.
void backward_tile(const AttentionBackward& p, const Rectangle& r, const Workspace& w, const Tile& t, const Rows& k,
                   const Queries& x, const Targets& to, bool first_of_keys) {
  const int64_t i = t.i0 - r.i_begin, j = t.j0 - r.j_begin;
  const float *q = x.q.row(i), *grad = x.grad.row(i);
  multiply<false, false, Trim::columns>(
      {q, x.q.stride, w.kt + j * p.D, PANEL, p.D, w.s, TILE_STRIDE, t.rows, t.cols, p.D, t.edge});
  multiply<false, false, Trim::columns>(
      {grad, x.grad.stride, w.vt + j * p.E, PANEL, p.E, w.dp, TILE_STRIDE, t.rows, t.cols, p.E, t.edge});
  if (p.drop_threshold > 0)
    gradient_tile<true>(p, t, w.s, w.dp, x.lse + i, x.lse_low + i, x.delta + i);
  else
    gradient_tile<false>(p, t, w.s, w.dp, x.lse + i, x.lse_low + i, x.delta + i);
  if (r.want_key_value) {
    accumulate<true, Trim::k_begin>(first_of_keys, {w.s, TILE_STRIDE, grad, x.grad.stride, 1, to.dv.data, to.dv.stride,
                                                    t.cols, p.E, t.rows, t.edge});
    accumulate<true, Trim::k_begin>(
        first_of_keys, {w.dp, TILE_STRIDE, q, x.q.stride, 1, to.dk.data, to.dk.stride, t.cols, p.D, t.rows, t.edge});
  }
  if (r.want_query)
    accumulate<false, Trim::k_end>(t.j0 == 0, {w.dp, TILE_STRIDE, k.row(j), k.stride, 1, to.dq.data + i * to.dq.stride,
                                               to.dq.stride, t.rows, p.D, t.cols, t.edge});
}

// Gradients of the keys [begin, end) of a key head that no query sees.
void zero_keys(const AttentionBackward& p, int64_t key_head, int64_t begin, int64_t end) {
  if (begin >= end) return;
  std::fill_n(p.dk + (key_head * p.S + begin) * p.D, (end - begin) * p.D, 0.0f);
  std::fill_n(p.dv + (key_head * p.S + begin) * p.E, (end - begin) * p.E, 0.0f);
}

void backward_rectangle(const AttentionBackward& p, const Rectangle& r) {
  const int64_t key_head = r.head_begin % p.H / p.G, keys = r.j_end - r.j_begin;
  const int64_t key_row = (r.b * (p.H / p.G) + key_head) * p.S;
  const Workspace w(p, r);
  const Rows k = pack(p.k, head_of(p.k, r.b, key_head) + r.j_begin * p.k.row, keys, p.D, w.k);
  const Rows v = pack(p.v, head_of(p.v, r.b, key_head) + r.j_begin * p.v.row, keys, p.E, w.v);
  pack_transposed(k, keys, p.D, w.kt);
  pack_transposed(v, keys, p.E, w.vt);
  const int64_t rows = r.i_end - r.i_begin;
  const auto dq_result = [&](int64_t head) { return p.dq + (head * p.L + r.i_begin) * p.D; };
  const auto dq_of = [&](int64_t head) {
    return target(dq_result(head), w.dq + (head - r.head_begin) * rows * w.q_width, p.D);
  };
  for (int64_t head = r.head_begin; head < r.head_end; ++head) {
    pack_queries(p, r, w, head);
    // The first block of keys writes dq of the rows that see it; rows before them see no key.
    const int64_t blind = keys > 0 ? std::min(r.i_end, first_row(p, r.i_begin, 0)) - r.i_begin : rows;
    if (r.want_query) std::fill_n(dq_of(head).data, blind * dq_of(head).stride, 0.0f);
  }
  for (int64_t j0 = r.j_begin; j0 < r.j_end; j0 += KEY_BLOCK) {
    const int64_t cols = std::min(KEY_BLOCK, r.j_end - j0);
    float *dk = p.dk + (key_row + j0) * p.D, *dv = p.dv + (key_row + j0) * p.E;
    bool first = true;
    Targets to{{}, target(dk, w.dk, p.D), target(dv, w.dv, p.E)};
    for (int64_t head = r.head_begin; head < r.head_end; ++head) {
      const Queries x = queries_of(p, r, w, head);
      to.dq = dq_of(head);
      for (int64_t i0 = first_row(p, r.i_begin, j0); i0 < r.i_end; i0 += QUERY_BLOCK) {
        backward_tile(p, r, w, make_tile(p, head, i0, j0, r.j_end), k, x, to, first);
        first = false;
      }
    }
    if (!r.want_key_value) continue;
    if (first) zero_keys(p, key_row / p.S, j0, j0 + cols);
    if (first) continue;
    write_back(to.dk, dk, cols, p.D);
    write_back(to.dv, dv, cols, p.E);
  }
  for (int64_t head = r.head_begin; r.want_query && head < r.head_end; ++head)
    write_back(dq_of(head), dq_result(head), rows, p.D);
}

}  // namespace

void backward(const AttentionBackward& p, Gradients wanted, int64_t begin, int64_t end) {
  const int64_t blocks = query_blocks(p), key_blocks = (p.S + KEY_BLOCK - 1) / KEY_BLOCK, key_heads = p.H / p.G;
  for (int64_t unit = begin; unit < end; ++unit) {
    if (wanted == Gradients::query) {
      const int64_t head = unit / p.strips, strip = folded(unit % p.strips, p.strips), b = head / p.H;
      const int64_t i_begin = strip * blocks / p.strips * QUERY_BLOCK;
      const int64_t i_end = std::min(p.L, (strip + 1) * blocks / p.strips * QUERY_BLOCK);
      backward_rectangle(p, {b, head, head + 1, i_begin, i_end, 0, visible_keys(p, b), true, false});
      continue;
    }
    const bool all = wanted == Gradients::all;
    const int64_t key_head = all ? unit : unit / key_blocks, b = key_head / key_heads;
    const int64_t j_begin = all ? 0 : folded(unit % key_blocks, key_blocks) * KEY_BLOCK;
    const int64_t j_end = all ? p.S : std::min(p.S, j_begin + KEY_BLOCK), keys = visible_keys(p, b);
    const int64_t head = b * p.H + key_head % key_heads * p.G;
    zero_keys(p, key_head, std::max(keys, j_begin), j_end);
    if (all || j_begin < keys)
      backward_rectangle(p, {b, head, head + p.G, 0, p.L, j_begin, std::min(keys, j_end), all, true});
  }
}

}  // namespace nlpfast::NLPFAST_ISA
