// Runs CUDA kernels on the CPU, one thread after the other, so that they are tested where there is no GPU.
//
// A thread of a block is a fiber: it runs until it waits for others, at a barrier or in an exchange between the lanes
// of a warp, and goes on when all have come. What a kernel computes is what a GPU computes, but for the last digits of
// exponentials; what cannot happen on a GPU is an error (a block too large, shared memory past its end or read before
// it is written, which is NaN, threads that wait for each other for ever), but for races: fibers take turns only where
// they wait. To show some of these, every other block runs its threads from the last to the first.
//
// Only what the kernels here use is there. Included by cuda_device.h.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace nlpfast::cuda::emulator {

constexpr unsigned WARP = 32, MAX_THREADS = 1024, MAX_GRID_YZ = 65535;
constexpr unsigned MAX_GRID_X = 2147483647u;
// What a block of sm_90 can have.
constexpr size_t MOST_SHARED = 232448;
constexpr size_t STACK = 256 << 10;
// Bytes after the shared memory, which a block must leave as they are.
constexpr size_t GUARD = 4096;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned alive = 0, mask = 0;
  uint64_t slots[WARP][4];
};

// 16 bytes on their way to shared memory.
struct Copy {
  void* to;
  const void* from;
  bool zero;
};

struct Fiber {
  ucontext_t context;
  dim3 index;
  unsigned number;
  bool done;
  Barrier* awaited;
  unsigned generation;
  std::vector<std::vector<Copy>> copies;  // the groups that are under way, and the one that is not closed yet
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<unsigned char> shared;
  Barrier barrier;
  unsigned alive = 0;
  size_t shared_bytes = 0;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  std::function<void()> kernel;
  std::string error;
  char* stacks = nullptr;
};

inline Machine& machine() {
  static thread_local Machine machine;
  return machine;
}

inline void yield() {
  Machine& m = machine();
  Fiber* self = m.current;
  swapcontext(&self->context, &m.scheduler);
  threadIdx = self->index;
}

inline void wait(Barrier& barrier, unsigned members) {
  Machine& m = machine();
  if (++barrier.arrived == members) {
    barrier.arrived = 0, ++barrier.generation;
    return;
  }
  m.current->awaited = &barrier, m.current->generation = barrier.generation;
  yield();
}

inline void release(Barrier& barrier, unsigned members) {
  if (barrier.arrived && barrier.arrived == members) barrier.arrived = 0, ++barrier.generation;
}

inline void run_fiber() {
  Machine& m = machine();
  m.kernel();
  Fiber* self = m.current;
  Warp& warp = m.warps[self->number / WARP];
  self->done = true;
  // a thread that has ended is not waited for
  release(m.barrier, --m.alive);
  release(warp.barrier, --warp.alive);
  setcontext(&m.scheduler);
}

inline void run_block(bool backwards) {
  Machine& m = machine();
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  m.fibers.resize(threads);
  m.warps.assign((threads + WARP - 1) / WARP, Warp{});
  // bytes of all ones are NaN in every type
  m.shared.assign(m.shared_bytes + GUARD, 0xff);
  m.barrier = {}, m.alive = threads;
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& f = m.fibers[i];
    f.number = i, f.done = false, f.awaited = nullptr;
    f.copies.assign(1, {});
    f.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
    ++m.warps[i / WARP].alive;
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = m.stacks + STACK * i, f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, run_fiber, 0);
  }
  for (bool running = true; running;) {
    bool progress = running = false;
    for (unsigned i = 0; i < threads; ++i) {
      Fiber& f = m.fibers[backwards ? threads - 1 - i : i];
      if (f.done) continue;
      running = true;
      if (f.awaited && f.awaited->generation == f.generation) continue;
      f.awaited = nullptr, m.current = &f, threadIdx = f.index, progress = true;
      swapcontext(&m.scheduler, &f.context);
      if (!m.error.empty()) throw std::runtime_error(std::exchange(m.error, ""));
    }
    if (running && !progress) throw std::runtime_error("threads wait for each other, and none can go on");
  }
}

// Ends the launch with an error; a fiber cannot throw.
inline void fail(const char* text) {
  machine().error = text;
  yield();
}

inline unsigned lane() { return machine().current->number % WARP; }

// Makes the values of the lanes in `mask` known to all of them, and calls `read` with them.
template <class T, class R = T, class F>
R exchange(unsigned mask, T value, F read) {
  static_assert(sizeof(T) <= sizeof(uint64_t[4]));
  Machine& m = machine();
  Warp& warp = m.warps[m.current->number / WARP];
  if (!(mask >> lane() & 1)) fail("a lane takes part in an exchange that it is not in the mask of");
  if (warp.barrier.arrived && warp.mask != mask) fail("the lanes of a warp exchange with different masks");
  warp.mask = mask;
  std::memcpy(warp.slots[lane()], &value, sizeof value);
  const unsigned members = std::popcount(mask);
  wait(warp.barrier, members);
  R result = read([&](unsigned source) {
    T other;
    std::memcpy(&other, warp.slots[source % WARP], sizeof other);
    return other;
  });
  wait(warp.barrier, members);
  return result;
}

