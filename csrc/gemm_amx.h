// The products of gemm.h on AMX tiles, for pairs of bfloat16: blocks of 2 x 2 tiles of C, so that four products share
// the loads of two tiles of A and two of B. A transposed A is transposed back first, a strip of its columns at a time.
//
// Whole tiles are read and written: rows of A and C are there up to a multiple of TILE_ROWS, columns of B and C of
// LANES; the inner dimension is a multiple of INNER_GRAIN, and at most STRIP_DEPTH where A is transposed. Rows of A
// that are padding make rows of C that are padding.
#pragma once

#include "gemm.h"

namespace nlpfast::NLPFAST_ISA {

template <int TILE>
void begin_sum(bool add, const float* c, int64_t ldc) {
  if (add)
    load_tile<TILE>(c, ldc);
  else
    zero_tile<TILE>();
}

// C = A B, or C += A B, for one block: tiles 0 to 3 are C row by row, 4 and 5 A, 6 and 7 B.
template <int ROWS, int COLUMNS>
void block_of_tiles(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth,
                    bool add) {
  constexpr bool LOWER = ROWS > 1, RIGHT = COLUMNS > 1;
  float* c_lower = c + TILE_ROWS * ldc;
  begin_sum<0>(add, c, ldc);
  if constexpr (RIGHT) begin_sum<1>(add, c + LANES, ldc);
  if constexpr (LOWER) begin_sum<2>(add, c_lower, ldc);
  if constexpr (LOWER && RIGHT) begin_sum<3>(add, c_lower + LANES, ldc);
  for (int64_t k = 0; k < depth; k += INNER_GRAIN, a += INNER_GRAIN, b += INNER_GRAIN * ldb) {
    load_tile<4>(a, lda);
    load_tile<6>(b, ldb);
    dot_tiles<0, 4, 6>();
    if constexpr (RIGHT) load_tile<7>(b + LANES, ldb);
    if constexpr (RIGHT) dot_tiles<1, 4, 7>();
    if constexpr (LOWER) load_tile<5>(a + TILE_ROWS * lda, lda);
    if constexpr (LOWER) dot_tiles<2, 5, 6>();
    if constexpr (LOWER && RIGHT) dot_tiles<3, 5, 7>();
  }
  store_tile<0>(c, ldc);
  if constexpr (RIGHT) store_tile<1>(c + LANES, ldc);
  if constexpr (LOWER) store_tile<2>(c_lower, ldc);
  if constexpr (LOWER && RIGHT) store_tile<3>(c_lower + LANES, ldc);
}

// Calls f with 2, and with 1 where a single tile is left.
template <class F>
void for_pairs_of_tiles(int64_t n, F&& f) {
  int64_t at = 0;
  for (; at + TILE_ROWS < n; at += 2 * TILE_ROWS) f.template operator()<2>(at);
  if (at < n) f.template operator()<1>(at);
}

inline const float* columns_of_b(const Product& p, int64_t column) {
  static_assert(!TILES || PANEL % (2 * LANES) == 0, "the columns of a block lie in one panel");
  return p.b + column / PANEL * PANEL * p.panel_step + column % PANEL;
}

// Where the inner dimension of the visible rows up to `end` ends.
inline int64_t visible_depth(const Product& p, int64_t end) {
  return std::min(p.k, round_up(words_of<true>(std::max<int64_t>(0, end + p.edge)), INNER_GRAIN));
}

template <int ROWS, int COLUMNS, Trim TRIM>
void trimmed_block(const Product& p, int64_t first, int64_t column, bool add) {
  if constexpr (TRIM == Trim::columns) {
    // Where the first rows do not see all columns, tile by tile.
    if (first + TILE_ROWS - 1 + p.edge < column + (COLUMNS - 1) * LANES) {
      if constexpr (ROWS > 1) {
        trimmed_block<1, COLUMNS, TRIM>(p, first, column, add);
        trimmed_block<1, COLUMNS, TRIM>(p, first + TILE_ROWS, column, add);
      } else if constexpr (COLUMNS > 1) {
        trimmed_block<1, 1, TRIM>(p, first, column, add);
      }
      return;
    }
  }
  const int64_t depth = TRIM == Trim::k_end ? visible_depth(p, first + ROWS * TILE_ROWS) : p.k;
  block_of_tiles<ROWS, COLUMNS>(p.a + first * p.lda, p.lda, columns_of_b(p, column), p.ldb,
                                p.c + first * p.ldc + column, p.ldc, depth, add);
}

// to[i][k] = a[k][i] for `depth` rows of `width` words.
inline void transpose_strip(const float* a, int64_t lda, int64_t width, int64_t depth, float* to, int64_t stride) {
  for (int64_t k = 0; k < depth; k += LANES)
    for (int64_t i = 0; i < width; i += LANES) {
      Floats square[LANES];
      for (int r = 0; r < LANES; ++r) square[r] = load(a + (k + r) * lda + i);
      transpose(square);
      for (int r = 0; r < LANES; ++r) store(to + (i + r) * stride + k, square[r]);
    }
}

// The deepest transposed A, in words.
constexpr int64_t STRIP_DEPTH = 2 * INNER_GRAIN;

// Rows [first, first + ROWS * TILE_ROWS) of C from a transposed A. The whole strip is transposed before it is
// multiplied, because tiles are loaded slowly from what is still on its way to the cache.
template <int ROWS, Trim TRIM>
void transposed_rows(const Product& p, int64_t first, bool add) {
  constexpr int64_t WIDTH = ROWS * TILE_ROWS;
  alignas(64) float strip[WIDTH * STRIP_DEPTH];
  int64_t k = 0;
  if (TRIM == Trim::k_begin) k = std::max<int64_t>(0, first - p.edge) / 2 / INNER_GRAIN * INNER_GRAIN;
  const int64_t depth = std::max<int64_t>(0, p.k - k);
  transpose_strip(p.a + k * p.lda + first, p.lda, WIDTH, depth, strip, STRIP_DEPTH);
  for_pairs_of_tiles(p.n, [&]<int COLUMNS>(int64_t column) {
    block_of_tiles<ROWS, COLUMNS>(strip, STRIP_DEPTH, columns_of_b(p, column) + k * p.ldb, p.ldb,
                                  p.c + first * p.ldc + column, p.ldc, depth, add);
  });
}

template <bool TRANSPOSED, bool ADD, Trim TRIM>
void multiply_tiles(const Product& p) {
  static_assert(TRANSPOSED || TRIM != Trim::k_begin);
  static_assert(!TRANSPOSED || TRIM == Trim::none || TRIM == Trim::k_begin);
  if constexpr (TRANSPOSED)
    for_pairs_of_tiles(p.m, [&]<int ROWS>(int64_t first) { transposed_rows<ROWS, TRIM>(p, first, ADD); });
  else
    for_pairs_of_tiles(p.n, [&]<int COLUMNS>(int64_t column) {
      for_pairs_of_tiles(p.m,
                         [&]<int ROWS>(int64_t first) { trimmed_block<ROWS, COLUMNS, TRIM>(p, first, column, ADD); });
    });
}

}  // namespace nlpfast::NLPFAST_ISA
