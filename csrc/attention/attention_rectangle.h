// What the backward of attention keeps in scratch memory: packed queries and keys of a rectangle of work, and the
// rows that its gradients go to.
#pragma once

#include "attention_mask.h"

namespace nlpfast::NLPFAST_ISA {

// A rectangle of backward work: the query heads [h_begin, h_end) that share one key head, a range of their queries and
// a range of keys. Every split of a head into rectangles walks over the same tiles in the same order.
struct Rectangle {
  int64_t h_begin, h_end, i_begin, i_end, j_begin, j_end;
  bool want_query, want_key_value;
  float* dmask;  // the gradient of the mask where the rectangle begins, or null

  // Rows of scratch memory a head: whole groups, and whole inner dimensions of pairs of queries.
  int64_t slots() const { return round_up(i_end - i_begin, std::max<int64_t>(GROUP, 2 * INNER_GRAIN)); }
};

template <bool PAIRS>
struct Workspace {
  int64_t q_width, v_width;    // words of packed rows
  int64_t dq_width, dv_width;  // floats of rows of gradients, and words of interleaved pairs
  float *k, *v, *kt, *vt, *q, *grad, *lse, *lse_low, *delta, *s, *dp, *dq, *dk, *dv;
  float *k_pairs = nullptr, *q_pairs = nullptr, *grad_pairs = nullptr;

  Workspace(const AttentionBackward& p, const Rectangle& r)
      : q_width(width_of<PAIRS>(p.D)),
        v_width(width_of<PAIRS>(p.E)),
        dq_width(round_up(p.D, LANES)),
        dv_width(round_up(p.E, LANES)) {
    const int64_t keys = r.j_end - r.j_begin, queries = (r.h_end - r.h_begin) * r.slots();
    const int64_t panels = round_up(keys, PANEL), pairs = PAIRS ? queries / 2 : 0;
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
              {&dq, queries * dq_width},
              {&dk, KEY_BLOCK * dq_width},
              {&dv, KEY_BLOCK * dv_width},
              {&k_pairs, PAIRS ? round_up(words_of<true>(keys), INNER_GRAIN) * dq_width : 0},
              {&q_pairs, pairs * dq_width},
              {&grad_pairs, pairs * dv_width}});
  }
};

// Queries and output gradients of one head, and as second operands; lse (+inf for empty rows, so that P = 0) and Delta.
struct Queries {
  Rows q, grad, q_right, grad_right;
  float *lse, *lse_low, *delta;
};

template <bool PAIRS>
Queries queries_of(const AttentionBackward& p, const Sequence& s, const Rectangle& r, const Workspace<PAIRS>& w,
                   int64_t h) {
  const int64_t rows = r.i_end - r.i_begin, slot = (h - r.h_begin) * r.slots();
  const char *q = rows_at(p.dtype, p.q, s.b, h, s.q_first + r.i_begin),
             *grad = rows_at(p.dtype, p.grad_out, s.b, h, s.q_first + r.i_begin);
  Queries x{rows_of<PAIRS>(p, p.q, q, rows, p.D, w.q + slot * w.q_width),
            rows_of<PAIRS>(p, p.grad_out, grad, rows, p.E, w.grad + slot * w.v_width),
            {},
            {},
            w.lse + slot,
            w.lse_low + slot,
            w.delta + slot};
  x.q_right = PAIRS ? Rows{w.q_pairs + slot / 2 * w.dq_width, w.dq_width} : x.q;
  x.grad_right = PAIRS ? Rows{w.grad_pairs + slot / 2 * w.dv_width, w.dv_width} : x.grad;
  return x;
}

// Whether one tile has all keys of a row, and so the terms of its Delta.
inline bool rows_are_whole(const Sequence& s) { return s.keys <= KEY_BLOCK; }

// rowsum(dO * O) of one row.
template <class Element>
float product_sum(const Element* o, int64_t o_step, const Element* g, int64_t g_step, int64_t n) {
  Floats sum{};
  float tail = 0.0f;
  int64_t e = 0;
  if (o_step == 1 && g_step == 1)
    for (; e + LANES <= n; e += LANES) sum += load(o + e) * load(g + e);
  for (; e < n; ++e) tail += to_float(o[e * o_step]) * to_float(g[e * g_step]);
  return sum_lanes(sum) + tail;
}

template <bool PAIRS>
void pack_queries(const AttentionBackward& p, const Sequence& s, const Rectangle& r, const Workspace<PAIRS>& w,
                  int64_t h) {
  const int64_t rows = r.i_end - r.i_begin, slot = (h - r.h_begin) * r.slots();
  const char *q = rows_at(p.dtype, p.q, s.b, h, s.q_first + r.i_begin),
             *grad = rows_at(p.dtype, p.grad_out, s.b, h, s.q_first + r.i_begin),
             *out = rows_at(p.dtype, p.out, s.b, h, s.q_first + r.i_begin);
  pack<PAIRS>(p, p.q, q, rows, p.D, w.q + slot * w.q_width);
  pack<PAIRS>(p, p.grad_out, grad, rows, p.E, w.grad + slot * w.v_width);
  const Queries x = queries_of(p, s, r, w, h);
  with_element(p.dtype, [&](auto element) {
    using Element = decltype(element);
    const auto *o = reinterpret_cast<const Element*>(out), *g = reinterpret_cast<const Element*>(grad);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t index = lse_index(p, s, h, r.i_begin + i);
      const bool empty = p.lse[index] == -INF;
      x.lse[i] = empty ? INF : p.lse[index];
      x.lse_low[i] = p.lse_low[index];
      x.delta[i] = empty || !p.grad_lse ? 0.0f : -p.grad_lse[index];
      if (!empty && !rows_are_whole(s))
        x.delta[i] += product_sum(o + i * p.out.row, p.out.column, g + i * p.grad_out.row, p.grad_out.column, p.E);
      // Rows that see nothing may hold garbage; where a mask decides, they are copies.
      if (!PAIRS && empty && p.mask.data) {
        std::fill_n(w.q + (slot + i) * w.q_width, w.q_width, 0.0f);
        std::fill_n(w.grad + (slot + i) * w.v_width, w.v_width, 0.0f);
      }
    }
  });
  as_right_operand<PAIRS>(x.q, rows, p.D, w.q_pairs + slot / 2 * w.dq_width, x.lse);
  as_right_operand<PAIRS>(x.grad, rows, p.E, w.grad_pairs + slot / 2 * w.dv_width, x.lse);
}

// Rows of a gradient: in the result itself where it has floats in whole registers, else in scratch memory.
struct Target {
  float* data;
  int64_t stride;
};

template <bool PAIRS>
Target target(const AttentionProblem& p, const Result& x, char* result, float* space, int64_t columns) {
  const bool direct = !PAIRS && p.dtype == Dtype::float32 && columns % LANES == 0;
  return direct ? Target{reinterpret_cast<float*>(result), x.row} : Target{space, round_up(columns, LANES)};
}

inline void write_back(const AttentionProblem& p, const Target& from, const Result& x, char* result, int64_t rows,
                       int64_t columns) {
  if (reinterpret_cast<char*>(from.data) == result) return;
  with_element(p.dtype, [&](auto element) {
    auto* to = reinterpret_cast<decltype(element)*>(result);
    for (int64_t i = 0; i < rows; ++i) write_row(to + i * x.row, from.data + i * from.stride, columns, 1.0f);
  });
}

inline void zero_rows(const AttentionProblem& p, const Result& x, char* result, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    std::fill_n(result + i * x.row * size_of(p.dtype), columns * size_of(p.dtype), char{0});
}

}  // namespace nlpfast::NLPFAST_ISA
