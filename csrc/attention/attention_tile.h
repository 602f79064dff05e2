// What forward and backward of attention share: scratch memory, packing of strided rows, visibility, dropout.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <utility>

#include "../gemm.h"
#include "../philox.h"
#include "attention.h"

namespace nlpfast::NLPFAST_ISA {

constexpr int64_t NO_EDGE = int64_t{1} << 48;
// Row stride of a tile: the odd register keeps a column of the tile from falling into a single cache set.
constexpr int64_t TILE_STRIDE = KEY_BLOCK + LANES;
constexpr int64_t TILE = QUERY_BLOCK * TILE_STRIDE;

// Per-thread memory that grows to the largest call and is reused by the next.
class Scratch {
 public:
  float* reserve(int64_t floats) {
    if (floats > capacity_) {
      std::free(data_);
      capacity_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(round_up(floats, 16) * 4)));
      if (!data_) throw std::bad_alloc();
      capacity_ = floats;
    }
    return data_;
  }
  ~Scratch() { std::free(data_); }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Points each piece at so many floats of the thread's scratch memory, 64-byte aligned; what was there is lost.
inline void take_all(std::initializer_list<std::pair<float**, int64_t>> pieces) {
  static thread_local Scratch scratch;
  int64_t total = 0;
  for (const auto& [piece, size] : pieces) total += round_up(size, 16);
  float* next = scratch.reserve(total);
  for (const auto& [piece, size] : pieces) {
    *piece = next;
    next += round_up(size, 16);
  }
}

// Rows of one head: either the tensor itself or a packed copy, padded with zeros to whole registers.
struct Rows {
  const float* data;
  int64_t stride;
  const float* row(int64_t i) const { return data + i * stride; }
};

inline const float* head_of(const Strided& x, int64_t b, int64_t h) { return x.data + b * x.batch + h * x.head; }

inline void copy_row(float* to, const float* from, int64_t step, int64_t n, int64_t padded) {
  if (step == 1)
    std::memcpy(to, from, static_cast<size_t>(n) * 4);
  else
    for (int64_t c = 0; c < n; ++c) to[c] = from[c * step];
  std::fill(to + n, to + padded, 0.0f);
}

inline void write_row(float* to, const float* from, int64_t n, float factor) {
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES) store(to + c, load(from + c) * factor);
  for (; c < n; ++c) to[c] = from[c] * factor;
}

// Whether rows can be read in place as the right operand of a product: whole registers, adjacent rows.
inline bool is_packed(const Strided& x, int64_t columns) {
  return x.column == 1 && x.row == columns && columns % LANES == 0;
}

inline Rows rows_of(const Strided& x, const float* head, int64_t columns, const float* space) {
  return is_packed(x, columns) ? Rows{head, columns} : Rows{space, round_up(columns, LANES)};
}

inline Rows pack(const Strided& x, const float* head, int64_t rows, int64_t columns, float* space) {
  const int64_t padded = round_up(columns, LANES);
  if (!is_packed(x, columns))
    for (int64_t i = 0; i < rows; ++i) copy_row(space + i * padded, head + i * x.row, x.column, columns, padded);
  return rows_of(x, head, columns, space);
}

// The transpose of `rows` in panels of PANEL keys: to[panel][column][key]. Missing keys become zeros.
inline void pack_transposed(const Rows& x, int64_t rows, int64_t columns, float* to) {
  for (int64_t j = 0; j < round_up(rows, LANES); j += LANES) {
    float* panel = to + j / PANEL * PANEL * columns + j % PANEL;
    for (int64_t c = 0; c < columns; c += LANES) {
      Floats square[LANES];
      for (int r = 0; r < LANES; ++r) square[r] = j + r < rows ? load(x.row(j + r) + c) : Floats{};
      transpose(square);
      const int64_t width = std::min<int64_t>(LANES, columns - c);
      for (int r = 0; r < width; ++r) store(panel + (c + r) * PANEL, square[r]);
    }
  }
}

// Keys of batch b that any query can see.
inline int64_t visible_keys(const AttentionProblem& p, int64_t b) {
  int64_t keys = p.key_lengths ? std::clamp<int64_t>(p.key_lengths[b], 0, p.S) : p.S;
  if (p.causal) keys = std::clamp<int64_t>(p.L + p.diagonal, 0, keys);
  return keys;
}

// A tile of scores: rows i0.., columns j0.. of head bh; element (i, j) is visible iff j <= i + edge (and j < cols).
struct Tile {
  int64_t i0, j0, rows, cols, edge;
  uint32_t head;

  // Number of visible columns of row i.
  int64_t limit(int64_t i) const { return std::clamp<int64_t>(i + edge + 1, 0, cols); }
  // Columns that the products read for rows up to i: its own and those of the block of rows that it may share.
  int64_t extent(int64_t i) const { return std::min(round_up(cols, LANES), round_up(limit(i) + BLOCK_ROWS, LANES)); }
};

inline Tile make_tile(const AttentionProblem& p, int64_t head, int64_t i0, int64_t j0, int64_t keys) {
  const int64_t rows = std::min(QUERY_BLOCK, p.L - i0), cols = std::min(KEY_BLOCK, keys - j0);
  const int64_t edge = p.causal ? i0 + p.diagonal - j0 : NO_EDGE;
  return {i0, j0, rows, cols, edge, static_cast<uint32_t>(head)};
}

// Groups of eight rows share loops and keep their statistics in registers. Rows of a last group that are not there are
// computed with the others, from whatever the scratch memory holds, and not looked at.
constexpr int GROUP = 8;
static_assert(QUERY_BLOCK % GROUP == 0);

// Visible columns of the rows of a group, in increasing order.
struct Limits {
  int32_t of[GROUP];
  // Registers up to `whole` are visible to all rows, up to `partial` to some, up to `extent` they are read later.
  int32_t whole, partial, extent;
};

inline void zero_columns(float* tile, int32_t begin, int32_t end) {
  for (int32_t j = begin; j < end; j += LANES)
    for (int r = 0; r < GROUP; ++r) store(tile + r * TILE_STRIDE + j, Floats{});
}

inline Limits group_limits(const Tile& t, int64_t i) {
  Limits limits;
  for (int r = 0; r < GROUP; ++r) limits.of[r] = static_cast<int32_t>(t.limit(i + r));
  limits.whole = limits.of[0] / LANES * LANES;
  limits.partial = static_cast<int32_t>(round_up(limits.of[GROUP - 1], LANES));
  limits.extent = static_cast<int32_t>(t.extent(i + GROUP - 1));
  return limits;
}

// Strip s of n, first and last alternating: neighbouring units of a causal head then cost about the same in sum.
inline int64_t folded(int64_t s, int64_t n) { return s % 2 ? n - 1 - s / 2 : s / 2; }

// First row at or after `first` of the block grid whose queries can see key j0.
inline int64_t first_row(const AttentionProblem& p, int64_t first, int64_t j0) {
  const int64_t visible = p.causal ? std::max<int64_t>(0, j0 - p.diagonal) : 0;
  return std::max(first, visible / QUERY_BLOCK * QUERY_BLOCK);
}

inline int64_t query_blocks(const AttentionProblem& p) { return (p.L + QUERY_BLOCK - 1) / QUERY_BLOCK; }

void backward(const AttentionBackward& p, Gradients wanted, int64_t begin, int64_t end);

}  // namespace nlpfast::NLPFAST_ISA
