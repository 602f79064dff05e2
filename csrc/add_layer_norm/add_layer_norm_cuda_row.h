// The CUDA kernels of residual sum, dropout and layer norm (see add_layer_norm_cuda.cu).
#pragma once

#include "../cuda_philox.h"

namespace nlpfast::cuda {
namespace {

constexpr int COLUMNS = 8, GROUP = 8, MAX_CHANNELS = 2048;
// Rows that go through the registers together, forward and backward.
constexpr int FORWARD_ROWS = 4, BACKWARD_ROWS = 2;

struct Problem {
  const void *part, *residual, *grad_out, *grad_sum;  // grad_sum may be null
  void *sum, *out, *d_part, *d_residual;              // d_part may be null; sum is only read in backward
  const float *weight, *bias;                         // bias may be null
  float *statistics, *sums;                           // [N, 2], [blocks, 2, C]
  Dropping dropping;
  int64_t N;
  int C;
  unsigned groups;
  float eps;
};

// Eight channels of a row, as they lie in memory, or the first `count` of them; the others are 0.
template <class E, bool VECTORS>
struct Columns {
  static constexpr int PER = PER_VECTOR<E>, PIECES = COLUMNS / PER;
  Piece<E, PER> piece[PIECES] = {};

  __device__ __forceinline__ void load(const void* data, int64_t place, int count) {
    const E* from = static_cast<const E*>(data) + place;
    if constexpr (VECTORS) {
#pragma unroll
      for (int i = 0; i < PIECES; ++i) piece[i].load(from + i * PER);
    } else {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
        if (j < count) piece[j / PER].set(j % PER, to_float(from[j]));
    }
  }
  __device__ __forceinline__ void store(void* data, int64_t place, int count) const {
    E* to = static_cast<E*>(data) + place;
    if constexpr (VECTORS) {
#pragma unroll
      for (int i = 0; i < PIECES; ++i) piece[i].store(to + i * PER);
    } else {
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)
        if (j < count) to[j] = from_float<E>(get(j));
    }
  }
  __device__ __forceinline__ float get(int j) const { return piece[j / PER].get(j % PER); }
  __device__ __forceinline__ void set(const float (&x)[COLUMNS]) {
#pragma unroll
    for (int i = 0; i < PIECES; ++i)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        constexpr int PER_ONE = PER_WORD<E>;
        if constexpr (PER_ONE == 1)
          piece[i].word[w] = __float_as_uint(x[i * PER + w]);
        else
          piece[i].word[w] = pack(E{}, x[i * PER + 2 * w], x[i * PER + 2 * w + 1]);
      }
  }
};

// Which of the eight rows keep what they have in each of a thread's channels: a byte each.
struct Kept {
  uint32_t bits[COLUMNS];

  __device__ __forceinline__ Kept(const Dropping& dropping, const Seeds& seeds, int c, unsigned group) {
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j)
      bits[j] = dropping.threshold ? survivors(dropping, seeds, c + j, group, 0) : 0xffu;
  }
  __device__ __forceinline__ float factor(const Dropping& dropping, int row, int j) const {
    return bits[j] >> row & 1 ? dropping.factor : 0.0f;
  }
};

__device__ __forceinline__ void load_floats(float (&x)[COLUMNS], const float* p, int c, int count) {
#pragma unroll
  for (int j = 0; j < COLUMNS; ++j) x[j] = p && j < count ? p[c + j] : 0.0f;
}

template <class Part, class Sum, class Out, bool VECTORS>
__global__ void __launch_bounds__(MAX_CHANNELS / COLUMNS) forward(Problem p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const unsigned group = blockIdx.x * blockDim.y + threadIdx.y;
  const int c = threadIdx.x * COLUMNS;
  // channels of this thread
  const int count = p.C - c < 0 ? 0 : p.C - c < COLUMNS ? p.C - c : COLUMNS;
  const Kept kept(p.dropping, Seeds(p.dropping), c, group);
  for (int begin = 0; begin < GROUP; begin += FORWARD_ROWS) {
    const int64_t first = static_cast<int64_t>(group) * GROUP + begin;
    Columns<Part, VECTORS> part[FORWARD_ROWS];
    Columns<Sum, VECTORS> sum[FORWARD_ROWS];
#pragma unroll
    for (int i = 0; i < FORWARD_ROWS; ++i)
      if (count && first + i < p.N) {
        part[i].load(p.part, (first + i) * p.C + c, count);
        sum[i].load(p.residual, (first + i) * p.C + c, count);
      }
    float mean[FORWARD_ROWS], rstd[FORWARD_ROWS];
#pragma unroll
    for (int i = 0; i < FORWARD_ROWS; ++i) {
      float total[COLUMNS];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const float factor = kept.factor(p.dropping, begin + i, j);
        // 0 times an infinity would be NaN
        total[j] = sum[i].get(j) + (factor == 0.0f ? 0.0f : part[i].get(j) * factor);
      }
      sum[i].set(total);
      if (count && first + i < p.N) sum[i].store(p.sum, (first + i) * p.C + c, count);
      mean[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) mean[i] += sum[i].get(j);
    }
    over_block<Add>(mean, scratch);
#pragma unroll
    for (int i = 0; i < FORWARD_ROWS; ++i) {
      mean[i] /= static_cast<float>(p.C);
      rstd[i] = 0.0f;
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) {
        const float centred = sum[i].get(j) - mean[i];
        rstd[i] += j < count ? centred * centred : 0.0f;
      }
    }
    over_block<Add>(rstd, scratch);
    float weight[COLUMNS], bias[COLUMNS];
    load_floats(weight, p.weight, c, count);
    load_floats(bias, p.bias, c, count);
