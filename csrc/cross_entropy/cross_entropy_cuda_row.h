// The CUDA kernels of cross entropy (see cross_entropy_cuda.cu).
#pragma once

#include "cross_entropy_cuda_pieces.h"

namespace nlpfast::cuda {
namespace {

// Pieces of a long row that are under way together.
constexpr int AHEAD = 4;

struct Rows {
  char* data;
  int64_t batch, row;  // strides in elements
};

struct Problem {
  Rows x, gradient;  // gradient: may be null in forward, may be x
  const int64_t* target;
  const float* scale;  // the upstream gradient that `gradient` is for; null in backward: it is not written yet
  float *loss, *nll, *statistics;
  bool* correct;
  const float* upstream;
  int64_t upstream_batch, upstream_row;
  int64_t ignore_index;
  unsigned T;
  int V, pad_index;
  float on_target, off_target, on_other;
  bool rescale;
};

template <class E>
__device__ __forceinline__ E* row_of(const Rows& rows, unsigned b, unsigned t) {
  return reinterpret_cast<E*>(rows.data) + b * rows.batch + t * rows.row;
}

// exp(d) of a number that is not positive, to the last digit: exp2_of(d log2 e) leaves five digits at d = -100, which
// do for a term of a sum, but not for a factor of all of it.
__device__ __forceinline__ float exact_exp(float d) {
  // below -200 it is 0; not by fmaxf, which drops NaN
  d = d < -200.0f ? -200.0f : d;
  const float n = floorf(d * LOG2_E + 0.5f);
  // multiples of the first by numbers up to 2^9 are exact; the sum of both is log 2
  const float rest = d - n * 0.693359375f - n * -2.12194440054690582e-4f;
  return exp2_of(n) * exp2_of(rest * LOG2_E);
}

// -inf - -inf would be NaN, and -inf - 0 gives 0.
__device__ __forceinline__ float finite(float maximum) { return maximum == -INFINITY ? 0.0f : maximum; }

__device__ __forceinline__ float exp_from(float x, float base) { return exp2_of((x - base) * LOG2_E); }

// exp(x - base) in one multiplication less: exp2(x scale - origin) times a factor that is the same for all x. It makes
// up for the rounding of base log2 e. Where floats are 64 apart, and all that is less than base is nothing beside it,
// powers of 2 do as well, and base has no rounding.
struct Exponential {
  float scale, origin, factor;

  __device__ __forceinline__ explicit Exponential(float base)
      : scale(fabsf(base) < 1073741824.0f ? LOG2_E : 1.0f),
        origin(base * scale),
        factor(exp2_of(-fmaf(base, scale, -origin))) {}
  __device__ __forceinline__ float operator()(float x) const { return exp2_of(fmaf(x, scale, -origin)); }
};

// others + exp(x_target - top), without inf - inf, which others has seen.
__device__ __forceinline__ float normalizer(float at_target, float top, float others) {
  return others + exact_exp(at_target == top ? 0.0f : at_target - top);
}

// What a thread knows of the logits that it has read.
struct Seen {
  float largest = -INFINITY;  // of those that are not the target's
  float below = 0.0f;         // the sum of origin - x over the classes that are given on_other
};

struct Row {
  int at;  // the target, -1 if it is no class
  float at_target, origin;

  template <class E>
  __device__ __forceinline__ Row(const Problem& p, const E* x, int64_t target)
      : at(target >= 0 && target < p.V ? static_cast<int>(target) : -1),
        at_target(at < 0 ? NAN : to_float(x[at])),
        origin(fabsf(at_target) < INFINITY ? at_target : 0.0f) {}

  // Takes a piece of the classes from `first` on into account, and leaves -inf at the target's place. The piece may go
  // on behind the row's `end`, where it gets -inf too.
  template <class E, int PER>
  __device__ __forceinline__ void see(Piece<E, PER>& piece, int first, const Problem& p, Seen& seen) const {
    const int end = p.V, pad_index = p.pad_index;
    const bool special = static_cast<unsigned>(at - first) < PER || static_cast<unsigned>(pad_index - first) < PER;
    if (special || first + PER > end) {
#pragma unroll
      for (int j = 0; j < PER; ++j) {
        const float value = piece.get(j);
        if (first + j == at || first + j >= end) {
          piece.set(j, -INFINITY);
          continue;
        }
        seen.largest = fmaxf(seen.largest, value);
        if (first + j != pad_index) seen.below += origin - value;
      }
    } else {
#pragma unroll
      for (int j = 0; j < PER; ++j) seen.largest = fmaxf(seen.largest, piece.get(j));
      if (p.on_other == 0.0f) return;
#pragma unroll
      for (int j = 0; j < PER; ++j) seen.below += origin - piece.get(j);
    }
  }

  // Whether an argmax prefers this logit to the target's: larger, or as large and earlier; NaN comes first.
  __device__ __forceinline__ bool beaten_by(float value, int v) const {
    const bool larger = value > at_target || (value == at_target && v < at);
    return v != at && (larger || (value != value && (v < at || at_target == at_target)));
  }
};

// What is stored of a row, and the factor that makes probabilities of exp(x - largest).
struct Losses {
  float loss, nll, top, others, weight;

