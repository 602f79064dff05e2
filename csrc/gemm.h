// Small matrix products for tiles that live in the L1 and L2 cache: C = A B or C += A B.
//
// C is computed in blocks of block_rows(v) rows x v registers, which hold their sums in registers over the whole inner
// dimension; elements of A are broadcast, rows of B are loaded. Each element of C adds its products in the order
// of k, whatever the block it falls into, so results do not depend on how a matrix is cut into rows.
//
// With PAIRS the elements of A and B are pairs of bfloat16, two consecutive k in a word of 32 bits (see float16.h): A's
// rows as they lie in memory, B's rows two by two interleaved. k, lda and ldb then count words. C is always float.
// Where there are AMX tiles, these products run on them (see gemm_amx.h).
//
// Triangular work is trimmed: with `edge` e, element (row i, column j) of the attention tile is visible iff j <= i + e.
#pragma once

#include <algorithm>
#include <cstring>

#include "amx.h"
#include "float16.h"

namespace nlpfast::NLPFAST_ISA {

#if defined(__AVX512F__)
constexpr int PANEL_VECTORS = 4;
// Rows of a block with so many registers a row: 16 to 24 sums, which leaves room for the row of B and one of A.
constexpr int block_rows(int vectors) { return vectors == 4 ? 6 : 8; }
constexpr int BLOCK_ROWS = 8;  // the most of them
#else
constexpr int PANEL_VECTORS = 2;
constexpr int block_rows(int) { return 4; }
constexpr int BLOCK_ROWS = 4;
#endif
constexpr int PANEL = PANEL_VECTORS * LANES;

// The inner dimension of a product of pairs is padded with zeros to a multiple of so many words.
constexpr int64_t INNER_GRAIN = TILES ? 16 : 1;

// Words of 32 bits that n elements take.
template <bool PAIRS>
constexpr int64_t words_of(int64_t n) {
  return PAIRS ? (n + 1) / 2 : n;
}

enum class Trim {
  none,
  columns,  // C is the tile itself: blocks right of the edge are not computed
  k_end,    // A is the tile: row i needs k <= i + e
  k_begin,  // A is the transposed tile: row j needs k >= j - e
};

// a(m, k) = a[m * lda + k], or a[k * lda + m] if TRANSPOSED.
// Panel p of B (PANEL columns wide) starts at b + p * PANEL * panel_step, its rows are ldb apart.
struct Product {
  const float* a;
  int64_t lda;
  const float* b;
  int64_t ldb, panel_step;
  float* c;
  int64_t ldc;
  int64_t m, n, k;
  int64_t edge;
};

// Rows of pairs that are read in place may be aligned to two bytes alone.
inline float word_at(const float* p) {
  float x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

template <bool PAIRS>
inline Floats multiply_add(Floats sum, Floats x, Floats y) {
  if constexpr (PAIRS)
    return add_products(sum, x, y);
  else
    return sum + x * y;
}

template <bool PAIRS, int ROWS, int VECTORS, bool TRANSPOSED, bool ADD>
inline void block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t k_begin,
                  int64_t k_end) {
  Floats sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) sum[r][v] = Floats{};
  for (int64_t k = k_begin; k < k_end; ++k) {
    Floats row[VECTORS];
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) row[v] = load(b + k * ldb + v * LANES);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const Floats x = broadcast(word_at(TRANSPOSED ? a + k * lda + r : a + r * lda + k));
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) sum[r][v] = multiply_add<PAIRS>(sum[r][v], x, row[v]);
    }
  }
  // C comes last: sums of sums round less than one long chain.
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; ++v) {
      float* to = c + r * ldc + v * LANES;
      store(to, ADD ? load(to) + sum[r][v] : sum[r][v]);
    }
}

template <bool PAIRS, int ROWS, int VECTORS, bool TRANSPOSED, bool ADD, Trim TRIM>
inline void rows_of_panel(const Product& p, int64_t first, int64_t column, const float* b) {
  int64_t k_begin = 0, k_end = p.k;
  const int64_t last_visible = first + ROWS - 1 + p.edge;
  if (TRIM == Trim::columns && last_visible < column) return;
  if (TRIM == Trim::k_end) k_end = std::min(p.k, words_of<PAIRS>(first + ROWS + p.edge));
  if (TRIM == Trim::k_begin) k_begin = std::max<int64_t>(0, first - p.edge) / (PAIRS ? 2 : 1);
  const float* a = TRANSPOSED ? p.a + first : p.a + first * p.lda;
  float* c = p.c + first * p.ldc + column;
  if constexpr (TRIM == Trim::columns && VECTORS > 1) {
    // At the edge fewer registers a row will do.
    if (last_visible < column + (VECTORS - 1) * LANES)
      return rows_of_panel<PAIRS, ROWS, VECTORS - 1, TRANSPOSED, ADD, TRIM>(p, first, column, b);
  }
  block<PAIRS, ROWS, VECTORS, TRANSPOSED, ADD>(a, p.lda, b, p.ldb, c, p.ldc, k_begin, k_end);
}

template <bool PAIRS, int ROWS, int VECTORS, bool TRANSPOSED, bool ADD, Trim TRIM>
inline void panel(const Product& p, int64_t column, int64_t first) {
  const float* b = p.b + column * p.panel_step;
  for (; first + ROWS <= p.m; first += ROWS)
    rows_of_panel<PAIRS, ROWS, VECTORS, TRANSPOSED, ADD, TRIM>(p, first, column, b);
  if constexpr (ROWS > 1) panel<PAIRS, (ROWS > 4 ? 4 : ROWS / 2), VECTORS, TRANSPOSED, ADD, TRIM>(p, column, first);
}

// In gemm_amx.h.
template <bool TRANSPOSED, bool ADD, Trim TRIM>
void multiply_tiles(const Product& p);

// Columns are computed in whole registers: C and B hold round_up(n, LANES) of them.
template <bool PAIRS, bool TRANSPOSED, bool ADD, Trim TRIM, int VECTORS = PANEL_VECTORS>
void multiply(const Product& p, int64_t column = 0) {
  if constexpr (PAIRS && TILES) {
    multiply_tiles<TRANSPOSED, ADD, TRIM>(p);
  } else {
    for (; column + (VECTORS - 1) * LANES < p.n; column += VECTORS * LANES)
      panel<PAIRS, block_rows(VECTORS), VECTORS, TRANSPOSED, ADD, TRIM>(p, column, 0);
    if constexpr (VECTORS > 1) multiply<PAIRS, TRANSPOSED, ADD, TRIM, VECTORS - 1>(p, column);
  }
}

// C = A B the first time, C += A B later.
template <bool PAIRS, bool TRANSPOSED, Trim TRIM>
void accumulate(bool first, const Product& p) {
  if (first)
    multiply<PAIRS, TRANSPOSED, false, TRIM>(p);
  else
    multiply<PAIRS, TRANSPOSED, true, TRIM>(p);
}

}  // namespace nlpfast::NLPFAST_ISA

#include "gemm_amx.h"
