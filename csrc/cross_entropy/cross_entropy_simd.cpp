// Label-smoothed cross entropy, a row of logits at a time: read once, and written once as its own gradient.
//
//   others = sum over v != target of exp(x_v - max)    total = others + exp(x_target - max)
//   loss = on_target (lse - x_target) + on_other sum over v != target, pad of (lse - x_v)
//   gradient = scale (exp(x_v - max) / total - q_v);   at the target scale (1 - q - others / total)
//
// One pass over the logits takes a row in blocks: exp(x - shift) of every element goes to a scratch row that stays in
// the L2 cache, and sums and the maximum are taken on the way. The shift is the maximum of the first block; a block
// that exceeds it by so much that sums could overflow is done again with its own. The second pass, over the scratch
// row, multiplies by 1 / total. A gradient too large for the caches is written past them, which spares reading what it
// overwrites.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../float16.h"
#include "../simd.h"
#include "cross_entropy.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

// Elements that share a shift: 4 KB of floats, which stay in the L1 cache should they be done again.
constexpr int64_t BLOCK = 1024;
// By how much logits may exceed the shift: e^60 times the classes that there can be is far from the largest float.
constexpr float HEADROOM = 60.0f;
constexpr int64_t UNROLL = 4;
constexpr uintptr_t CACHE_LINE = 64;

// What one thread keeps: the exponentials of a row, and the shift of each block.
struct Scratch {
  std::vector<float> exponentials, shifts;
  explicit Scratch(int64_t V) : exponentials(V + BLOCK), shifts(V / BLOCK + 2) {}
};

// Calls f(number, begin, end) for each block of a row.
template <class F>
inline void for_each_block(int64_t V, F&& f) {
  for (int64_t begin = 0, number = 0; begin < V; begin += BLOCK, ++number) f(number, begin, std::min(begin + BLOCK, V));
}

// The elements of a block that need care, by their number in the row: classes that a sum leaves out, and the end.
struct Exceptions {
  int64_t target, pad;
  int64_t within(int64_t begin, int64_t end) const {
    const auto inside = [=](int64_t v) { return v >= begin && v < end; };
    return inside(target) + (pad != target && inside(pad));
  }
};

// LANES elements from v on, -inf past the end of the row.
template <class Element>
inline Floats load_until(const Element* x, int64_t v, int64_t end) {
  if (v + LANES <= end) return load(x + v);
  float lanes[LANES];
  for (int64_t lane = 0; lane < LANES; ++lane) lanes[lane] = v + lane < end ? to_float(x[v + lane]) : -INF;
  return load(lanes);
}

template <class Element>
inline float block_maximum(const Element* x, int64_t begin, int64_t end) {
  Floats top[UNROLL];
  for (Floats& t : top) t = broadcast(-INF);
  int64_t v = begin;
  for (; v + UNROLL * LANES <= end; v += UNROLL * LANES)
#pragma GCC unroll 4
    for (int64_t u = 0; u < UNROLL; ++u) top[u] = maximum(load(x + v + u * LANES), top[u]);
  for (; v < end; v += LANES) top[0] = maximum(load_until(x, v, end), top[0]);
  return max_lanes(maximum(maximum(top[0], top[1]), maximum(top[2], top[3])));
}

// Of a block, or of a row so far: the maximum; the sum of exponentials without the target's, which is relative to
// `shift`; the sum of x - shift without target and padding class, of a row x - origin.
struct Sums {
  float top = -INF, shift = -INF, origin = 0;
  double others = 0, distance = 0;
};

