// Log probabilities of attention at single pairs (b, t, s):  l_h = scale q_ht . k_hs - lse_ht,  and their gradients
//
//   dq_ht += c scale k_hs      dk_hs += c scale q_ht      dlse_ht -= c
//
// A unit goes through the pairs of its batch entry head by head, so that the rows that it reads again are still in the
// cache. Gradients of a row are added up in float32 scratch memory and added to the row once, at the end: rounded once,
// in the order of the pairs, whoever computes it. Rows that no pair names are neither read nor written.
#include <cmath>
#include <memory>
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

// Calls f(v) for whole registers and g(i) for the elements that are left.
template <class F, class G>
inline void for_elements(int64_t D, F&& f, G&& g) {
  int64_t d = 0;
  for (; d + LANES <= D; d += LANES) f(d);
  for (; d < D; ++d) g(d);
}

template <class Element>
inline float dot(const Element* x, const Element* y, int64_t D) {
  Floats sum = broadcast(0.0f);
  float rest = 0.0f;
  for_elements(
      D, [&](int64_t d) { sum = sum + load(x + d) * load(y + d); },
      [&](int64_t d) { rest += to_float(x[d]) * to_float(y[d]); });
  return sum_lanes(sum) + rest;
}

// sum += factor * x
template <class Element>
inline void add_scaled(float* sum, float factor, const Element* x, int64_t D) {
  const Floats factors = broadcast(factor);
  for_elements(
      D, [&](int64_t d) { store(sum + d, load(sum + d) + factors * load(x + d)); },
      [&](int64_t d) { sum[d] += factor * to_float(x[d]); });
}

template <class Element>
inline void add_to(Element* row, const float* sum, int64_t D) {
  for_elements(
      D, [&](int64_t d) { store(row + d, load(row + d) + load(sum + d)); },
      [&](int64_t d) { row[d] = from_float<Element>(to_float(row[d]) + sum[d]); });
}

// Sums of rows of D floats, of which there are few among many: a row is cleared when it is first asked for.
class RowSums {
 public:
  RowSums(int64_t rows, int64_t D) : D_(D), sums_(new float[rows * D]), there_(rows, false) {}

  float* row(int64_t i) {
    float* sum = sums_.get() + i * D_;
    if (!there_[i]) {
      there_[i] = true, asked_.push_back(i);
      std::fill_n(sum, D_, 0.0f);
    }
    return sum;
  }

  // Calls f(i, sum) for each row that was asked for, and forgets them.
  template <class F>
  void take(F&& f) {
    for (const int64_t i : asked_) f(i, sums_.get() + i * D_), there_[i] = false;
    asked_.clear();
  }

 private:
  int64_t D_;
  std::unique_ptr<float[]> sums_;
  std::vector<bool> there_;
  std::vector<int64_t> asked_;
};

// Calls f(i, h) for the heads asked for that read key head hk: the i-th of them is query head h.
template <class F>
inline void for_heads_of(const AlignmentLoss& p, int64_t hk, F&& f) {
  const int64_t group = p.H / p.Hk;
  for (int64_t i = 0; i < p.n; ++i)
    if (p.heads[i] / group == hk) f(i, p.heads[i]);
}

// Calls f(pair, t, s) for the pairs of a batch entry.
template <class F>
inline void for_pairs_of(const AlignmentLoss& p, int64_t b, F&& f) {
  for (int64_t at = p.begin[b]; at < p.begin[b + 1]; ++at) {
    const int64_t pair = p.order[at];
    f(pair, p.pairs[3 * pair + 1], p.pairs[3 * pair + 2]);
  }
}

template <class Element>
void forward_unit(const AlignmentLossForward& p, int64_t b, int64_t hk) {
  for_heads_of(p, hk, [&](int64_t i, int64_t h) {
    const float* lse = p.lse + (b * p.H + h) * p.L;
    for_pairs_of(p, b, [&](int64_t pair, int64_t t, int64_t s) {
      const float score =
          p.scale * dot(row_of<const Element>(p.query, b, h, t), row_of<const Element>(p.key, b, hk, s), p.D);
      // a query that sees no key gives none a probability
      p.terms[pair * p.n + i] = lse[t] == -INF ? -INF : score - lse[t];
    });
  });
}

template <class Element>
void backward_unit(const AlignmentLossBackward& p, int64_t b, int64_t hk, RowSums& of_queries, RowSums& of_keys) {
  for_heads_of(p, hk, [&](int64_t i, int64_t h) {
    for_pairs_of(p, b, [&](int64_t pair, int64_t t, int64_t s) {
      const float c = p.coefficients[pair * p.n + i];
      if (p.d_query.data) add_scaled(of_queries.row(t), p.scale * c, row_of<const Element>(p.key, b, hk, s), p.D);
      if (p.d_key.data) add_scaled(of_keys.row(s), p.scale * c, row_of<const Element>(p.query, b, h, t), p.D);
      if (p.d_lse) p.d_lse[(b * p.H + h) * p.L + t] -= c;
    });
    of_queries.take([&](int64_t t, const float* sum) { add_to(row_of<Element>(p.d_query, b, h, t), sum, p.D); });
  });
  of_keys.take([&](int64_t s, const float* sum) { add_to(row_of<Element>(p.d_key, b, hk, s), sum, p.D); });
}

void forward(const AlignmentLossForward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    for (int64_t unit = begin; unit < end; ++unit) forward_unit<decltype(element)>(p, unit / p.Hk, unit % p.Hk);
  });
}

void backward(const AlignmentLossBackward& p, int64_t begin, int64_t end) {
  RowSums of_queries(p.d_query.data ? p.L : 0, p.D), of_keys(p.d_key.data ? p.S : 0, p.D);
  with_element(p.dtype, [&](auto element) {
    for (int64_t unit = begin; unit < end; ++unit)
      backward_unit<decltype(element)>(p, unit / p.Hk, unit % p.Hk, of_queries, of_keys);
  });
}

}  // namespace

extern const AlignmentLossKernels alignment_loss{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