  __device__ __forceinline__ Losses(const Problem& p, const Row& row, float largest, float rest, float below) {
    // a maximum may drop NaN
    top = row.at_target == row.at_target ? fmaxf(largest, row.at_target) : row.at_target;
    const float drop = exact_exp(largest == top ? 0.0f : largest - top);
    // no sum of probabilities without a finite maximum, as in PyTorch
    others = rest * drop + (top - top);
    const float total = normalizer(row.at_target, top, others), log_total = logf(total);
    nll = row.at_target == top ? log1pf(others) : log_total + (top - row.at_target);
    const int shared = p.V - 1 - (p.pad_index >= 0 && p.pad_index != row.at);
    loss = p.on_target * nll;
    // 0 times a logit of -inf is not to be felt
    if (p.on_other != 0.0f)
      loss += p.on_other * (static_cast<float>(shared) * ((top - row.origin) + log_total) + below);
    weight = drop / total;
  }
};

__device__ __forceinline__ void store(const Problem& p, unsigned row, float loss, float nll, float top, float others) {
  if (threadIdx.x) return;
  p.loss[row] = loss, p.nll[row] = nll;
  p.statistics[2 * size_t{row}] = top, p.statistics[2 * size_t{row} + 1] = others;
}

// The gradients of the target and of the class without mass. Thread 0 alone knows them, in shared memory, as they are
// written last.
struct Special {
  float* kept;

  template <class E>
  __device__ __forceinline__ Special(const Problem& p, const E* x, float* scratch) : kept(scratch + KEPT) {
    if (threadIdx.x == 0) kept[1] = p.pad_index < 0 ? NAN : to_float(x[p.pad_index]);
  }

  // What others get is exp(x - base) times the factor, less their level.
  __device__ __forceinline__ void make(float on_target, float base, float factor) const {
    if (threadIdx.x == 0) kept[0] = on_target, kept[1] = exp_from(kept[1], base) * factor;
  }

