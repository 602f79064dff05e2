// Attention on CPUs, float32: O = dropout(softmax(scale Q K^T + mask)) V and its gradients, tile by tile.
//
// Forward keeps, for QUERY_BLOCK queries, the running maximum, sum and O while it walks over blocks of keys (online
// softmax, Milakov & Gimelshein 2018; tiling and backward after Dao et al., FlashAttention, 2022).
// Backward recomputes P = exp(scale S - lse) from the saved lse, kept to twice the precision because its rounding is a
// relative error of P (0.4 % at scores of 1e5); with Delta = rowsum(dO * O) - dlse,
// dP = mask dO V^T / (1 - p), dS = scale P (dP - Delta), and dV += P~^T dO, dK += dS^T Q, dQ += dS K.
// Keys are walked outside, queries inside, so that dK and dV of a block stay in the cache and need no atomics. The
// only transposes are of K and V, once a head; all five products then read their operands along rows.
#include "attention_tile.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

struct Online {
  float max[QUERY_BLOCK], sum[QUERY_BLOCK];
};

// Scores -> unnormalised probabilities in place; updates the statistics and rescales the rows of `o` to the new
// maximum.
void softmax_tile(const AttentionProblem& p, const Tile& t, float* s, Online& online, float* o, int64_t width) {
  const Ints lane = lane_numbers();
  const Floats scale = broadcast(p.scale);
  for (int64_t i = 0; i < t.rows; ++i, s += TILE_STRIDE, o += width) {
    const int32_t limit = static_cast<int32_t>(t.limit(i)), extent = static_cast<int32_t>(t.extent(i));
    const int32_t whole = limit / LANES * LANES;
    Floats top = broadcast(-INF);
    for (int32_t j = 0; j < whole; j += LANES) top = maximum(load(s + j) * scale, top);
    if (whole < limit) top = maximum(lane < limit - whole ? load(s + whole) * scale : -INF, top);
    const float before = online.max[i], max = std::max(before, max_lanes(top));
    // A row whose scores are all -inf or NaN so far: any finite reference gives 0 and NaN.
    const Floats reference = broadcast(max == -INF ? 0.0f : max);
    if (t.j0 > 0) {
      const float correction = std::exp(before - reference[0]);
      online.sum[i] *= correction;
      for (int64_t e = 0; e < width; e += LANES) store(o + e, load(o + e) * correction);
    }
    Floats sum{};
    for (int32_t j = 0; j < whole; j += LANES) {
      const Floats e = exp(load(s + j) * scale - reference);
      sum += e;
      store(s + j, e);
    }
    for (int32_t j = whole; j < extent; j += LANES) {
      const Floats e = lane < limit - j ? exp(load(s + j) * scale - reference) : 0.0f;
      sum += e;
      store(s + j, e);
    }
    online.max[i] = max;
    online.sum[i] += sum_lanes(sum);
  }
}

