"""What the CUDA library launches at sizes that an emulator cannot run: launches are written down instead."""

import ctypes
import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from benchmarks import overhead

EMULATED = True
LIBRARY = os.environ.get("EMULATED_CUDA")
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="make test-cuda emulates a device")
# Of the grid in its first dimension and the others, and shared memory of a block on sm_80, in bytes.
MOST_BLOCKS, MOST_ELSEWHERE, SHARED = 2**31 - 1, 65_535, 163 * 1024
HALF = torch.float16


class Launch(NamedTuple):
    """A grid and a block, by dimensions, and the shared memory of a block."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]


def launches(call: Callable[[], object]) -> list[Launch]:
    """What a call launches; nothing is computed."""
    library = ctypes.CDLL(LIBRARY)
    library.nlpfast_recorded.restype = ctypes.c_size_t
    library.nlpfast_record_launches(True)
    try:
        call()
        numbers = (ctypes.c_uint64 * 700)()
        count = library.nlpfast_recorded(numbers, ctypes.c_size_t(700))
    finally:
        library.nlpfast_record_launches(False)
    rows = [list(numbers[i : i + 7]) for i in range(0, count, 7)]
    found = [Launch(tuple(row[:3]), tuple(row[3:6]), row[6]) for row in rows]  # type: ignore[arg-type]
    for launch in found:
        assert launch.grid[0] <= MOST_BLOCKS and max(launch.grid[1:]) <= MOST_ELSEWHERE
        assert launch.threads <= 1024 and launch.threads % 32 == 0 and launch.shared <= SHARED
    return found


def heads(B: int, H: int, L: int, D: int) -> torch.Tensor:
    """As many as one wants, all of them in one place."""
    return torch.zeros(1, 1, L, D, dtype=HALF).expand(B, H, L, D)


@pytest.mark.parametrize("S", [1, 64, 65, 128])
@pytest.mark.parametrize("D", [32, 64])
def test_attention_goes_from_head_to_head(S: int, D: int) -> None:
    """A grid has no more blocks than the device has room for, however many heads there are."""
    q, k = heads(30_000, 4, 3, D), heads(30_000, 4, S, D)
    nothing = (None, None, None, None)
    (launch,) = launches(
        lambda: torch.ops.nlpfast.cuda_attention_forward(q, k, k, *nothing, 3, S, None, 0.0, 0, 1.0, q)
    )
    keys = 64 if S <= 64 else 128
    assert launch.threads == 128 and launch.shared == (4 * keys + 64) * D * 2
    assert 1 <= launch.grid[0] <= 232_448 // launch.shared and launch.grid[1:] == (1, 1)


def test_many_keys_have_a_block_for_64_queries() -> None:
    q, k = heads(30_000, 4, 130, 64), heads(30_000, 4, 129, 64)
    nothing = (None, None, None, None)
    (launch,) = launches(
        lambda: torch.ops.nlpfast.cuda_attention_forward(q, k, k, *nothing, 130, 129, None, 0.0, 0, 1.0, q)
    )
    assert launch.grid == (30_000 * 4 * 3, 1, 1) and launch.threads == 128
    assert launch.shared == (4 * 128 + 64) * 64 * 2


def test_too_many_heads_are_refused() -> None:
    q = heads(2**20, 2**12, 1, 32)
    with pytest.raises(RuntimeError, match="too many heads"):
        launches(
            lambda: torch.ops.nlpfast.cuda_attention_forward(
                q, q, q, None, None, None, None, 1, 1, None, 0.0, 0, 1.0, q
            )
        )


@pytest.mark.parametrize(
    ("V", "dtype", "threads"),
    [(8, torch.float32, 128), (4096, torch.bfloat16, 128), (32000, torch.bfloat16, 512), (70001, HALF, 1024)],
)
def test_cross_entropy_has_a_block_a_row(V: int, dtype: torch.dtype, threads: int) -> None:
    rows = 100_000
    x = torch.zeros(1, 1, V, dtype=dtype).expand(1, rows, V)
    target = torch.zeros(1, rows, dtype=torch.int64)
    options = (-100, -1, 1.0, 0.0)
    (launch,) = launches(
        lambda: torch.ops.nlpfast.cuda_cross_entropy_forward(x, target, *options, None, None)
    )
    assert launch.grid == (rows, 1, 1) and launch.threads == threads


@pytest.mark.parametrize(("C", "rows_of_a_block"), [(8, 32), (256, 32), (768, 8), (2048, 8)])
def test_add_layer_norm_has_groups_of_eight_rows(C: int, rows_of_a_block: int) -> None:
    N = 3_000_003 if C == 8 else 80_001
    x, weight = torch.zeros(N, C), torch.ones(C)
    (launch,) = launches(
        lambda: torch.ops.nlpfast.cuda_add_layer_norm_forward(
            x, x, weight, None, None, 0, 1e-5, torch.float32
        )
    )
    assert launch.grid == (-(-N // rows_of_a_block), 1, 1)


def test_alignment_has_a_warp_a_pair_and_a_block_an_entry() -> None:
    B, L, S, P = 70_000, 3, 5, 1_000_001
    q, k = heads(B, 2, L, 32), heads(B, 2, S, 32)
    lse, pairs = torch.zeros(B, 2, L), torch.zeros(P, 3, dtype=torch.int64)
    (forward,) = launches(
        lambda: torch.ops.nlpfast.cuda_alignment_loss_forward(q, k, lse, pairs, [0, 1], 1.0)
    )
    assert forward.grid == (-(-P // 4), 1, 1) and forward.threads == 128
    (group,) = launches(lambda: torch.ops.nlpfast.cuda_group_pairs(pairs, B, L, S))
    assert group.grid == (B, 1, 1) and group.shared == (L + S + group.threads // 32) * 4
    (largest,) = launches(lambda: torch.ops.nlpfast.cuda_hard_alignment(q, k, lse, None, [0], 1.0))
    assert largest.grid == (-(-B // 4), 1, 1)


def test_operations_whose_calls_are_timed_are_a_launch_each() -> None:
    calls = overhead.operations("cpu")
    found = {name: len(launches(call)) for name, call in calls.items()}
    assert found == {name: 0 if name.startswith(overhead.PYTORCH) else 1 for name in calls}
