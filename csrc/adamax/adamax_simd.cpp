// One step of Adamax: parameter, gradient and both averages are read once, 28 bytes moved an element.
#include <algorithm>
#include <cstring>

#include "../simd.h"
#include "adamax.h"

namespace nlpfast::NLPFAST_ISA {
namespace {

// LANES elements from i on.
inline void update(const Adamax& p, float* param, const float* grad, float* mean, float* size) {
  const Floats g = load(grad);
  const Floats m = load(mean) * p.beta1 + p.complement * g;
  const Floats decayed = load(size) * p.beta2;
  const Floats magnitude = (Floats)((Ints)g & 0x7fffffff);
  // a NaN of either stays
  const Floats u = magnitude > decayed ? magnitude : (magnitude == magnitude ? decayed : magnitude);
  const Floats old = load(param);
  store(mean, m);
  store(size, u);
  store(param, old - old * p.decay - p.rate * m / (u + p.eps));
}

void step(const Adamax& p, int64_t begin, int64_t end) {
  const int64_t last = std::min(end * ADAMAX_BLOCK, p.n);
  int64_t i = begin * ADAMAX_BLOCK;
  for (; i + LANES <= last; i += LANES) update(p, p.param + i, p.grad + i, p.mean + i, p.size + i);
  if (i >= last) return;
  float rest[4][LANES] = {};
  float* const arrays[4] = {p.param + i, const_cast<float*>(p.grad) + i, p.mean + i, p.size + i};
  const size_t bytes = (last - i) * sizeof(float);
  for (int a = 0; a < 4; ++a) std::memcpy(rest[a], arrays[a], bytes);
  update(p, rest[0], rest[1], rest[2], rest[3]);
  for (int a : {0, 2, 3}) std::memcpy(arrays[a], rest[a], bytes);
}

}  // namespace

extern const AdamaxKernels adamax{step};

}  // namespace nlpfast::NLPFAST_ISA
