// Dropout of a tensor: read once, written once, and nothing kept but the seed.
//
// The elements count as a matrix of 64 columns. A vector of columns takes the random bits of eight rows from one call
// of Philox, about one instruction an element. The last group of rows goes through a buffer where it is not whole.
#include <algorithm>
#include <cstring>

#include "../float16.h"
#include "../philox.h"
#include "../simd.h"
#include "dropout.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

constexpr int64_t GROUP = DROPOUT_COLUMNS * DROPOUT_ROWS;

template <class Element>
void drop_group(const Dropping& d, const Element* x, Element* out, int64_t group) {
  for (int64_t column = 0; column < DROPOUT_COLUMNS; column += LANES) {
    const PhiloxWords words = philox({d.seed, d.offset}, (uint32_t)column, (uint32_t)group, 0);
#pragma GCC unroll 8
    for (int64_t row = 0; row < DROPOUT_ROWS; ++row) {
      const int64_t at = row * DROPOUT_COLUMNS + column;
      const Ints keep = kept(words, (int)row, d.threshold);
      store(out + at, (Floats)((Ints)(load(x + at) * d.factor) & keep));
    }
  }
}

template <class Element>
void drop_groups(const Dropout& p, int64_t begin, int64_t end) {
  const auto* x = reinterpret_cast<const Element*>(p.x);
  auto* out = reinterpret_cast<Element*>(p.out);
  for (int64_t group = begin; group < end; ++group) {
    const int64_t first = group * GROUP, count = std::min(GROUP, p.n - first);
    if (count == GROUP) {
      drop_group(p.dropping, x + first, out + first, group);
    } else {
      Element rest[GROUP] = {};
      std::memcpy(rest, x + first, count * sizeof(Element));
      drop_group(p.dropping, rest, rest, group);
      std::memcpy(out + first, rest, count * sizeof(Element));
    }
  }
}

void forward(const Dropout& p, int64_t begin, int64_t end) {
  with_element(p.dtype, [&](auto element) { drop_groups<decltype(element)>(p, begin, end); });
}

}  // namespace

extern const DropoutKernels dropout{forward};

}  // namespace nlpfast::NLPFAST_ISA
