// Bias, GELU or ReLU, and dropout of rows: each tensor is read once and written once.
//
//   v = x + bias     y = mask factor v Phi(v)     dx = mask factor dy (Phi(v) + v phi(v))
//
// Phi is the distribution function of the normal law and phi its density. With z = |v| and e = exp(-z^2 / 2) both
// follow from one exponential:
//
//   phi(v) = e / sqrt(2 pi)     Phi(-z) = e h(z)     Phi(z) = 1 - e h(z)
//
// h(z) falls from 1/2 like 1 / (sqrt(2 pi) z); the quotient of two polynomials below is a minimax fit of its relative
// error on [0, 14], 5.6e-9. All coefficients are positive, so that nothing cancels, and the result has a small relative
// error on the negative side too, where 1 + erf(v / sqrt(2)) loses all its digits. Beyond 14, e is 0. GELU itself needs
// no choice between the sides: v Phi(v) = max(v, 0) - z e h(z). For 16-bit results shorter fits do: 2.4e-5 for h and
// 2.8e-6 for the exponential, of the 2.4e-4 that rounding to float16 costs.
//
// The approximation (Hendrycks and Gimpel 2016) is v s with s = sigmoid(2 u), u = sqrt(2 / pi) (v + 0.044715 v^3), and
// its derivative s + 2 v s (1 - s) du/dv.
//
// The gradient of bias is the sum of dx over rows: over those of a chunk here, over the chunks by the binding. Chunks
// do not depend on the number of threads, and so neither do the sum's last bits.
#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "../dropout/factors.h"
#include "../float16.h"
#include "bias_gelu.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

constexpr float SQRT_2_OVER_PI = 0.79788456080286536f, CUBIC = 0.044715f;

struct Activated {
  Floats value, slope;
};

// e^x for x <= 0, to the rounding of x; 0 for large ones. NARROW: to 2.8e-6.
template <bool NARROW>
inline Floats decay(Floats x) {
#if defined(__AVX512F__)
  if constexpr (NARROW) {
    const Floats magic = broadcast(12582912.0f), log2_e = broadcast(1.44269504088896341f);
    const Floats n = x * log2_e + magic - magic, r = x * log2_e - n;
    Floats p = r * 9.582852428e-03f + 5.590642491e-02f;
    p = p * r + 2.402409863e-01f;
    p = p * r + 6.931241934e-01f;
    p = p * r + 1.0f;
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
  }
#endif
  return exp_of_difference(x);
}

// h(z) times q(z), and q(z)
template <bool NARROW>
inline std::pair<Floats, Floats> tail(Floats z) {
  if constexpr (NARROW) {
    Floats p = z * 6.251175372e-02f + 2.782399174e-01f, q = z * 1.565172079e-01f + 7.025279536e-01f;
    p = p * z + 5.000120629e-01f;
    q = q * z + 1.355113651e+00f;
    return {p, q * z + 1.0f};
  }
  Floats p = z * 4.077597173e-03f + 4.037246508e-02f, q = z * 1.022089161e-02f + 1.012055726e-01f;
  p = p * z + 1.824615622e-01f;
  q = q * z + 4.674283937e-01f;
  p = p * z + 4.372505407e-01f;
  q = q * z + 1.199289604e+00f;
  q = q * z + 1.672386037e+00f;
  return {p * z + 5.000000028e-01f, q * z + 1.0f};
}

template <bool NARROW>
inline Activated gelu_erf(Floats v) {
  // a NaN goes on through v
  const Floats z = minimum((Floats)((Ints)v & 0x7fffffff), broadcast(14.0f));
  const Floats e = decay<NARROW>(z * z * -0.5f);
  const auto [p, q] = tail<NARROW>(z);
  const Floats below = e * p / q;
  const Floats share = v < 0.0f ? below : 1.0f - below;
  return {maximum(Floats{}, v) - z * below, share + v * e * 0.39894228040143268f};
}

inline Activated gelu_tanh(Floats v) {
  // past 9.9 the share is 0 or 1; a NaN stays in `above`
  const Floats above = maximum(broadcast(-9.9f), v), w = minimum(broadcast(9.9f), above);
  const Floats square = w * w;
  const Floats e = exp_of_difference(w * (square * (-2 * SQRT_2_OVER_PI * CUBIC) - 2 * SQRT_2_OVER_PI));
  const Floats share = 1.0f / (e + 1.0f);
  const Floats rise = square * (6 * SQRT_2_OVER_PI * CUBIC) + 2 * SQRT_2_OVER_PI;
  // e share is 1 - share without cancellation
  return {above * share, share + w * share * (e * share) * rise};
}