  // When the gradients of the others are stored.
  template <class E>
  __device__ __forceinline__ void store(const Problem& p, int at, E* gradient) const {
    __syncthreads();
    if (threadIdx.x) return;
    if (at >= 0) gradient[at] = from_float<E>(kept[0]);
    if (p.pad_index >= 0 && p.pad_index != at) gradient[p.pad_index] = from_float<E>(kept[1]);
  }
};

// Stores whether the target's is the first largest logit; for ties, infinities and NaN the row is read again.
template <class E>
__device__ __forceinline__ void store_correct(const Problem& p, unsigned number, const Row& row, const E* x,
                                              float largest, const Losses& losses, float* scratch) {
  bool correct = row.at_target > largest;
  if (row.at_target == largest || losses.weight != losses.weight) {
    float beaten[1] = {0.0f};
    for (int v = threadIdx.x; v < p.V; v += blockDim.x)
      if (row.beaten_by(to_float(x[v]), v)) beaten[0] = 1.0f;
    over_block<Maximum>(beaten, scratch);
    correct = beaten[0] == 0.0f && row.at >= 0;
  }
  if (threadIdx.x == 0) p.correct[number] = correct;
}

template <class E, int PER, int THREADS, int PIECES, bool UNALIGNED>
__global__ void __launch_bounds__(THREADS, 1024 / THREADS) whole_row(Problem p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const unsigned number = blockIdx.x, b = number / p.T, t = number % p.T;
  E* x = row_of<E>(p.x, b, t);
  const int64_t target = p.target[number];
  if (target == p.ignore_index) {
    store(p, number, 0.0f, 0.0f, 0.0f, 0.0f);
    if (threadIdx.x == 0) p.correct[number] = false;
    if (p.gradient.data) store_zeros<UNALIGNED>(row_of<E>(p.gradient, b, t), p.V);
    return;
  }
  // where rows begin anywhere those after the end are exchanged too, and are something
  Piece<E, PER> piece[PIECES] = {};
  read_pieces<UNALIGNED>(piece, x, p.V, threadIdx.x * PER);
  const Row row(p, x, target);
  const Special special(p, x, scratch);
  Seen seen;
#pragma unroll
  for (int i = 0; i < PIECES; ++i) {
    const int first = (i * THREADS + threadIdx.x) * PER;
    if (first < p.V) row.see(piece[i], first, p, seen);
  }
  float largest[1] = {seen.largest};
  over_block<Maximum>(largest, scratch);
  const float base = finite(largest[0]);
  const Exponential exponential(base);
  float sums[2] = {0.0f, seen.below};
#pragma unroll
  for (int i = 0; i < PIECES; ++i)
    if ((i * THREADS + threadIdx.x) * PER < static_cast<unsigned>(p.V)) {
#pragma unroll
      for (int j = 0; j < PER; ++j) sums[0] += exponential(piece[i].get(j));
    }
  over_block<Add>(sums, scratch);
  sums[0] *= exponential.factor;
  const Losses losses(p, row, largest[0], sums[0], sums[1]);
  store(p, number, losses.loss, losses.nll, losses.top, losses.others);
  store_correct(p, number, row, x, largest[0], losses, scratch);
  if (!p.gradient.data) return;
  E* gradient = row_of<E>(p.gradient, b, t);
  // all have read the row where it is read again, before one of them writes over it: over_block has waited
  const float scale = *p.scale, factor = scale * losses.weight, level = scale * p.on_other;
  special.make(scale * (p.off_target - sums[0] * losses.weight), base, factor);
  write_pieces<UNALIGNED>(
      piece, gradient, p.V, threadIdx.x * PER, 0, true,
      [=, times = factor * exponential.factor](float value) { return exponential(value) * times - level; });
  // others / total, with the digits that softmax - 1 would lose
  special.store(p, row.at, gradient);
}

template <class E, int PER, int THREADS, bool UNALIGNED>
__global__ void __launch_bounds__(THREADS) long_row(Problem p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const unsigned number = blockIdx.x, b = number / p.T, t = number % p.T;
  E* x = row_of<E>(p.x, b, t);
  E* gradient = p.gradient.data ? row_of<E>(p.gradient, b, t) : nullptr;
  const int64_t target = p.target[number];
  if (target == p.ignore_index) {
    store(p, number, 0.0f, 0.0f, 0.0f, 0.0f);
    if (threadIdx.x == 0) p.correct[number] = false;
    if (gradient) store_zeros<UNALIGNED>(gradient, p.V);
    return;
  }
  const Row row(p, x, target);
  const Special special(p, x, scratch);
  Seen seen;
  float sum = 0.0f;
  for (int begin = threadIdx.x * PER; begin < p.V; begin += AHEAD * THREADS * PER) {
    Piece<E, PER> piece[AHEAD];
    read_pieces<UNALIGNED>(piece, x, p.V, begin);
    const float before = seen.largest;
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (begin + i * THREADS * PER < p.V) row.see(piece[i], begin + i * THREADS * PER, p, seen);
    const float base = finite(seen.largest);
    sum *= exp_from(before, base);
#pragma unroll
    for (int i = 0; i < AHEAD; ++i)
      if (begin + i * THREADS * PER < p.V) {
#pragma unroll
        for (int j = 0; j < PER; ++j) sum += exp_from(piece[i].get(j), base);
      }
  }
  float largest[1] = {seen.largest};
  over_block<Maximum>(largest, scratch);
  const float base = finite(largest[0]);
  float sums[2] = {sum * exp_from(seen.largest, base), seen.below};
  over_block<Add>(sums, scratch);
  const Losses losses(p, row, largest[0], sums[0], sums[1]);
  store(p, number, losses.loss, losses.nll, losses.top, losses.others);
  store_correct(p, number, row, x, largest[0], losses, scratch);
  if (!gradient) return;
  const float scale = *p.scale, factor = scale * losses.weight, level = scale * p.on_other;
  special.make(scale * (p.off_target - sums[0] * losses.weight), base, factor);
  // no thread takes what another writes: both have the same classes
  const Exponential exponential(base);
  rewrite<UNALIGNED, AHEAD>(x, gradient, p.V, [=, times = factor * exponential.factor](float value) {
    return exponential(value) * times - level;
  });
  special.store(p, row.at, gradient);
}

// The gradient for the upstream gradient that came. Where forward has written it, for `scale`, and the row's upstream
// gradient is that very number, the block returns at once: nobody on the CPU has to know.
template <class E, int PER, int THREADS, bool UNALIGNED>
__global__ void __launch_bounds__(THREADS) gradient_row(Problem p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const unsigned number = blockIdx.x, b = number / p.T, t = number % p.T;
  const float upstream = p.upstream[b * p.upstream_batch + t * p.upstream_row];
  // the bits: a NaN is itself, and 0 is not -0
  if (p.scale && __float_as_uint(upstream) == __float_as_uint(*p.scale)) return;
  E* gradient = row_of<E>(p.gradient, b, t);
  const int64_t target = p.target[number];
  if (target == p.ignore_index) return store_zeros<UNALIGNED>(gradient, p.V);
  if (p.rescale) {
    const float factor = upstream / *p.scale;
    return rewrite<UNALIGNED, 1>(gradient, gradient, p.V, [=](float value) { return value * factor; });
  }
  E* x = row_of<E>(p.x, b, t);
  const Row row(p, x, target);
  const Special special(p, x, scratch);
  const float top = p.statistics[2 * size_t{number}], others = p.statistics[2 * size_t{number} + 1];
  const float total = normalizer(row.at_target, top, others);
  const float factor = upstream / total, level = upstream * p.on_other;
  special.make(upstream * (p.off_target - others / total), top, factor);
  // all have read the target's logit before one of them writes over it
  __syncthreads();
  const Exponential exponential(top);
  rewrite<UNALIGNED, 1>(x, gradient, p.V, [=, times = factor * exponential.factor](float value) {
    return exponential(value) * times - level;
  });
  special.store(p, row.at, gradient);
}

}  // namespace
}  // namespace nlpfast::cuda
