// The 16-bit floating types, bfloat16 and float16, and their conversion to and from registers of floats.
//
// Results are rounded to nearest, ties to even; the instructions of AVX512_BF16 take subnormal bfloat16 for zero. A
// pair is two bfloat16 in the 32 bits of a lane, the lower-numbered one in the low half: what the dot-product
// instructions of AVX512_BF16 and AMX multiply at once.
#pragma once

#include "dtype.h"
#include "simd.h"

namespace nlpfast::NLPFAST_ISA {

struct Bfloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

inline Floats load(const Bfloat16* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Floats)(__builtin_convertvector(h, UInts) << 16);
}

#if defined(__AVX512BF16__)
inline Halves to_bfloat16(Floats x) { return (Halves)_mm512_cvtneps_pbh((__m512)x); }
#else
inline Halves to_bfloat16(Floats x) {
  const UInts bits = (UInts)x, rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  // Rounding could carry a NaN into infinity: it stays a NaN by its quiet bit.
  return __builtin_convertvector(x == x ? rounded : bits >> 16 | 0x40, Halves);
}
#endif

inline void store(Bfloat16* p, Floats x) {
  const Halves h = to_bfloat16(x);
  std::memcpy(p, &h, sizeof h);
}

inline Floats load(const Float16* p) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const UInts bits = __builtin_convertvector(h, UInts), magnitude = bits & 0x7fff;
  // The exponent moves from bias 15 to bias 127 by a product, which also makes subnormals normal.
  const Floats finite = (Floats)(magnitude << 13) * 0x1p112f;
  const UInts value = magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : (UInts)finite;
  return (Floats)(value | (bits & 0x8000) << 16);
#endif
}

inline void store(Float16* p, Floats x) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const UInts bits = (UInts)x, sign = bits & 0x80000000u, magnitude = bits ^ sign;
  const UInts normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1)) >> 13;
  // Adding 0.5 leaves the multiple of 2^-24 that a subnormal is in the low bits, rounded.
  const UInts subnormal = (UInts)((Floats)magnitude + 0.5f) - 0x3f000000u;
  const UInts special = magnitude > 0x7f800000u ? UInts{} + 0x7e00u : UInts{} + 0x7c00u;
  UInts half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? special : half;
  const Halves h = __builtin_convertvector(half | sign >> 16, Halves);
  std::memcpy(p, &h, sizeof h);
#endif
}

// The first n elements of a register, or all; the other lanes are zeros, and nothing behind is read or written.
template <class Element>
inline Floats load_first(const Element* p, int64_t n) {
  if (n >= LANES) return load(p);
  Element rest[LANES] = {};
  std::memcpy(rest, p, n * sizeof(Element));
  return load(rest);
}

template <class Element>
inline void store_first(Element* p, Floats x, int64_t n) {
  if (n >= LANES) return store(p, x);
  Element rest[LANES];
  store(rest, x);
  std::memcpy(p, rest, n * sizeof(Element));
}

// One element, through a register whose other lanes are zeros.
template <class Element>
inline float to_float(Element x) {
  Element lanes[LANES] = {x};
  return load(lanes)[0];
}

template <class Element>
inline Element from_float(float x) {
  Element lanes[LANES];
  store(lanes, broadcast(x));
  return lanes[0];
}

inline float to_float(float x) { return x; }

template <>
inline float from_float<float>(float x) {
  return x;
}

// Calls f with a value of the element type of a floating dtype.
template <class F>
inline auto with_element(Dtype dtype, F&& f) {
  if (dtype == Dtype::bfloat16) return f(Bfloat16{});
  if (dtype == Dtype::float16) return f(Float16{});
  return f(float{});
}

// Whether bfloat16 products are computed on pairs; elsewhere 16-bit inputs are converted to floats first.
#if defined(__AVX512BF16__)
constexpr bool HAS_PAIRS = true;

typedef uint16_t Shorts __attribute__((vector_size(4 * LANES)));

// Lane c of the result: (a[2c], a[2c + 1]) in the lower lanes, then the same of b.
inline Floats pairs_of_columns(Floats a, Floats b) { return (Floats)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a); }

namespace detail {
template <int... I>
inline Shorts zip(Shorts a, Shorts b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? 2 * LANES + I / 2 : I / 2)...);
}
template <int... I>
inline Shorts zip_upper(Shorts a, Shorts b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, (I % 2 ? 3 * LANES + I / 2 : LANES + I / 2)...);
}
template <int... I>
inline Shorts zip_halves(Shorts a, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, a, (I % 2 ? LANES + I / 2 : I / 2)...);
}
using ShortLanes = std::make_integer_sequence<int, 2 * LANES>;
}  // namespace detail

// Lane c of the result: (a[c], b[c]).
inline Floats pairs_of_rows(Floats a, Floats b) {
  return (Floats)detail::zip_halves((Shorts)pairs_of_columns(a, b), detail::ShortLanes{});
}

// The same for two rows of 2 * LANES bfloat16: columns [0, LANES) and [LANES, 2 * LANES).
inline Floats zip_low(Floats a, Floats b) { return (Floats)detail::zip((Shorts)a, (Shorts)b, detail::ShortLanes{}); }
inline Floats zip_high(Floats a, Floats b) {
  return (Floats)detail::zip_upper((Shorts)a, (Shorts)b, detail::ShortLanes{});
}

// sum + the two products of each lane's pairs.
inline Floats add_products(Floats sum, Floats x, Floats y) {
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
#else
constexpr bool HAS_PAIRS = false;
// Declared only: templates name them and are never instantiated with pairs here.
Floats pairs_of_columns(Floats a, Floats b);
Floats pairs_of_rows(Floats a, Floats b);
Floats zip_low(Floats a, Floats b);
Floats zip_high(Floats a, Floats b);
Floats add_products(Floats sum, Floats x, Floats y);
#endif

}  // namespace nlpfast::NLPFAST_ISA