// A NaN stays one, and has the slope 1 as in PyTorch.
inline Activated relu(Floats v) { return {maximum(Floats{}, v), v <= 0.0f ? Floats{} : Floats{} + 1.0f}; }

template <Activation ACTIVATION, class Element>
inline Activated activated(Floats v) {
  if constexpr (ACTIVATION == Activation::relu) return relu(v);
  if constexpr (ACTIVATION == Activation::tanh) return gelu_tanh(v);
  return gelu_erf<(sizeof(Element) < sizeof(float))>(v);
}

// Calls step(column, columns) for the registers of a row, the last of which may not be full.
template <class F>
inline void for_columns(int64_t C, F&& step) {
  const int64_t whole = C / LANES * LANES;
  for (int64_t c = 0; c < whole; c += LANES) step(c, LANES);
  if (whole < C) step(whole, C - whole);
}

// The bias, or zeros.
std::vector<float> bias_of(const BiasGelu& p) {
  return p.bias ? std::vector<float>(p.bias, p.bias + p.C) : std::vector<float>(p.C);
}

// Calls row(n, factors of the row or null) for the rows of groups [begin, end).
template <class F>
void for_rows(const BiasGelu& p, int64_t begin, int64_t end, std::vector<float>& factors, F&& row) {
  const int64_t width = round_up(p.C, LANES);
  const bool drops = p.dropping.threshold > 0;
  factors.resize(drops ? DROPOUT_ROWS * width : 0);
  for (int64_t group = begin; group < end; ++group) {
    if (drops) fill_factors(p.dropping, group, width, factors.data());
    const int64_t first = group * DROPOUT_ROWS, last = std::min(first + DROPOUT_ROWS, p.N);
    for (int64_t n = first; n < last; ++n) row(n, drops ? &factors[(n - first) * width] : nullptr);
  }
}

template <Activation ACTIVATION>
using Kind = std::integral_constant<Activation, ACTIVATION>;

// Calls f(element, kind of activation).
template <class F>
void with_kind(const BiasGelu& p, F&& f) {
  with_element(p.dtype, [&](auto element) {
    if (p.activation == Activation::relu) return f(element, Kind<Activation::relu>{});
    if (p.activation == Activation::tanh) return f(element, Kind<Activation::tanh>{});
    return f(element, Kind<Activation::erf>{});
  });
}

void forward(const BiasGeluForward& p, int64_t begin, int64_t end) {
  std::vector<float> scratch;
  const std::vector<float> biases = bias_of(p);
  with_kind(p, [&](auto element, auto kind) {
    using Element = decltype(element);
    for_rows(p, begin, end, scratch, [&, bias = biases.data()](int64_t n, const float* factors) {
      const Element* x = reinterpret_cast<const Element*>(p.x) + n * p.C;
      Element* out = reinterpret_cast<Element*>(p.out) + n * p.C;
      for_columns(p.C, [=](int64_t c, int64_t count) {
        const Floats v = load_first(x + c, count) + load_first(bias + c, count);
        const Floats y = activated<decltype(kind)::value, Element>(v).value;
        store_first(out + c, factors ? y * load(factors + c) : y, count);
      });
    });
  });
}

void backward(const BiasGeluBackward& p, int64_t begin, int64_t end) {
  std::vector<float> scratch, totals(round_up(p.C, LANES));
  const std::vector<float> biases = bias_of(p);
  const int64_t groups = (p.N + DROPOUT_ROWS - 1) / DROPOUT_ROWS;
  with_kind(p, [&](auto element, auto kind) {
    using Element = decltype(element);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      std::fill(totals.begin(), totals.end(), 0.0f);
      const int64_t first = chunk * p.groups_per_chunk, last = std::min(first + p.groups_per_chunk, groups);
      for_rows(p, first, last, scratch,
               [&, bias = biases.data(), total = totals.data()](int64_t n, const float* factors) {
                 const Element* x = reinterpret_cast<const Element*>(p.x) + n * p.C;
                 const Element* grad = reinterpret_cast<const Element*>(p.grad) + n * p.C;
                 Element* dx = reinterpret_cast<Element*>(p.dx) + n * p.C;
                 for_columns(p.C, [=](int64_t c, int64_t count) {
                   const Floats v = load_first(x + c, count) + load_first(bias + c, count);
                   Floats d = load_first(grad + c, count) * activated<decltype(kind)::value, Element>(v).slope;
                   if (factors) d *= load(factors + c);
                   store_first(dx + c, d, count);
                   store(total + c, load(total + c) + d);
                 });
               });
      std::memcpy(p.partial + chunk * p.C, totals.data(), p.C * sizeof(float));
    }
  });
}

}  // namespace

extern const BiasGeluKernels bias_gelu{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
