// Matrix products of a warp, and the ways in which shared memory gets to them: mma.sync, ldmatrix, cp.async.
//
// A product of m16n8k16 takes A, 16 x 16, B, 16 x 8, and adds to C, 16 x 8 in float32. With g = lane / 4 and t = lane %
// 4 a lane has of
//
//     A  a[0], a[2]: row g, columns 2t, 2t + 1, and 8 more;  a[1], a[3]: row g + 8
//     B  b[0], b[1]: rows 2t, 2t + 1, and 8 more, column g
//     C  c[0], c[1]: row g, columns 2t, 2t + 1;  c[2], c[3]: row g + 8
//
// two 16-bit numbers in a register. So what C is rounded to is A of the next product, as it lies.
#pragma once

#include "cuda_device.h"

namespace nlpfast::cuda {

#ifdef NLPFAST_EMULATE_CUDA

template <class E>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  Operands own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  const auto half = [](uint32_t word, int high) {
    return to_float(E{static_cast<uint16_t>(high ? word >> 16 : word)});
  };
  struct Sums {
    float c[4];
  };
  const Sums sums = emulator::exchange<Operands, Sums>(ALL_LANES, own, [&](auto of) {
    Sums s{};
    for (int i = 0; i < 4; ++i) {
      const unsigned column = 2 * t + i % 2;
      for (unsigned k = 0; k < 16; ++k) {
        // lane 4 g + t of A has row g, lane 4 n + t of B column n
        const Operands x = of(4 * g + k % 8 / 2), y = of(4 * column + k % 8 / 2);
        s.c[i] += half(x.a[i / 2 + k / 8 * 2], k % 2) * half(y.b[k / 8], k % 2);
      }
    }
    return s;
  });
  for (int i = 0; i < 4; ++i) c[i] += sums.c[i];
}

// A place in shared memory, to which bytes can be added.
using SharedAddress = const char*;
inline SharedAddress shared_address(const void* p) { return static_cast<const char*>(p); }
inline void keep_in_register(SharedAddress) {}

// Loads four 8 x 8 matrices: lanes 8 m to 8 m + 7 have the addresses of the rows of matrix m.
inline void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  struct Rows {
    uint32_t r[4];
  };
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  const Rows rows = emulator::exchange<const void*, Rows>(ALL_LANES, row, [&](auto of) {
    Rows found;
    for (unsigned m = 0; m < 4; ++m) std::memcpy(&found.r[m], static_cast<const char*>(of(8 * m + g)) + 4 * t, 4);
    return found;
  });
  for (int m = 0; m < 4; ++m) r[m] = rows.r[m];
}

// The same of the transposed matrices.
inline void load_transposed(uint32_t (&r)[4], SharedAddress row) {
  struct Rows {
    uint32_t r[4];
  };
  const unsigned g = emulator::lane() / 4, t = emulator::lane() % 4;
  const Rows rows = emulator::exchange<const void*, Rows>(ALL_LANES, row, [&](auto of) {
    Rows found;
    for (unsigned m = 0; m < 4; ++m) {
      uint16_t pair[2];
      for (unsigned i = 0; i < 2; ++i)
        std::memcpy(&pair[i], static_cast<const char*>(of(8 * m + 2 * t + i)) + 2 * g, 2);
      found.r[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
    return found;
  });
  for (int m = 0; m < 4; ++m) r[m] = rows.r[m];
}

inline void copy_to_shared(void* to, const void* from, bool inside) { emulator::copy_later(to, from, !inside); }
inline void close_copies() { emulator::close_group(); }

template <int PENDING>
void wait_for_copies() {
  emulator::wait_for_copies(PENDING);
}

#else

using SharedAddress = uint32_t;
__device__ __forceinline__ SharedAddress shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Hides where it came from: the compiler would compute it anew wherever it is used.
__device__ __forceinline__ void keep_in_register(SharedAddress& p) { asm volatile("" : "+r"(p)); }

template <class E>
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (__is_same(E, Bfloat16))
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Loads four 8 x 8 matrices: lanes 8 m to 8 m + 7 have the addresses of the rows of matrix m.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// The same of the transposed matrices.
__device__ __forceinline__ void load_transposed(uint32_t (&r)[4], SharedAddress row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// 16 bytes, or zeros; they are there when they have been waited for, by the thread itself and then at a barrier.
__device__ __forceinline__ void copy_to_shared(void* to, const void* from, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(inside ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most PENDING of the closed groups are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif

}  // namespace nlpfast::cuda