#pragma unroll
    for (int i = 0; i < FORWARD_ROWS; ++i) {
      if (first + i >= p.N) break;
      rstd[i] = 1.0f / sqrtf(rstd[i] / static_cast<float>(p.C) + p.eps);
      if (threadIdx.x == 0) p.statistics[2 * (first + i)] = mean[i], p.statistics[2 * (first + i) + 1] = rstd[i];
      if (!count) continue;
      float out[COLUMNS];
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j) out[j] = (sum[i].get(j) - mean[i]) * rstd[i] * weight[j] + bias[j];
      Columns<Out, VECTORS> rounded;
      rounded.set(out);
      rounded.store(p.out, (first + i) * p.C + c, count);
    }
  }
}

template <class Part, class Sum, class Out, bool VECTORS>
__global__ void __launch_bounds__(MAX_CHANNELS / COLUMNS) backward(Problem p) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  const int c = threadIdx.x * COLUMNS;
  // channels of this thread
  const int count = p.C - c < 0 ? 0 : p.C - c < COLUMNS ? p.C - c : COLUMNS;
  float weight[COLUMNS], d_weight[COLUMNS] = {}, d_bias[COLUMNS] = {};
  load_floats(weight, p.weight, c, count);
  // all threads of a block go round as often
  for (unsigned base = blockIdx.x * blockDim.y; base < p.groups; base += gridDim.x * blockDim.y) {
    const unsigned group = base + threadIdx.y;
    // the seeds once a group: in registers meanwhile they would cost a block
    const Kept kept(p.dropping, Seeds(p.dropping), c, group);
    for (int begin = 0; begin < GROUP; begin += BACKWARD_ROWS) {
      const int64_t first = static_cast<int64_t>(group) * GROUP + begin;
      Columns<Out, VECTORS> slope[BACKWARD_ROWS];
      Columns<Sum, VECTORS> sum[BACKWARD_ROWS], more[BACKWARD_ROWS];
      float mean[BACKWARD_ROWS], rstd[BACKWARD_ROWS];
#pragma unroll
      for (int i = 0; i < BACKWARD_ROWS; ++i) {
        mean[i] = rstd[i] = 0.0f;
        if (!count || first + i >= p.N) continue;
        slope[i].load(p.grad_out, (first + i) * p.C + c, count);
        sum[i].load(p.sum, (first + i) * p.C + c, count);
        if (p.grad_sum) more[i].load(p.grad_sum, (first + i) * p.C + c, count);
        mean[i] = p.statistics[2 * (first + i)], rstd[i] = p.statistics[2 * (first + i) + 1];
      }
      float means[2 * BACKWARD_ROWS];
#pragma unroll
      for (int i = 0; i < BACKWARD_ROWS; ++i) {
        means[2 * i] = means[2 * i + 1] = 0.0f;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          const float x = (sum[i].get(j) - mean[i]) * rstd[i], g = slope[i].get(j) * weight[j];
          d_weight[j] += slope[i].get(j) * x;
          d_bias[j] += slope[i].get(j);
          means[2 * i] += g;
          means[2 * i + 1] += g * x;
        }
      }
      over_block<Add>(means, scratch);
#pragma unroll
      for (int i = 0; i < BACKWARD_ROWS; ++i) {
        if (!count || first + i >= p.N) continue;
        const float mean_g = means[2 * i] / static_cast<float>(p.C);
        const float mean_gx = means[2 * i + 1] / static_cast<float>(p.C);
        float d[COLUMNS];
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          const float x = (sum[i].get(j) - mean[i]) * rstd[i], g = slope[i].get(j) * weight[j];
          d[j] = rstd[i] * (g - mean_g - x * mean_gx) + more[i].get(j);
        }
        Columns<Sum, VECTORS> rounded;
        rounded.set(d);
        rounded.store(p.d_residual, (first + i) * p.C + c, count);
        if (!p.d_part) continue;
#pragma unroll
        for (int j = 0; j < COLUMNS; ++j) {
          const float factor = kept.factor(p.dropping, begin + i, j);
          d[j] = factor == 0.0f ? 0.0f : d[j] * factor;
        }
        Columns<Part, VECTORS> dropped;
        dropped.set(d);
        dropped.store(p.d_part, (first + i) * p.C + c, count);
      }
    }
  }
  // the groups of the block, one after the other
  float* totals = scratch;
  for (unsigned y = 0; y < blockDim.y; ++y) {
    __syncthreads();
    if (threadIdx.y != y) continue;
#pragma unroll
    for (int j = 0; j < COLUMNS; ++j) {
      if (j >= count) continue;
      totals[c + j] = y ? totals[c + j] + d_weight[j] : d_weight[j];
      totals[p.C + c + j] = y ? totals[p.C + c + j] + d_bias[j] : d_bias[j];
    }
  }
  __syncthreads();
  float* sums = p.sums + static_cast<int64_t>(blockIdx.x) * 2 * p.C;
  const int threads = blockDim.x * blockDim.y;
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < 2 * p.C; i += threads) sums[i] = totals[i];
}

}  // namespace
}  // namespace nlpfast::cuda
