// Signatures of the attention kernels: raw pointers and strides, no torch.
//
// Shapes: B batch, H query heads, G = H / (key heads) query heads per key head, L query length, S key length,
// D query and key head size, E value head size. Packed sequences have no padding: batch entry b has the rows
// [cu_q[b], cu_q[b + 1]) of [total, H, D] queries and [cu_k[b], cu_k[b + 1]) of the keys; L and S are then upper
// bounds.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace nlpfast {

// A [B, heads, rows, columns] tensor read in place; strides in elements, 0 and negative included.
struct Strided {
  const char* data;
  int64_t batch, head, row, column;
};

// The same for a result, whose columns are adjacent.
struct Result {
  char* data;
  int64_t batch, head, row;
};

enum class Causal { none, top_left, bottom_right };

struct AttentionProblem {
  Dtype dtype;  // of q, k, v, out and their gradients
  int64_t B, H, G, L, S, D, E;
  Strided q, k, v;                // [B, H, L, D], [B, H / G, S, D], [B, H / G, S, E]
  Strided mask;                   // [B, H, L, S], strides 0 where it broadcasts, or null: added to the scores, or
  Dtype mask_dtype;               // boolean: true = visible
  const int64_t* key_lengths;     // [B], or null: keys at and beyond it are invisible
  const int64_t* prefix_lengths;  // [B], or null: keys before it are visible in spite of `causal`
  const int64_t *cu_q, *cu_k;     // [B + 1], or null: packed sequences
  Causal causal;
  float scale;
  // A probability survives when its 16 random bits are >= drop_threshold, and is multiplied by keep_scale.
  int32_t drop_threshold;
  float keep_scale;
  uint64_t seed;
  uint32_t offset;
  int64_t lse_batch, lse_head;  // strides of what has one float a query: lse, lse_low, grad_lse
};

struct AttentionForward : AttentionProblem {
  int64_t strips;  // a unit of work is one of `strips` ranges of queries of one head: B * H * strips units
  Result out;      // [B, H, L, E]
  float* lse;      // [B, H, L]
  float* lse_low;  // [B, H, L]: what rounding to float32 took from lse
};

// What a unit of backward work computes.
enum class Gradients {
  all,        // dq, dk, dv of the heads that share a key head: B * H / G units
  key_value,  // dk, dv of one block of keys: B * H / G * ceil(S / KEY_BLOCK) units
  query,      // dq of one range of queries of one head: B * H * strips units
  mask,       // a tile of dmask, see MaskGradient
};

// The gradient of the mask: contiguous floats [B or 1, H or 1, L or 1, S or 1], as the mask broadcasts. A unit is the
// part of it that one tile of scores reaches: batch * head * ceil(rows / QUERY_BLOCK) * ceil(columns / KEY_BLOCK).
struct MaskGradient {
  float* data;
  int64_t batch, head, rows, columns;
};

// What is added to the gradient of query . key at single pairs of a query and a key that it sees.
struct PairGradients {
  const int64_t* pairs;  // [P, 3]: batch entry, query, key
  const float* values;   // [P, H], or null
  const int64_t* order;  // numbers of pairs: those of query i of batch entry b from begin[b * L + i] up to the next
  const int64_t* begin;  // [B * L + 1]
};

struct AttentionBackward : AttentionProblem {
  int64_t strips;
  Strided grad_out, out;       // [B, H, L, E]
  const float *lse, *lse_low;  // [B, H, L]
  const float* grad_lse;       // [B, H, L], or null
  Result dq, dk, dv;           // every element is written
  MaskGradient dmask;
  PairGradients extra;
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
