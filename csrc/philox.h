// Philox4x32-10, the counter-based generator of J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC11).
//
// Dropout of the attention probability (query i, key j) of head bh takes 16 of the 128 bits of one call: counter
// (j, i / 8, bh, offset), key = the 64-bit seed, field i % 8. So a vector of consecutive keys needs one call for eight
// query rows, and the bits depend on the indexes alone, never on a tile or a thread. Dropout of the rows of a matrix is
// that with rows for queries, columns for keys, and 0 for bh.
#pragma once

#include "simd.h"

namespace nlpfast::NLPFAST_ISA {

struct PhiloxKey {
  uint64_t seed;
  uint32_t offset;
};

struct PhiloxWords {
  UInts word[4];
};

// Words for the counters (first + lane, row_group, head, offset). Each 32-bit word lives in the low half of a 64-bit
// lane (even and odd keys apart), because that is what the widening multiply reads and leaves.
inline PhiloxWords philox(PhiloxKey key, uint32_t first, uint32_t row_group, uint32_t head) {
  const ULongs m0 = ULongs{} + 0xD2511F53ull, m1 = ULongs{} + 0xCD9E8D57ull;
  const UInts keys = (UInts)lane_numbers() + first;
  ULongs counter[2][4];
  for (int odd = 0; odd < 2; ++odd) {
    counter[odd][0] = odd ? (ULongs)keys >> 32 : (ULongs)keys;
    counter[odd][1] = ULongs{} + row_group;
    counter[odd][2] = ULongs{} + head;
    counter[odd][3] = ULongs{} + key.offset;
  }
  uint32_t k0 = static_cast<uint32_t>(key.seed), k1 = static_cast<uint32_t>(key.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const ULongs key0 = ULongs{} + k0, key1 = ULongs{} + k1;
    for (auto& c : counter) {
      const ULongs product0 = multiply_low_halves(c[0], m0), product1 = multiply_low_halves(c[2], m1);
      c[0] = (product1 >> 32) ^ c[1] ^ key0;
      c[1] = product1;
      c[2] = (product0 >> 32) ^ c[3] ^ key1;
      c[3] = product0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  PhiloxWords words;
  for (int w = 0; w < 4; ++w) words.word[w] = (UInts)((counter[0][w] & 0xffffffffull) | (counter[1][w] << 32));
  return words;
}

// All ones in the lanes whose probability survives in row `row` of the group of eight.
inline Ints kept(const PhiloxWords& words, int row, int32_t threshold) {
  const UInts word = words.word[row / 2];
  const UInts field = row % 2 ? word >> 16 : word & 0xffffu;
  return (Ints)field >= threshold;
}

}  // namespace nlpfast::NLPFAST_ISA