// Copies arrive as late as they may: when they are waited for.
inline void copy_later(void* to, const void* from, bool zero) {
  machine().current->copies.back().push_back({to, from, zero});
}

inline void close_group() { machine().current->copies.emplace_back(); }

inline void wait_for_copies(size_t pending) {
  auto& groups = machine().current->copies;
  for (; groups.size() > pending + 1; groups.erase(groups.begin()))
    for (const Copy& copy : groups.front())
      copy.zero ? std::memset(copy.to, 0, 16) : std::memcpy(copy.to, copy.from, 16);
}

// Launches that are written down instead of run, for tests of what launches them at sizes that would take for ever.
struct Recorder {
  bool on = false;
  std::vector<uint64_t> launched;  // of each the grid's three sizes, the block's three, and bytes of shared memory
};

inline Recorder& recorder() {
  static Recorder recorder;
  return recorder;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, A... arguments) {
  Machine& m = machine();
  const unsigned threads = block.x * block.y * block.z;
  if (!threads || threads > MAX_THREADS || !grid.x || grid.x > MAX_GRID_X || !grid.y || grid.y > MAX_GRID_YZ ||
      !grid.z || grid.z > MAX_GRID_YZ || shared > MOST_SHARED)
    throw std::runtime_error("no GPU can launch such a grid");
  if (recorder().on) {
    for (const uint64_t number : {uint64_t{grid.x}, uint64_t{grid.y}, uint64_t{grid.z}, uint64_t{block.x},
                                  uint64_t{block.y}, uint64_t{block.z}, uint64_t{shared}})
      recorder().launched.push_back(number);
    return;
  }
  if (!m.stacks)
    m.stacks = static_cast<char*>(
        mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  m.shared_bytes = shared;
  m.kernel = [=] { kernel(arguments...); };
  blockDim = block, gridDim = grid;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block((x + y + z) % 2);
        for (size_t i = shared; i < shared + GUARD; ++i)
          if (m.shared[i] != 0xff) throw std::runtime_error("a block writes shared memory past its end");
      }
}

}  // namespace nlpfast::cuda::emulator

// For ctypes: begins to record, or ends; and how many numbers there are, of which as many are written as there is room
// for.
extern "C" {
inline __attribute__((used, visibility("default"))) void nlpfast_record_launches(bool on) {
  nlpfast::cuda::emulator::recorder() = {on, {}};
}
inline __attribute__((used, visibility("default"))) size_t nlpfast_recorded(uint64_t* to, size_t room) {
  const auto& launched = nlpfast::cuda::emulator::recorder().launched;
  for (size_t i = 0; i < launched.size() && i < room; ++i) to[i] = launched[i];
  return launched.size();
}
}

inline void __syncthreads() {
  auto& m = nlpfast::cuda::emulator::machine();
  nlpfast::cuda::emulator::wait(m.barrier, m.alive);
}

inline void __syncwarp() {
  auto& m = nlpfast::cuda::emulator::machine();
  auto& warp = m.warps[m.current->number / nlpfast::cuda::emulator::WARP];
  warp.mask = 0xffffffffu;
  nlpfast::cuda::emulator::wait(warp.barrier, warp.alive);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned change) {
  const unsigned lane = nlpfast::cuda::emulator::lane();
  return nlpfast::cuda::emulator::exchange(mask, value, [=](auto of) { return of(lane ^ change); });
}

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  return nlpfast::cuda::emulator::exchange(mask, value, [=](auto of) { return of(source); });
}

inline unsigned __ballot_sync(unsigned mask, bool value) {
  return nlpfast::cuda::emulator::exchange<bool, unsigned>(mask, value, [=](auto of) {
    unsigned found = 0;
    for (unsigned lane = 0; lane < nlpfast::cuda::emulator::WARP; ++lane)
      if (mask >> lane & 1 && of(lane)) found |= 1u << lane;
    return found;
  });
}

// The lanes that have the same value.
inline unsigned __match_any_sync(unsigned mask, int value) {
  return nlpfast::cuda::emulator::exchange<int, unsigned>(mask, value, [=](auto of) {
    unsigned found = 0;
    for (unsigned lane = 0; lane < nlpfast::cuda::emulator::WARP; ++lane)
      if (mask >> lane & 1 && of(lane) == value) found |= 1u << lane;
    return found;
  });
}

inline int __popc(unsigned bits) { return std::popcount(bits); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
