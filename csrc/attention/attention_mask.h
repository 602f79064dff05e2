// The general mask, read in place: booleans, or floats that are added to the scores.
//
// Its elements come after the product, so a score may be NaN where a key is hidden; hidden scores become -inf whatever
// they were. 0 * NaN is NaN, so rows of keys and values that no query sees are zeroed if they are not finite.
#pragma once

#include "attention_tile.h"

namespace nlpfast::NLPFAST_ISA {

// What one mask element adds to a score.
struct Boolean {
  bool visible;
};
inline float addend(Boolean m) { return m.visible ? 0.0f : -INF; }
inline float addend(float m) { return m; }
inline float addend(Bfloat16 m) { return to_float(m); }
inline float addend(Float16 m) { return to_float(m); }

inline Floats load_addends(const Boolean* m) {
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  Bytes bytes;
  std::memcpy(&bytes, m, sizeof bytes);
  const Ints visible = __builtin_convertvector(bytes, Ints) != 0;
  return visible ? Floats{} : broadcast(-INF);
}
template <class Element>
Floats load_addends(const Element* m) {
  return load(m);
}

// The addends of row i of head (b, h), from column j on, `there` of them; -inf beyond.
template <class Element>
Floats addends(const Element* row, int64_t step, int64_t there) {
  if (step == 1 && there >= LANES) return load_addends(row);
  Floats x = broadcast(-INF);
  if (step == 0)
    x = broadcast(addend(*row));
  else
    for (int64_t lane = 0; lane < std::min<int64_t>(there, LANES); ++lane) x[lane] = addend(row[lane * step]);
  return there >= LANES ? x : lane_numbers() < static_cast<int32_t>(there) ? x : broadcast(-INF);
}

template <class F>
auto with_mask_element(Dtype dtype, F&& f) {
  if (dtype == Dtype::boolean) return f(Boolean{});
  return with_element(dtype, f);
}

template <class Element>
const Element* mask_at(const AttentionProblem& p, int64_t b, int64_t h, int64_t i, int64_t j) {
  const Strided& m = p.mask;
  return reinterpret_cast<const Element*>(m.data) + b * m.batch + h * m.head + i * m.row + j * m.column;
}

// Whether the mask hides every element of a tile, which then need not be computed.
inline bool mask_hides(const AttentionProblem& p, int64_t b, int64_t h, const Tile& t) {
  return p.mask.data && with_mask_element(p.mask_dtype, [&](auto element) {
           const int64_t rows = p.mask.row == 0 ? 1 : t.rows, cols = p.mask.column == 0 ? 1 : t.cols;
           for (int64_t i = 0; i < rows; ++i) {
             const auto* row = mask_at<decltype(element)>(p, b, h, t.i0 + i, t.j0);
             for (int64_t j = 0; j < cols; j += LANES) {
               const Floats x = addends(row + j * p.mask.column, p.mask.column, cols - j);
               if (max_lanes(x == broadcast(-INF) ? Floats{} : broadcast(1.0f)) > 0.0f) return false;
             }
           }
           return true;
         });
}

// scores = scale * scores + mask, -inf where hidden; there `gradient`, if given, becomes 0.
inline void apply_mask(const AttentionProblem& p, int64_t b, int64_t h, const Tile& t, float* scores, float* gradient) {
  with_mask_element(p.mask_dtype, [&](auto element) {
    for (int64_t i = 0; i < t.rows; ++i) {
      const auto* row = mask_at<decltype(element)>(p, b, h, t.i0 + i, t.j0);
      const int64_t limit = t.limit(i);
      for (int64_t j = 0; j < limit; j += LANES) {
        const Floats x = addends(row + j * p.mask.column, p.mask.column, t.cols - j);
        const int64_t at = i * TILE_STRIDE + j;
        const Ints hidden = x == broadcast(-INF);
        store(scores + at, hidden ? broadcast(-INF) : load(scores + at) * p.scale + x);
        if (gradient) store(gradient + at, hidden ? Floats{} : load(gradient + at));
      }
    }
  });
}

inline bool anyone_sees(const AttentionProblem& p, const Sequence& s, int64_t h, int64_t j) {
  return with_mask_element(p.mask_dtype, [&](auto element) {
    for (int64_t i = j < s.prefix ? 0 : std::max<int64_t>(0, j - s.diagonal); i < s.L; ++i)
      if (addend(*mask_at<decltype(element)>(p, s.b, h, i, j)) != -INF) return true;
    return false;
  });
}

// Whether a row of words holds an infinity or a NaN.
template <bool PAIRS>
bool has_garbage(const float* row, int64_t words) {
  Ints found{};
  for (int64_t c = 0; c < words; c += LANES) {
    const UInts bits = (UInts)load(row + c);
    if (PAIRS) found |= (bits & 0x7f80u) == 0x7f80u;
    found |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  for (int lane = 0; lane < LANES; ++lane)
    if (found[lane]) return true;
  return false;
}

// Zeroes the rows of packed keys and values that hold garbage and that no query of the heads [h, h_end) sees.
template <bool PAIRS>
void clean_unseen(const AttentionProblem& p, const Sequence& s, int64_t h, int64_t h_end, int64_t j_begin,
                  int64_t j_end, float* k, float* v) {
  const int64_t k_width = width_of<PAIRS>(p.D), v_width = width_of<PAIRS>(p.E);
  for (int64_t j = j_begin; j < j_end; ++j, k += k_width, v += v_width) {
    if (!has_garbage<PAIRS>(k, k_width) && !has_garbage<PAIRS>(v, v_width)) continue;
    bool seen = false;
    for (int64_t head = h; head < h_end && !seen; ++head) seen = anyone_sees(p, s, head, j);
    if (seen) continue;
    std::fill_n(k, k_width, 0.0f);
    std::fill_n(v, v_width, 0.0f);
  }
}

}  // namespace nlpfast::NLPFAST_ISA
