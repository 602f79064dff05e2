// Rows of one head as the products want them: packed, converted, transposed, interleaved.
//
// The kernels exist twice, by a template argument PAIRS. Without it everything is computed in floats, into which 16-bit
// inputs are converted here. With it the operands of the products are pairs of bfloat16 (see gemm.h); all sums,
// statistics and accumulators are floats in both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <initializer_list>
#include <new>
#include <utility>

#include "../gemm.h"
#include "attention.h"

namespace nlpfast::NLPFAST_ISA {

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

// Rows of words: floats, or pairs along the columns. Padded with zeros to whole registers.
struct Rows {
  const float* data;
  int64_t stride;
  const float* row(int64_t i) const { return data + i * stride; }
};

// Words of a row with its padding, and how many of them an inner dimension reads.
template <bool PAIRS>
constexpr int64_t width_of(int64_t columns) {
  return round_up(words_of<PAIRS>(columns), LANES);
}
template <bool PAIRS>
constexpr int64_t depth_of(int64_t columns) {
  return round_up(words_of<PAIRS>(columns), PAIRS ? INNER_GRAIN : 1);
}

inline const char* rows_at(Dtype dtype, const Strided& x, int64_t b, int64_t h, int64_t i) {
  return x.data + (b * x.batch + h * x.head + i * x.row) * size_of(dtype);
}
inline char* rows_at(Dtype dtype, const Result& x, int64_t b, int64_t h, int64_t i) {
  return x.data + (b * x.batch + h * x.head + i * x.row) * size_of(dtype);
}

template <class Element>
void copy_row(float* to, const Element* from, int64_t step, int64_t n, int64_t padded) {
  int64_t c = 0;
  if (step == 1)
    for (; c + LANES <= n; c += LANES) store(to + c, load(from + c));
  for (; c < n; ++c) to[c] = to_float(from[c * step]);
  std::fill(to + n, to + padded, 0.0f);
}

// bfloat16 to pairs: the bits as they are.
inline void copy_pairs(float* to, const Bfloat16* from, int64_t step, int64_t n, int64_t padded) {
  auto* bits = reinterpret_cast<Bfloat16*>(to);
  if (step == 1)
    std::memcpy(bits, from, static_cast<size_t>(n) * 2);
  else
    for (int64_t c = 0; c < n; ++c) bits[c] = from[c * step];
  std::fill(bits + n, bits + 2 * padded, Bfloat16{0});
}

template <class Element>
void write_row(Element* to, const float* from, int64_t n, float factor) {
  int64_t c = 0;
  for (; c + LANES <= n; c += LANES) store(to + c, load(from + c) * factor);
  for (; c < n; ++c) to[c] = from_float<Element>(from[c] * factor);
}

// Whether rows can be read in place as an operand of a product: whole registers, adjacent rows, and none that would
// have to be cleaned (see attention_mask.h). Tiles read sixteen rows at a time.
template <bool PAIRS>
bool in_place(const AttentionProblem& p, const Strided& x, int64_t rows, int64_t columns) {
  const Dtype wanted = PAIRS ? Dtype::bfloat16 : Dtype::float32;
  return p.dtype == wanted && !p.mask.data && x.column == 1 && x.row == columns &&
         columns % (PAIRS ? 2 * LANES : LANES) == 0 && !(PAIRS && TILES && rows % 16);
}

template <bool PAIRS>
Rows rows_of(const AttentionProblem& p, const Strided& x, const char* first, int64_t rows, int64_t columns,
             const float* space) {
  const int64_t width = width_of<PAIRS>(columns);
  return in_place<PAIRS>(p, x, rows, columns) ? Rows{reinterpret_cast<const float*>(first), width} : Rows{space, width};
}

template <bool PAIRS>
Rows pack(const AttentionProblem& p, const Strided& x, const char* first, int64_t rows, int64_t columns, float* space) {
  const int64_t width = width_of<PAIRS>(columns);
  if (!in_place<PAIRS>(p, x, rows, columns))
    with_element(p.dtype, [&](auto element) {
      const auto* from = reinterpret_cast<const decltype(element)*>(first);
      for (int64_t i = 0; i < rows; ++i) {
        if constexpr (PAIRS)
          copy_pairs(space + i * width, reinterpret_cast<const Bfloat16*>(from + i * x.row), x.column, columns, width);
        else
          copy_row(space + i * width, from + i * x.row, x.column, columns, width);
      }
    });
  return rows_of<PAIRS>(p, x, first, rows, columns, space);
}

// The transpose of rows of words, in panels of PANEL rows: to[panel][word][row]. Missing rows become zeros.
inline void pack_transposed(const Rows& x, int64_t rows, int64_t words, float* to) {
  for (int64_t j = 0; j < round_up(rows, LANES); j += LANES) {
    float* panel = to + j / PANEL * PANEL * words + j % PANEL;
    for (int64_t c = 0; c < words; c += LANES) {
      Floats square[LANES];
      for (int r = 0; r < LANES; ++r) square[r] = j + r < rows ? load(x.row(j + r) + c) : Floats{};
      transpose(square);
      const int64_t width = std::min<int64_t>(LANES, words - c);
      for (int r = 0; r < width; ++r) store(panel + (c + r) * PANEL, square[r]);
    }
  }
}

// Rows 2i and 2i + 1 of pairs along the columns become row i of pairs along the rows, round_up(columns, LANES) words
// wide, and rows of zeros follow up to the grain of an inner dimension. Rows whose lse is +inf count as zeros.
inline void interleave(const Rows& x, int64_t rows, int64_t columns, float* to, const float* lse = nullptr) {
  const int64_t width = round_up(columns, LANES);
  const auto is_there = [&](int64_t i) { return i < rows && !(lse && lse[i] == INF); };
  for (int64_t i = 0; i < rows; i += 2, to += width) {
    const bool upper = is_there(i), lower = is_there(i + 1);
    for (int64_t c = 0; c < width; c += 2 * LANES) {
      const Floats a = upper ? load(x.row(i) + c / 2) : Floats{}, b = lower ? load(x.row(i + 1) + c / 2) : Floats{};
      store(to + c, zip_low(a, b));
      if (c + LANES < width) store(to + c + LANES, zip_high(a, b));
    }
  }
  const int64_t written = words_of<true>(rows);
  std::fill_n(to, (round_up(written, INNER_GRAIN) - written) * width, 0.0f);
}

// The second operand of a product whose inner dimension runs over `rows`: the rows themselves, or interleaved pairs.
template <bool PAIRS>
Rows as_right_operand(const Rows& x, int64_t rows, int64_t columns, float* space, const float* lse = nullptr) {
  if constexpr (PAIRS) {
    interleave(x, rows, columns, space, lse);
    return {space, round_up(columns, LANES)};
  } else {
    return x;
  }
}

}  // namespace nlpfast::NLPFAST_ISA