// Writes the exponentials of a block and returns its sums. SPREAD: some of q lies on other classes. WHOLE: nothing in
// the block needs care.
template <bool SPREAD, bool WHOLE, class Element>
Sums sum_block(const Element* x, int64_t begin, int64_t end, const Exceptions& except, float shift,
               float* exponentials) {
  Floats others[UNROLL], distance[UNROLL], top[UNROLL];
  for (int64_t u = 0; u < UNROLL; ++u) others[u] = distance[u] = Floats{}, top[u] = broadcast(-INF);
  const auto step = [&](int64_t v, int64_t u) {
    const Floats value = WHOLE ? load(x + v) : load_until(x, v, end);
    Floats d = value - shift, e = exp_of_difference(d);
    // a block is a page of memory or half of one: the next one's place is looked up meanwhile
    if constexpr (WHOLE) __builtin_prefetch(x + v + BLOCK);
    store(exponentials + v, e);
    top[u] = maximum(value, top[u]);
    if constexpr (!WHOLE) {
      const Ints lane = lane_numbers();
      const auto at = [&](int64_t number) { return lane == (int32_t)std::clamp<int64_t>(number - v, -1, LANES); };
      const Ints target = at(except.target), past = lane >= (int32_t)std::min<int64_t>(end - v, LANES);
      e = target ? Floats{} : e;
      d = (target | at(except.pad) | past) ? Floats{} : d;
    }
    others[u] += e;
    if constexpr (SPREAD) distance[u] += d;
  };
  if constexpr (WHOLE) {
    for (int64_t v = begin; v < end; v += UNROLL * LANES)
#pragma GCC unroll 4
      for (int64_t u = 0; u < UNROLL; ++u) step(v + u * LANES, u);
  } else {
    for (int64_t v = begin, u = 0; v < end; v += LANES, u = (u + 1) % UNROLL) step(v, u);
  }
  Sums sums{max_lanes(maximum(maximum(top[0], top[1]), maximum(top[2], top[3]))), shift};
  sums.others = sum_lanes((others[0] + others[1]) + (others[2] + others[3]));
  if constexpr (SPREAD) sums.distance = sum_lanes((distance[0] + distance[1]) + (distance[2] + distance[3]));
  return sums;
}

// The first pass over a row.
template <bool SPREAD, class Element>
Sums read_row(const CrossEntropy& p, const Element* x, int64_t target, Scratch& scratch) {
  Sums sums;
  const Exceptions except{target, p.pad_index};
  for_each_block(p.V, [&](int64_t number, int64_t begin, int64_t end) {
    const int64_t excepted = except.within(begin, end);
    const bool whole = excepted == 0 && end == begin + BLOCK;
    const auto sum = [&](float shift) {
      float* e = scratch.exponentials.data();
      scratch.shifts[number] = shift;
      return whole ? sum_block<SPREAD, true>(x, begin, end, except, shift, e)
                   : sum_block<SPREAD, false>(x, begin, end, except, shift, e);
    };
    // no shift is known yet: 0 for a block of -inf alone, whose exponentials then are 0 as they should be
    float shift = sums.shift;
    if (shift == -INF) shift = block_maximum(x, begin, end);
    Sums block = sum(shift == -INF ? 0.0f : shift);
    if (shift != -INF && block.top > shift + HEADROOM) block = sum(shift = block.top);
    if (sums.shift == -INF && std::isfinite(shift)) sums.origin = shift;
    if (shift > sums.shift) {
      if (sums.shift != -INF) sums.others *= std::exp((double)sums.shift - shift);
      sums.shift = shift;
    }
    sums.top = std::max(sums.top, block.top);
    sums.others += block.others;
    const int64_t counted = end - begin - excepted;
    sums.distance += block.distance + (counted ? counted * ((double)block.shift - sums.origin) : 0.0);
  });
  // relative to the maximum
  if (sums.top != sums.shift) sums.others *= std::exp((double)sums.shift - sums.top);
  return sums;
}

// Stores past the caches where the address allows it.
inline void stream(float* p, Floats v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps(p, (__m256)v);
#elif defined(__x86_64__)
  _mm_stream_ps(p, (__m128)v);
#else
  store(p, v);
#endif
}

