// Signatures of the attention kernels: raw pointers and strides, no torch.
//
// Shapes: B batch, H query heads, G = H / (key heads) query heads per key head, L query length, S key length,
// D query and key head size, E value head size.
#pragma once

#include <cstdint>

namespace nlpfast {

// A [B, heads, rows, columns] tensor read in place; strides in elements, 0 and negative included.
struct Strided {
  const float* data;
  int64_t batch, head, row, column;
};

struct AttentionProblem {
  int64_t B, H, G, L, S, D, E;
  Strided q, k, v;             // [B, H, L, D], [B, H / G, S, D], [B, H / G, S, E]
  const int64_t* key_lengths;  // [B], or null: keys at and beyond it are invisible
  bool causal;
  int64_t diagonal;  // causal: query i sees the keys j <= i + diagonal
  float scale;
  // A probability survives when its 16 random bits are >= drop_threshold, and is multiplied by keep_scale.
  int32_t drop_threshold;
  float keep_scale;
  uint64_t seed;
  uint32_t offset;
};

struct AttentionForward : AttentionProblem {
  int64_t strips;  // a unit of work is one of `strips` ranges of queries of one head: B * H * strips units
  float* out;      // [B, H, L, E] contiguous
  float* lse;      // [B, H, L] contiguous
  float* lse_low;  // [B, H, L] contiguous: what rounding to float32 took from lse
};

// What a unit of backward work computes.
enum class Gradients {
  all,        // dq, dk, dv of the heads that share a key head: B * H / G units
  key_value,  // dk, dv of one block of keys: B * H / G * ceil(S / KEY_BLOCK) units
  query,      // dq of one range of queries of one head: B * H * strips units
};

struct AttentionBackward : AttentionProblem {
  int64_t strips;
  Strided grad_out, out;       // [B, H, L, E]
  const float *lse, *lse_low;  // [B, H, L] contiguous
  const float* grad_lse;       // [B, H, L] contiguous, or null
  float *dq, *dk, *dv;         // contiguous, every element is written
};

// Tiles of the score matrix: QUERY_BLOCK x KEY_BLOCK. QUERY_BLOCK is a multiple of the eight rows of a Philox call.
constexpr int64_t QUERY_BLOCK = 64;
constexpr int64_t KEY_BLOCK = 128;

struct AttentionKernels {
  void (*forward)(const AttentionForward&, int64_t begin, int64_t end);
  void (*backward)(const AttentionBackward&, Gradients, int64_t begin, int64_t end);
};

// The kernels of the instruction set in use (see cpu_capability.h).
const AttentionKernels& attention_kernels();

}  // namespace nlpfast
