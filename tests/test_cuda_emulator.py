"""The emulator of CUDA that kernels are tested with: what it computes, and the mistakes that it finds."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = r"""
#include "cuda_device.h"

#include <cstdio>

using namespace nlpfast::cuda;

// Adds up the numbers of its threads, and what other blocks have written is no concern of it.
void sums(float* out) {
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float x[2] = {static_cast<float>(threadIdx.x + 1000 * blockIdx.x), static_cast<float>(threadIdx.x)};
  over_block<Add>(x, scratch);
  float largest[1] = {-static_cast<float>(threadIdx.x)};
  over_block<Maximum>(largest, scratch);
  if (threadIdx.x == blockDim.x - 1) out[blockIdx.x] = x[0] + largest[0], out[gridDim.x] = x[1];
}

void lanes(int* out) {
  out[threadIdx.x] = __shfl_sync(ALL_LANES, static_cast<int>(threadIdx.x), (threadIdx.x + 1) % 32);
}

// Half of the threads never come to the barrier, but end: a GPU does not wait for them.
void some_end() {
  if (threadIdx.x % 2) return;
  __syncthreads();
}

void deadlock() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __shfl_xor_sync(ALL_LANES, 1, threadIdx.x == 40 ? (__syncthreads(), 1) : 1);
}

void wrong_mask() { __shfl_xor_sync(0xffffu, 1, 1); }
void two_masks() { __shfl_xor_sync(threadIdx.x == 3 ? 0xfu : 0xfffffffu, 1, 1); }
void past_the_end() { shared_memory()[16 + threadIdx.x] = 1; }

void unwritten(float* out) { *out = reinterpret_cast<float*>(shared_memory())[0]; }

// Without a barrier thread 0 reads what thread 1 has written, or has not.
void race(int* out) {
  int* shared = reinterpret_cast<int*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) out[blockIdx.x] = shared[1];
}

template <class E>
void round_trip() {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const E x{static_cast<uint16_t>(bits)};
    const float value = to_float(x);
    if (value == value && from_float<E>(value).bits != bits) std::printf("%x ", bits);
    Piece<E, 8> piece{};
    piece.set(5, value), piece.set(4, 1.0f);
    piece.change([](float y) { return y; });
    const bool kept = piece.get(5) == value && piece.get(4) == 1.0f && piece.get(6) == 0.0f;
    if (value == value && !kept) std::printf("%x ", bits);
  }
  std::printf("%g %g", to_float(from_float<E>(1.00390625f)), to_float(from_float<E>(NAN)));
}

int main(int, char** arguments) {
  const std::string name = arguments[1];
  float out[8] = {};
  int numbers[64] = {};
  try {
    if (name == "sums") emulator::launch(&sums, {3}, {256}, 256, out);
    if (name == "lanes") emulator::launch(&lanes, {1}, {64}, 0, numbers);
    if (name == "some_end") emulator::launch(&some_end, {2}, {64}, 0);
    if (name == "deadlock") emulator::launch(&deadlock, {1}, {64}, 0);
    if (name == "wrong_mask") emulator::launch(&wrong_mask, {1}, {32}, 0);
    if (name == "two_masks") emulator::launch(&two_masks, {1}, {28}, 0);
    if (name == "past_the_end") emulator::launch(&past_the_end, {1}, {16}, 31);
    if (name == "to_the_end") emulator::launch(&past_the_end, {1}, {16}, 32);
    if (name == "unwritten") emulator::launch(&unwritten, {1}, {1}, 4, out);
    if (name == "race") emulator::launch(&race, {2}, {2}, 8, numbers);
    if (name == "large_block") emulator::launch(&some_end, {1}, {1025}, 0);
    if (name == "large_grid") emulator::launch(&some_end, {1, 65536}, {32}, 0);
    if (name == "large_shared") emulator::launch(&some_end, {1}, {32}, 232449);
    if (name == "no_block") emulator::launch(&some_end, {0}, {32}, 0);
    if (name == "bfloat16") round_trip<Bfloat16>();
    if (name == "float16") round_trip<Float16>();
  } catch (const std::exception& error) {
    std::printf("%s", error.what());
  }
  if (name == "sums" || name == "unwritten")
    for (int i = 0; i < 4; ++i) std::printf("%g ", out[i]);
  if (name == "lanes") std::printf("%d %d %d %d", numbers[0], numbers[31], numbers[32], numbers[63]);
  if (name == "race") std::printf("%d %d", numbers[0], numbers[1]);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "program.cpp").write_text(PROGRAM)
    compiler = shutil.which("c++")
    assert compiler is not None
    options = ["-std=c++20", "-O1", "-DNLPFAST_EMULATE_CUDA", f"-I{ROOT / 'csrc'}", "-o", "program"]
    done = subprocess.run([compiler, *options, "program.cpp"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "program"


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        # numbers of 256 threads, and 1,000 of each thread in later blocks
        ("sums", "32640 288640 544640 32640"),
        ("lanes", "1 0 33 32"),
        ("some_end", ""),
        ("deadlock", "threads wait for each other, and none can go on"),
        ("wrong_mask", "a lane takes part in an exchange that it is not in the mask of"),
        ("two_masks", "the lanes of a warp exchange with different masks"),
        ("past_the_end", "a block writes shared memory past its end"),
        ("to_the_end", ""),
        ("large_block", "no GPU can launch such a grid"),
        ("large_grid", "no GPU can launch such a grid"),
        ("large_shared", "no GPU can launch such a grid"),
        ("no_block", "no GPU can launch such a grid"),
        # ties go to the even neighbour
        ("bfloat16", "1 nan"),
        ("float16", "1.00391 nan"),
    ],
)
def test_what_a_launch_does(name: str, printed: str, program: Path) -> None:
    done = subprocess.run([program, name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.strip().replace("-nan", "nan") == printed, done.stderr


def test_what_is_not_written_is_not_a_number(program: Path) -> None:
    printed = subprocess.run([program, "unwritten"], capture_output=True, text=True, check=True).stdout
    assert "nan" in printed.split()[0]


def test_a_missing_barrier_shows_in_one_order_or_the_other(program: Path) -> None:
    printed = subprocess.run([program, "race"], capture_output=True, text=True, check=True).stdout.split()
    assert printed == ["-1", "1"]