template <class Half>
inline void stream(Half* p, Floats v) {
#if defined(__AVX512F__)
  Half lanes[LANES];
  store(lanes, v);
  __m256i bits;
  std::memcpy(&bits, lanes, sizeof bits);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits);
#elif defined(__AVX2__)
  Half lanes[LANES];
  store(lanes, v);
  __m128i bits;
  std::memcpy(&bits, lanes, sizeof bits);
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
#else
  store(p, v);
#endif
}

template <class Element>
inline void store_until(Element* g, int64_t v, int64_t end, Floats value) {
  if (v + LANES <= end) return store(g + v, value);
  for (int64_t lane = 0; v + lane < end; ++lane) g[v + lane] = from_float<Element>(value[lane]);
}

// Writes LANES elements from v on for v in [v, end) as far as they are whole registers, and returns where it stopped.
template <class Element, class Value>
inline int64_t write(Element* g, int64_t v, int64_t end, bool past_caches, Value&& value) {
  if (past_caches)
    for (; v + LANES <= end; v += LANES) stream(g + v, value(v));
  for (; v + LANES <= end; v += LANES) store(g + v, value(v));
  return v;
}

// Elements of a row before its first cache line, or 0 where the gradient stays in the caches.
template <class Element>
inline int64_t before_line(const Element* g, int64_t V, bool past_caches) {
  const uintptr_t over = reinterpret_cast<uintptr_t>(g) % CACHE_LINE;
  return past_caches && over ? std::min<int64_t>(V, (CACHE_LINE - over) / sizeof(Element)) : 0;
}

// Writes the gradient: e(v) * factor(block of v) - off.
template <class Element, class Factor>
void write_row(Element* g, int64_t V, bool past_caches, const float* e, float off, Factor&& factor) {
  int64_t v = before_line(g, V, past_caches);
  float here = factor(0);
  for (int64_t head = 0; head < v; head += LANES) store_until(g, head, v, load(e + head) * here - off);
  for_each_block(V, [&](int64_t block, int64_t, int64_t end) {
    const float next = end < V ? factor(block + 1) : here;
    v = write(g, v, end, past_caches, [&](int64_t i) { return load(e + i) * here - off; });
    if (v < end) {
      // a register across two blocks
      const Floats mixed = lane_numbers() < (int32_t)(end - v) ? broadcast(here) : broadcast(next);
      const Floats last = load(e + v) * mixed - off;
      past_caches&& v + LANES <= V ? stream(g + v, last) : store_until(g, v, V, last);
      v += LANES;
    }
    here = next;
  });
}

// The gradient at the target and at the padding class, which the passes over whole rows got wrong.
template <class Element>
void mend(const CrossEntropy& p, Element* g, int64_t target, float scale, float others, float total, float at_pad) {
  if (p.pad_index >= 0 && p.pad_index != target) g[p.pad_index] = from_float<Element>(scale * (at_pad / total));
  g[target] = from_float<Element>(scale * ((1.0f - p.on_target) - others / total));
}

template <class Element>
Element* row_of(const Rows& rows, int64_t T, int64_t number) {
  return reinterpret_cast<Element*>(rows.data) + number / T * rows.batch + number % T * rows.row;
}

template <class Element>
void clear_row(const CrossEntropy& p, Element* g) {
  std::fill_n(g, p.V, from_float<Element>(0.0f));
}

// Whether no class before the target has its logit, which is the maximum.
template <class Element>
bool is_first(const Element* x, int64_t target, float top) {
  for (int64_t v = 0; v < target; ++v)
    if (to_float(x[v]) == top) return false;
  return true;
}

