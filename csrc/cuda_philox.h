// Philox4x32-10 on CUDA devices: the random bits of philox.h, an element at a time.
#pragma once

#include "cuda_device.h"

namespace nlpfast::cuda {

// How elements are dropped.
struct Dropping {
  const int64_t* seed = nullptr;  // seed and offset, on the device
  int threshold = 0;              // what has 16 random bits below it is dropped; 0 for no dropout
  float factor = 1.0f;            // of what stays
};

__device__ __forceinline__ uint32_t high_product(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(static_cast<uint64_t>(a) * b >> 32);
}

// Seed and offset in registers, for several calls.
struct Seeds {
  uint32_t low = 0, high = 0, offset = 0;

  __device__ __forceinline__ explicit Seeds(const Dropping& dropping) {
    if (!dropping.threshold) return;
    const uint64_t seed = dropping.seed[0];
    low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    offset = static_cast<uint32_t>(dropping.seed[1]);
  }
};

// Which of the eight rows 8 `group` to 8 `group` + 7 keep their element in column `column`: a bit each.
__device__ __forceinline__ uint32_t survivors(const Dropping& dropping, const Seeds& seeds, uint32_t column,
                                              uint32_t group, uint32_t head) {
  uint32_t c0 = column, c1 = group, c2 = head, c3 = seeds.offset, k0 = seeds.low, k1 = seeds.high;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t h0 = high_product(0xD2511F53u, c0), l0 = 0xD2511F53u * c0;
    const uint32_t h1 = high_product(0xCD9E8D57u, c2), l1 = 0xCD9E8D57u * c2;
    c0 = h1 ^ c1 ^ k0, c1 = l1, c2 = h0 ^ c3 ^ k1, c3 = l0;
    k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
  }
  const uint32_t words[4] = {c0, c1, c2, c3}, threshold = dropping.threshold;
  uint32_t bits = 0;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    bits |= static_cast<uint32_t>((words[w] & 0xffffu) >= threshold) << (2 * w);
    bits |= static_cast<uint32_t>(words[w] >> 16 >= threshold) << (2 * w + 1);
  }
  return bits;
}

}  // namespace nlpfast::cuda
