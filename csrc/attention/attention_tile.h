// Which tiles of the score matrix there are, and which of their elements are visible.
#pragma once

#include "../philox.h"
#include "attention_rows.h"

namespace nlpfast::NLPFAST_ISA {

constexpr int64_t NO_EDGE = int64_t{1} << 48;
// Row stride of a tile: the odd register keeps a column of the tile from falling into a single cache set.
constexpr int64_t TILE_STRIDE = KEY_BLOCK + LANES;
constexpr int64_t TILE = QUERY_BLOCK * TILE_STRIDE;
static_assert(!TILES || QUERY_BLOCK / 2 <= STRIP_DEPTH, "the backward multiplies by transposed tiles of pairs");

// Groups of eight rows share loops and keep their statistics in registers. Rows of a last group that are not there are
// computed with the others, from whatever the scratch memory holds, and not looked at.
constexpr int GROUP = 8;
static_assert(QUERY_BLOCK % GROUP == 0);

// Registers, and rows, that a step of such a loop takes: pairs come out of two.
template <bool PAIRS>
constexpr int STEP = PAIRS ? 2 : 1;

// One batch entry: its lengths and where it starts, and what its queries can see. Query i sees the keys
// j <= i + diagonal and those before `prefix`, and none at or beyond `keys`, which is the first that nobody sees.
struct Sequence {
  int64_t b, L, S, q_first, k_first, diagonal, prefix, keys;
};

inline Sequence sequence_of(const AttentionProblem& p, int64_t b) {
  Sequence s{b, p.L, p.S, 0, 0, NO_EDGE, 0, 0};
  if (p.cu_q) {
    s.q_first = p.cu_q[b], s.L = p.cu_q[b + 1] - s.q_first;
    s.k_first = p.cu_k[b], s.S = p.cu_k[b + 1] - s.k_first;
  }
  if (p.causal != Causal::none) s.diagonal = p.causal == Causal::bottom_right ? s.S - s.L : 0;
  if (p.prefix_lengths) s.prefix = p.prefix_lengths[b];
  s.keys = p.key_lengths ? p.key_lengths[b] : s.S;
  s.keys = s.L == 0 ? 0 : std::min(s.keys, std::max({s.L + s.diagonal, s.prefix, int64_t{0}}));
  return s;
}

inline int64_t lse_index(const AttentionProblem& p, const Sequence& s, int64_t h, int64_t i) {
  return s.b * p.lse_batch + h * p.lse_head + s.q_first + i;
}

inline int64_t query_blocks(int64_t rows) { return (rows + QUERY_BLOCK - 1) / QUERY_BLOCK; }

// A tile of scores: rows i0.., columns j0.. of head bh = b * H + h. Element (i, j) is visible iff j < limit(i), unless
// a mask hides it.
struct Tile {
  int64_t i0, j0, rows, cols;
  int64_t edge;    // row i of the tile sees j <= i + edge
  int64_t prefix;  // and j < prefix
  uint32_t head;

  int64_t limit(int64_t i) const { return std::clamp<int64_t>(std::max(i + edge + 1, prefix), 0, cols); }
  // What products may leave out: nothing where the prefix adds to the triangle.
  int64_t product_edge() const { return prefix > 0 ? NO_EDGE : edge; }
  // Columns that the products read for rows up to i: its own and those of the block of rows that it may share.
  template <bool PAIRS>
  int64_t extent(int64_t i) const {
    constexpr int64_t grain = STEP<PAIRS> * LANES, shared = PAIRS && TILES ? 48 : BLOCK_ROWS + PAIRS;
    const int64_t last = prefix > 0 ? cols : std::min(cols, limit(i) + shared);
    return round_up(last, grain);
  }
};

inline Tile make_tile(const AttentionProblem& p, const Sequence& s, int64_t h, int64_t i0, int64_t j0, int64_t keys) {
  const int64_t rows = std::min(QUERY_BLOCK, s.L - i0), cols = std::min(KEY_BLOCK, keys - j0);
  return {i0,
          j0,
          rows,
          cols,
          i0 + s.diagonal - j0,
          std::max<int64_t>(0, s.prefix - j0),
          static_cast<uint32_t>(s.b * p.H + h)};
}

// Visible columns of the rows of a group, in increasing order.
struct Limits {
  int32_t of[GROUP];
  // Steps up to `whole` are visible to all rows, up to `partial` to some, up to `extent` they are read later.
  int32_t whole, partial, extent;
};

template <bool PAIRS>
Limits group_limits(const Tile& t, int64_t i) {
  constexpr int32_t grain = STEP<PAIRS> * LANES;
  Limits limits;
  for (int r = 0; r < GROUP; ++r) limits.of[r] = static_cast<int32_t>(t.limit(i + r));
  limits.whole = limits.of[0] / grain * grain;
  limits.partial = static_cast<int32_t>(round_up(limits.of[GROUP - 1], grain));
  limits.extent = static_cast<int32_t>(t.extent<PAIRS>(i + GROUP - 1));
  return limits;
}

inline void zero_columns(float* tile, int32_t begin, int32_t end) {
  for (int32_t j = begin; j < end; j += LANES)
    for (int r = 0; r < GROUP; ++r) store(tile + r * TILE_STRIDE + j, Floats{});
}

// Strip s of n, first and last alternating: neighbouring units of a causal head then cost about the same in sum.
inline int64_t folded(int64_t s, int64_t n) { return s % 2 ? n - 1 - s / 2 : s / 2; }

// First row at or after `first` of the block grid whose queries can see key j0.
inline int64_t first_row(const Sequence& s, int64_t first, int64_t j0) {
  const int64_t visible = j0 < s.prefix ? 0 : std::max<int64_t>(0, j0 - s.diagonal);
  return std::max(first, visible / QUERY_BLOCK * QUERY_BLOCK);
}

void backward(const AttentionBackward& p, Gradients wanted, int64_t begin, int64_t end);

}  // namespace nlpfast::NLPFAST_ISA
