// AMX's tile registers: eight a thread, each of TILE_ROWS rows of 16 words.
//
// dot_tiles adds to float (i, j) of tile C the products of row i of A, pairs of bfloat16 along the columns, and column
// j of B, whose rows are pairs along the rows. Strides count words.
//
// With NLPFAST_EMULATE_AMX the tiles are arrays, so that what is built on them can be tested on a CPU without AMX. An
// access without a configuration then ends the process, as it does on a real one.
#pragma once

#include <cstdlib>

#include "simd.h"

namespace nlpfast::NLPFAST_ISA {

constexpr int64_t TILE_ROWS = 16;

// Whether products of pairs run on tiles.
#if defined(NLPFAST_EMULATE_AMX)

constexpr bool TILES = true;

inline thread_local bool tiles_configured = false;
inline thread_local Floats tile_data[8][TILE_ROWS];

template <int TILE>
auto& tile() {
  if (!tiles_configured) std::abort();
  return tile_data[TILE];
}

inline void configure_tiles() {
  std::memset(tile_data, 0, sizeof tile_data);
  tiles_configured = true;
}

inline void release_tiles() { tiles_configured = false; }

template <int TILE>
void zero_tile() {
  std::memset(tile<TILE>(), 0, sizeof tile_data[0]);
}

template <int TILE>
void load_tile(const float* from, int64_t stride) {
  for (int64_t i = 0; i < TILE_ROWS; ++i) tile<TILE>()[i] = load(from + i * stride);
}

template <int TILE>
void store_tile(float* to, int64_t stride) {
  for (int64_t i = 0; i < TILE_ROWS; ++i) store(to + i * stride, tile<TILE>()[i]);
}

// Even and odd elements have sums of their own, as in Intel's description of the instruction.
template <int C, int A, int B>
void dot_tiles() {
  for (int64_t i = 0; i < TILE_ROWS; ++i) {
    Floats even{}, odd{};
    for (int k = 0; k < LANES; ++k) {
      const UInts a = UInts{} + ((UInts)tile<A>()[i])[k], b = (UInts)tile<B>()[k];
      even += (Floats)(a << 16) * (Floats)(b << 16);
      odd += (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
    }
    tile<C>()[i] += even + odd;
  }
}

#elif defined(__AMX_BF16__)

constexpr bool TILES = true;

// Not the intrinsics: GCC's take literal numbers alone, and do not say that they read memory, so that stores before
// them may come after.
struct TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileShapes) == 64);

inline void configure_tiles() {
  static constexpr TileShapes shapes;
  asm volatile("ldtilecfg %0" ::"m"(shapes));
}

inline void release_tiles() { asm volatile("tilerelease"); }

template <int TILE>
void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(TILE));
}

template <int TILE>
void load_tile(const float* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(from), "r"(4 * stride), "i"(TILE) : "memory");
}

template <int TILE>
void store_tile(float* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(to), "r"(4 * stride), "i"(TILE) : "memory");
}

template <int C, int A, int B>
void dot_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#else

constexpr bool TILES = false;

// Declared only: templates name them and are never instantiated here.
void configure_tiles();
void release_tiles();
template <int TILE>
void zero_tile();
template <int TILE>
void load_tile(const float* from, int64_t stride);
template <int TILE>
void store_tile(float* to, int64_t stride);
template <int C, int A, int B>
void dot_tiles();

#endif

// Configures the thread's tiles for as long as it lives, where there are any and they are wanted: other libraries
// configure them their way on the same threads, and tiles in use make switches of threads dearer.
class TileConfiguration {
 public:
  explicit TileConfiguration(bool wanted) : wanted_(wanted) {
    if constexpr (TILES)
      if (wanted_) configure_tiles();
  }
  ~TileConfiguration() {
    if constexpr (TILES)
      if (wanted_) release_tiles();
  }
  TileConfiguration(const TileConfiguration&) = delete;
  TileConfiguration& operator=(const TileConfiguration&) = delete;

 private:
  bool wanted_;
};

}  // namespace nlpfast::NLPFAST_ISA