void drop_tile(const AttentionProblem& p, const Tile& t, float* s) {
  const PhiloxKey key{p.seed, p.offset};
  for (int64_t i = 0; i < t.rows; i += 8) {
    const int rows = static_cast<int>(std::min<int64_t>(8, t.rows - i));
    const int64_t limit = t.limit(i + rows - 1);
    for (int64_t j = 0; j < limit; j += LANES) {
      const PhiloxWords words =
          philox(key, static_cast<uint32_t>(t.j0 + j), static_cast<uint32_t>((t.i0 + i) / 8), t.head);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        if (r >= rows) break;
        float* x = s + (i + r) * TILE_STRIDE + j;
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
    std::fill_n(online.max, rows, -INF);
    std::fill_n(online.sum, rows, 0.0f);
    std::fill_n(o, rows * width, 0.0f);
    const int64_t end = p.causal ? std::clamp<int64_t>(i0 + rows + p.diagonal, 0, keys) : keys;
    for (int64_t j0 = 0; j0 < end; j0 += KEY_BLOCK) {
      const Tile t = make_tile(p, head, i0, j0, end);
      multiply<false, false, Trim::columns>(
          {q.data, q.stride, kt + j0 * p.D, PANEL, p.D, s, TILE_STRIDE, rows, t.cols, p.D, t.edge});
      softmax_tile(p, t, s, online, o, width);
      if (p.drop_threshold > 0) drop_tile(p, t, s);
      multiply<false, true, Trim::k_end>({s, TILE_STRIDE, v.row(j0), v.stride, 1, o, width, rows, p.E, t.cols, t.edge});
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float sum = online.sum[i], inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
      float* row = o + i * width;
      for (int64_t e = 0; e < width; e += LANES) store(row + e, load(row + e) * inverse);
      std::memcpy(p.out + (head * p.L + i0 + i) * p.E, row, static_cast<size_t>(p.E) * 4);
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

// P (dropped, rescaled) replaces the scores, dS replaces dP.
template <bool DROPOUT>
void gradient_tile(const AttentionProblem& p, const Tile& t, float* s, float* dp, const float* lse,
                   const float* lse_low, const float* delta) {
  const Ints lane = lane_numbers();
  const PhiloxKey key{p.seed, p.offset};
  const Floats scale = broadcast(p.scale);
  for (int64_t i = 0; i < t.rows; i += 8) {
    const int rows = static_cast<int>(std::min<int64_t>(8, t.rows - i));
    const int32_t extent = static_cast<int32_t>(t.extent(i + rows - 1));
    int32_t limit[8];
    for (int r = 0; r < rows; ++r) limit[r] = static_cast<int32_t>(t.limit(i + r));
    for (int32_t j = 0; j < extent; j += LANES) {
      PhiloxWords words;
      if (DROPOUT) words = philox(key, static_cast<uint32_t>(t.j0 + j), static_cast<uint32_t>((t.i0 + i) / 8), t.head);
#pragma GCC unroll 8
      for (int r = 0; r < 8; ++r) {
        if (r >= rows) break;
        float* score = s + (i + r) * TILE_STRIDE + j;
        float* gradient = dp + (i + r) * TILE_STRIDE + j;
        const Ints visible = lane < limit[r] - j;
        const Floats e = exp(load(score) * scale - lse[i + r] - lse_low[i + r]);
        Floats d = load(gradient), kept_e = e;
        if (DROPOUT) {
          const Ints keep = kept(words, r, p.drop_threshold);
          d = keep ? d * p.keep_scale : 0.0f;
          kept_e = keep ? e * p.keep_scale : 0.0f;
        }
        store(score, visible ? kept_e : 0.0f);
        store(gradient, visible ? e * (d - delta[i + r]) * scale : 0.0f);
      }
    }
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
              {&dq, QUERY_BLOCK * q_width},
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

void add_rows(float* to, int64_t columns, const float* from, int64_t width, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i, to += columns, from += width) {
    int64_t c = 0;
    for (; c + LANES <= columns; c += LANES) store(to + c, load(to + c) + load(from + c));
    for (; c < columns; ++c) to[c] += from[c];
  }
}

// Scores and dP of a tile, then the products that the rectangle wants.
void backward_tile(const AttentionBackward& p, const Rectangle& r, const Workspace& w, const Tile& t, const Rows& k,
                   const Queries& x) {
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
    multiply<true, true, Trim::k_begin>(
        {w.s, TILE_STRIDE, grad, x.grad.stride, 1, w.dv, w.v_width, t.cols, p.E, t.rows, t.edge});
    multiply<true, true, Trim::k_begin>(
        {w.dp, TILE_STRIDE, q, x.q.stride, 1, w.dk, w.q_width, t.cols, p.D, t.rows, t.edge});
  }
  if (r.want_query) {
    multiply<false, false, Trim::k_end>(
        {w.dp, TILE_STRIDE, k.row(j), k.stride, 1, w.dq, w.q_width, t.rows, p.D, t.cols, t.edge});
    add_rows(p.dq + (t.head * p.L + t.i0) * p.D, p.D, w.dq, w.q_width, t.rows);
  }
}

void backward_rectangle(const AttentionBackward& p, const Rectangle& r) {
  const int64_t key_head = r.head_begin % p.H / p.G, keys = r.j_end - r.j_begin;
  const int64_t key_row = (r.b * (p.H / p.G) + key_head) * p.S;
  const Workspace w(p, r);
  const Rows k = pack(p.k, head_of(p.k, r.b, key_head) + r.j_begin * p.k.row, keys, p.D, w.k);
  const Rows v = pack(p.v, head_of(p.v, r.b, key_head) + r.j_begin * p.v.row, keys, p.E, w.v);
  pack_transposed(k, keys, p.D, w.kt);
  pack_transposed(v, keys, p.E, w.vt);
  for (int64_t head = r.head_begin; head < r.head_end; ++head) {
    pack_queries(p, r, w, head);
    if (r.want_query) std::fill_n(p.dq + (head * p.L + r.i_begin) * p.D, (r.i_end - r.i_begin) * p.D, 0.0f);
  }
  for (int64_t j0 = r.j_begin; j0 < r.j_end; j0 += KEY_BLOCK) {
    const int64_t cols = std::min(KEY_BLOCK, r.j_end - j0);
    if (r.want_key_value) {
      std::fill_n(w.dk, cols * w.q_width, 0.0f);
      std::fill_n(w.dv, cols * w.v_width, 0.0f);
    }
    for (int64_t head = r.head_begin; head < r.head_end; ++head) {
      const Queries x = queries_of(p, r, w, head);
      for (int64_t i0 = first_row(p, r.i_begin, j0); i0 < r.i_end; i0 += QUERY_BLOCK)
        backward_tile(p, r, w, make_tile(p, head, i0, j0, r.j_end), k, x);
    }
    for (int64_t j = 0; r.want_key_value && j < cols; ++j) {
      std::memcpy(p.dk + (key_row + j0 + j) * p.D, w.dk + j * w.q_width, static_cast<size_t>(p.D) * 4);
      std::memcpy(p.dv + (key_row + j0 + j) * p.E, w.dv + j * w.v_width, static_cast<size_t>(p.E) * 4);
    }
  }
}

// Gradients of the keys [begin, end) of a key head that no query sees.
void zero_keys(const AttentionBackward& p, int64_t key_head, int64_t begin, int64_t end) {
  if (begin >= end) return;
  std::fill_n(p.dk + (key_head * p.S + begin) * p.D, (end - begin) * p.D, 0.0f);
  std::fill_n(p.dv + (key_head * p.S + begin) * p.E, (end - begin) * p.E, 0.0f);
}

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

}  // namespace

extern const AttentionKernels attention{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