template <class Element>
void forward_row(const CrossEntropyForward& p, int64_t number, Scratch& scratch) {
  const Element* x = row_of<const Element>(p.input, p.T, number);
  Element* g = p.gradient.data ? row_of<Element>(p.gradient, p.T, number) : nullptr;
  const int64_t target = p.target[number];
  float* statistics = p.statistics + 2 * number;
  if (target == p.ignore_index) {
    p.loss[number] = p.nll[number] = statistics[0] = statistics[1] = 0.0f;
    p.correct[number] = false;
    if (g) clear_row(p, g);
    return;
  }
  const float at_target = to_float(x[target]);
  const bool spread = p.on_other != 0.0f;
  const Sums sums = spread ? read_row<true>(p, x, target, scratch) : read_row<false>(p, x, target, scratch);
  const float top = sums.top;
  // top - top is 0, but NaN for an infinite maximum, with which there are no probabilities
  const double others_sum = sums.others + (double)(top - top), below = (double)top - at_target;
  const double total = others_sum + std::exp(-below), log_total = std::log(total);
  const double nll = at_target == top ? std::log1p(others_sum) : log_total + below;
  const int64_t classes = p.V - 1 - (p.pad_index >= 0 && p.pad_index != target);
  double loss = p.on_target * nll;
  if (spread) loss += p.on_other * (classes * (top + log_total - sums.origin) - sums.distance);
  p.loss[number] = (float)loss, p.nll[number] = (float)nll;
  p.correct[number] = at_target == top && is_first(x, target, top);
  const float others = (float)others_sum;
  statistics[0] = top, statistics[1] = others;
  if (!g) return;
  const float scale = p.grad_scale;
  const float* e = scratch.exponentials.data();
  const auto lift = [&](int64_t block) {
    const float shift = scratch.shifts[block];
    return shift == top ? 1.0 : std::exp((double)shift - top);
  };
  const float at_pad = p.pad_index >= 0 ? (float)(e[p.pad_index] * lift(p.pad_index / BLOCK)) : 0.0f;
  write_row(g, p.V, p.stream, e, scale * p.on_other,
            [&](int64_t block) { return (float)(scale * lift(block) / total); });
  mend(p, g, target, scale, others, (float)total, at_pad);
}

template <class Element>
void backward_row(const CrossEntropyBackward& p, int64_t number) {
  const Element* x = row_of<const Element>(p.input, p.T, number);
  Element* g = row_of<Element>(p.gradient, p.T, number);
  const int64_t target = p.target[number];
  if (target == p.ignore_index) return clear_row(p, g);
  const float top = p.statistics[2 * number], others = p.statistics[2 * number + 1], scale = p.grad_loss[number];
  const float total = others + (float)std::exp((double)to_float(x[target]) - top);
  const float factor = scale / total, off = scale * p.on_other;
  const float at_pad = p.pad_index >= 0 ? (float)std::exp((double)to_float(x[p.pad_index]) - top) : 0.0f;
  const auto slope = [&](int64_t v) { return exp_of_difference(load_until(x, v, p.V) - top) * factor - off; };
  int64_t v = before_line(g, p.V, p.stream);
  for (int64_t head = 0; head < v; head += LANES) store_until(g, head, v, slope(head));
  v = write(g, v, p.V, p.stream, [&](int64_t i) { return exp_of_difference(load(x + i) - top) * factor - off; });
  if (v < p.V) store_until(g, v, p.V, slope(v));
  mend(p, g, target, scale, others, total, at_pad);
}

// Stores past the caches are not ordered with others: nobody may read the rows before they have arrived.
void fence(bool streamed) {
#if defined(__x86_64__)
  if (streamed) _mm_sfence();
#endif
  (void)streamed;
}

void forward(const CrossEntropyForward& p, int64_t begin, int64_t end) {
  Scratch scratch(p.V);
  with_element(p.dtype, [&](auto element) {
    for (int64_t number = begin; number < end; ++number) forward_row<decltype(element)>(p, number, scratch);
  });
  fence(p.stream);
}

void backward(const CrossEntropyBackward& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) {
    for (int64_t number = begin; number < end; ++number) backward_row<decltype(element)>(p, number);
  });
  fence(p.stream);
}

}  // namespace

extern const CrossEntropyKernels cross_entropy{forward, backward};

}  // namespace nlpfast::NLPFAST_ISA
