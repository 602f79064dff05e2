// Log probabilities of attention at single pairs (b, t, s):  l_h = scale q_ht . k_hs - lse_ht,  and their gradients
//
//   dq_ht += c scale k_hs      dk_hs += c scale q_ht      dlse_ht -= c
//
// A unit goes through the pairs of its batch entry, which come sorted by the row that is written and else in their
// order: the gradient of a row is summed up in registers and added to the row once. It is rounded once, and has the
// same bits whoever computes it. Rows that no pair names are neither read nor written.
#include <algorithm>
#include <vector>

#include "../float16.h"
#include "../simd.h"
#include "alignment_loss.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

template <class Element>
Element* row_of(const Heads& x, int64_t b, int64_t h, int64_t i) {
  return reinterpret_cast<Element*>(x.data) + b * x.batch + h * x.head + i * x.row;
}

// Registers that a loop over a row has in use at once.
constexpr int64_t UNROLL = 4;

template <class Element>
inline float dot(const Element* x, const Element* y, int64_t D) {
  Floats sums[UNROLL] = {};
  int64_t d = 0;
  for (; d + UNROLL * LANES <= D; d += UNROLL * LANES)
#pragma GCC unroll 4
    for (int64_t u = 0; u < UNROLL; ++u) sums[u] = sums[u] + load(x + d + u * LANES) * load(y + d + u * LANES);
  for (; d + LANES <= D; d += LANES) sums[0] = sums[0] + load(x + d) * load(y + d);
  float rest = 0.0f;
  for (; d < D; ++d) rest += to_float(x[d]) * to_float(y[d]);
  return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

// row[d] += the sum of factor * other[d], for VECTORS registers from d on; for_terms calls its argument with factor
// and other, the same ones in the same order each time.
template <int VECTORS, class Element, class F>
inline void add_terms(Element* row, int64_t d, F&& for_terms) {
  Floats sums[VECTORS] = {};
  for_terms([&](float factor, const Element* other) {
    const Floats factors = broadcast(factor);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sums[v] = sums[v] + factors * load(other + d + v * LANES);
  });
#pragma GCC unroll 4
  for (int v = 0; v < VECTORS; ++v) store(row + d + v * LANES, load(row + d + v * LANES) + sums[v]);
}

template <class Element, class F>
inline void add_terms_to_row(Element* row, int64_t D, F&& for_terms) {
  int64_t d = 0;
  for (; d + UNROLL * LANES <= D; d += UNROLL * LANES) add_terms<UNROLL>(row, d, for_terms);
  for (; d + LANES <= D; d += LANES) add_terms<1>(row, d, for_terms);
  for (; d < D; ++d) {
    float sum = 0.0f;
    for_terms([&](float factor, const Element* other) { sum += factor * to_float(other[d]); });
    row[d] = from_float<Element>(to_float(row[d]) + sum);
  }
}

// The heads asked for that read key head hk: the i-th of all that are asked for is query head h.
struct Head {
  int64_t i, h;
};

inline std::vector<Head> heads_of(const AlignmentLoss& p, int64_t hk) {
  const int64_t group = p.H / p.Hk;
  std::vector<Head> heads;
  for (int64_t i = 0; i < p.n; ++i)
    if (p.heads[i] / group == hk) heads.push_back({i, p.heads[i]});
  return heads;
}

// Rows that pairs name come in no order that the processor would foresee: they are asked for so many pairs ahead.
constexpr int64_t AHEAD = 12;
constexpr int64_t CACHE_LINE = 64;

template <class Element>
inline void ask_for(const Element* row, int64_t D) {
  for (int64_t d = 0; d < D; d += CACHE_LINE / (int64_t)sizeof(Element)) __builtin_prefetch(row + d);
}

// One of the batch entry's pairs in an order.
struct Pair {
  int64_t number, t, s;
};

inline Pair pair_at(const AlignmentLoss& p, const int64_t* order, int64_t at) {
  const int64_t number = order[at];
  return {number, p.pairs[3 * number + 1], p.pairs[3 * number + 2]};
}

// Calls f(begin, end) for the runs of equal rows, which `row` returns of a pair.
template <class Row, class F>
inline void for_runs(const AlignmentLoss& p, const int64_t* order, int64_t b, Row&& row, F&& f) {
  for (int64_t at = p.begin[b], end; at < p.begin[b + 1]; at = end) {
    const int64_t here = row(pair_at(p, order, at));
    for (end = at + 1; end < p.begin[b + 1] && row(pair_at(p, order, end)) == here;) ++end;
    f(here, at, end);
  }
}

template <class Element>
void forward_unit(const AlignmentLossForward& p, int64_t b, int64_t hk) {
  for (const auto [i, h] : heads_of(p, hk)) {
    const float* lse = p.lse + (b * p.H + h) * p.L;
    for (int64_t at = p.begin[b]; at < p.begin[b + 1]; ++at) {
      if (at + AHEAD < p.begin[b + 1])
        ask_for(row_of<const Element>(p.key, b, hk, pair_at(p, p.by_query, at + AHEAD).s), p.D);
      const Pair pair = pair_at(p, p.by_query, at);
      const auto* q = row_of<const Element>(p.query, b, h, pair.t);
      const auto* k = row_of<const Element>(p.key, b, hk, pair.s);
      // a query that sees no key gives none a probability
      p.terms[pair.number * p.n + i] = lse[pair.t] == -INF ? -INF : p.scale * dot(q, k, p.D) - lse[pair.t];
    }
  }
}

template <class Element>
void backward_unit(const AlignmentLossBackward& p, int64_t b, int64_t hk) {
  const std::vector<Head> heads = heads_of(p, hk);
  const int64_t last = p.begin[b + 1] - 1;
  const auto coefficient = [&](const Pair& pair, int64_t i) { return p.coefficients[pair.number * p.n + i]; };
  const auto query_of = [](const Pair& pair) { return pair.t; };
  for (const auto [i, h] : heads) {
    for_runs(p, p.by_query, b, query_of, [&, i = i, h = h](int64_t t, int64_t begin, int64_t end) {
      if (p.d_query.data) {
        for (int64_t at = begin; at < end; ++at) {
          const Pair next = pair_at(p, p.by_query, std::min(at + AHEAD, last));
          ask_for(row_of<Element>(p.key, b, hk, next.s), p.D);
          ask_for(row_of<Element>(p.d_query, b, h, next.t), p.D);
        }
        add_terms_to_row(row_of<Element>(p.d_query, b, h, t), p.D, [&](auto&& add) {
          for (int64_t at = begin; at < end; ++at) {
            const Pair pair = pair_at(p, p.by_query, at);
            add(p.scale * coefficient(pair, i), row_of<Element>(p.key, b, hk, pair.s));
          }
        });
      }
      if (p.d_lse)
        for (int64_t at = begin; at < end; ++at)
          p.d_lse[(b * p.H + h) * p.L + t] -= coefficient(pair_at(p, p.by_query, at), i);
    });
  }
  if (!p.d_key.data || heads.empty()) return;
  const auto key_of = [](const Pair& pair) { return pair.s; };
  for_runs(p, p.by_key, b, key_of, [&](int64_t s, int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Pair next = pair_at(p, p.by_key, std::min(at + AHEAD, last));
      ask_for(row_of<Element>(p.d_key, b, hk, next.s), p.D);
      for (const Head& head : heads) ask_for(row_of<Element>(p.query, b, head.h, next.t), p.D);
    }
    add_terms_to_row(row_of<Element>(p.d_key, b, hk, s), p.D, [&](auto&& add) {
      for (const Head& head : heads)
        for (int64_t at = begin; at < end; ++at) {
          const Pair pair = pair_at(p, p.by_key, at);
          add(p.scale * coefficient(pair, head.i), row_of<Element>(p.query, b, head.h, pair.t));
        }
    });
  });
}

void forward(const AlignmentLossForward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    for (int64_t unit = begin; unit < end; ++unit) forward_unit<decltype(element)>(p, unit / p.Hk, unit % p.Hk);
  });
}

void backward(const AlignmentLossBackward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    for (int64_t unit = begin; unit < end; ++unit) backward_unit<decltype(element)>(p, unit / p.Hk, unit % p.Hk);
  });
}

}  // namespace

extern const AlignmentLossKernels alignment_loss{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
