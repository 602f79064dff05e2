// One SIMD register of floats, written once and compiled once per instruction set.
//
// The compiler's vector extension gives arithmetic, comparison and selection on `Floats`; only what it cannot say
// (broadcast, maximum, 32x32->64 bit products) uses intrinsics. Every translation unit that includes this file is
// compiled with NLPFAST_ISA set to its instruction set, which keeps the copies apart in the linked library.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef NLPFAST_ISA
#error "NLPFAST_ISA names the instruction set that this file is compiled for"
#endif

namespace nlpfast::NLPFAST_ISA {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t UInts __attribute__((vector_size(4 * LANES)));
typedef uint64_t ULongs __attribute__((vector_size(4 * LANES)));

constexpr float INF = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline Floats load(const float* p) {
  Floats v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline void store(float* p, Floats v) { std::memcpy(p, &v, sizeof v); }

inline Floats broadcast(float x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_set1_ps(x);
#elif defined(__AVX2__)
  return (Floats)_mm256_set1_ps(x);
#elif defined(__x86_64__)
  return (Floats)_mm_set1_ps(x);
#else
  return Floats{x, x, x, x};
#endif
}

// Lane-wise maximum. A NaN in `a` is dropped, as maxps does; callers meet it again in the exponential.
inline Floats maximum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Floats)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}

// Lane-wise minimum; NaN as of `maximum`.
inline Floats minimum(Floats a, Floats b) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__x86_64__)
  return (Floats)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}

// Products of the low 32 bits of each 64-bit lane.
inline ULongs multiply_low_halves(ULongs a, ULongs b) {
#if defined(__AVX512F__)
  return (ULongs)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (ULongs)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (ULongs)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffull) * (b & 0xffffffffull);
#endif
}

// 0, 1, 2, ... in the lanes.
inline Ints lane_numbers() {
  Ints v;
  for (int lane = 0; lane < LANES; ++lane) v[lane] = lane;
  return v;
}

namespace detail {
template <int DISTANCE, int... I>
inline Floats swap_lanes(Floats v, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(v, v, (I ^ DISTANCE)...);
}

// Folds the lanes in a fixed order: halves, quarters, ... so that a sum has the same bits on every call.
template <int DISTANCE, class F>
inline float fold(Floats v, F&& combine) {
  if constexpr (DISTANCE == 0)
    return v[0];
  else
    return fold<DISTANCE / 2>(combine(v, swap_lanes<DISTANCE>(v, std::make_integer_sequence<int, LANES>{})), combine);
}
}  // namespace detail

inline float sum_lanes(Floats v) {
  return detail::fold<LANES / 2>(v, [](Floats a, Floats b) { return a + b; });
}

inline float max_lanes(Floats v) {
  return detail::fold<LANES / 2>(v, [](Floats a, Floats b) { return maximum(a, b); });
}

// e^x to about 1 ulp; 0 below -87.3, where the result would leave the normal range; NaN stays NaN. For x <= 88.
//
// x = n ln 2 + r with |r| <= ln 2 / 2: adding 1.5 * 2^23 leaves n in the low bits of the sum, from where it is added to
// the exponent. ln 2 in two parts: Cephes, expf.c (S. Moshier). e^r = 1 + r + r^2 q(r): q is a minimax fit of degree 4
// for the relative error of e^r, 3e-9.
inline Floats exp(Floats x) {
  const Floats magic = broadcast(12582912.0f);
  Floats shifted = x * 1.44269504088896341f + magic;
  Floats n = shifted - magic;
  Floats r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  Floats q = r * 1.3814598366e-03f + 8.3687168981e-03f;
  q = q * r + 4.1668388051e-02f;
  q = q * r + 1.6666520632e-01f;
  q = q * r + 4.9999993448e-01f;
  q = q * (r * r) + (r + 1.0f);
  const Floats result = (Floats)((UInts)q + ((UInts)shifted << 23));
  return x >= broadcast(-87.3f) ? result : maximum(Floats{}, x);
}

// e^x to about 1 ulp and the rounding of x, for the x that are differences of rounded numbers anyway; 0 below -104; NaN
// stays NaN. For x <= 88. x log2(e) = n + r with |r| <= 1/2, r by one product that is not rounded; 2^r is a minimax fit
// of degree 6 for the relative error, 2e-9.
inline Floats exp_of_difference(Floats x) {
#if defined(__AVX512F__)
  const Floats magic = broadcast(12582912.0f), log2_e = broadcast(1.44269504088896341f);
  // below it the result is 0; also keeps -inf from meeting itself
  x = maximum(broadcast(-110.0f), x);
  const Floats n = x * log2_e + magic - magic;
  const Floats r = x * log2_e - n;
  Floats p = r * 1.5345812426e-04f + 1.3399930904e-03f;
  p = p * r + 9.6184890717e-03f;
  p = p * r + 5.5503286421e-02f;
  p = p * r + 2.4022646248e-01f;
  p = p * r + 6.9314718246e-01f;
  p = p * r + 1.0f;
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return exp(x);
#endif
}

namespace detail {
// Where (lane & DISTANCE) == UPPER * DISTANCE the lane of a resp. b stays; the others come DISTANCE lanes away from b
// resp. a.
template <int DISTANCE, bool UPPER, int... I>
inline Floats exchange(Floats a, Floats b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      a, b, (UPPER ? (I & DISTANCE ? LANES + I : I + DISTANCE) : (I & DISTANCE ? LANES + I - DISTANCE : I))...);
}

template <int DISTANCE>
inline void transpose_blocks(Floats (&rows)[LANES]) {
  using Lanes = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & DISTANCE) continue;
    const Floats a = rows[i], b = rows[i + DISTANCE];
    rows[i] = exchange<DISTANCE, false>(a, b, Lanes{});
    rows[i + DISTANCE] = exchange<DISTANCE, true>(a, b, Lanes{});
  }
  if constexpr (DISTANCE > 1) transpose_blocks<DISTANCE / 2>(rows);
}
}  // namespace detail

// In-place transpose of LANES rows: swaps the off-diagonal halves, then those of the quarters, and so on.
inline void transpose(Floats (&rows)[LANES]) { detail::transpose_blocks<LANES / 2>(rows); }

}  // namespace nlpfast::NLPFAST_ISA
