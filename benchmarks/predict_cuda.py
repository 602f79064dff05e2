"""Predict how long the compiled CUDA kernels take on an H200, from what they move, compute and execute.

`python -m benchmarks.predict_cuda [FILE]` prints the prediction, or writes it as a Markdown file. No device
is needed, but the CUDA library is: registers and instructions are those of its code for sm_90a. A kernel
takes the longest of its counts over RATES, and a launch; its goal, where it has one, stands beside that.

Bytes are those that must be moved. Products and exponentials are those of whole tiles. Instructions are a
warp's: the code of each loop times how often warps go through it (see cuda_resources.executed); both sides of
branches are counted, those for tiles with hidden keys too, so that they are rather too many. Cross entropy's
are counted in its listing by hand, because most of its code is for the one piece of a row that holds the
target; so are those that group pairs, whose loops are of different warps. In flight: the bytes of a
multiprocessor's loads that can be under way at a time; to keep the memory busy it takes about 25 KB.

Left out is what makes kernels slower, as in predict_attention: the counts overlap, but not perfectly.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from nlpfast import native
from nlpfast.files import replacing

from . import bench_alignment_loss, bench_attention, bench_cross_entropy, report
from .cuda_resources import Kernel, executed, listings, resources
from .predict_attention import LAUNCH_SECONDS, RATES

ARCH = "sm_90a"
RATES = {
    **{name: RATES[name] for name in ("memory", "exp")},
    "products": (620e12, "operations", "an assumption: mma.sync at 63 % of the peak of wgmma"),
    "instructions": (0.93e12, "a warp's instructions", "four a clock on each of 132 multiprocessors"),
    "L2": (5.5e12, "bytes", "an assumption: read from the L2 cache"),
}
REGISTERS, THREADS, BLOCKS, SHARED = 65536, 2048, 32, 233472
# Of cross entropy's listing: for eight numbers of 16 bits maximum, smoothing, sum and gradient; of 32 for
# four; and a row.
OF_PIECE, OF_ROW = {2: 18 + 17 + 32 + 36, 4: 10 + 9 + 12 + 14}, 300
# Where rows begin anywhere: shifted when read, exchanged and shifted to be written.
READ_ANYWHERE, WRITTEN_ANYWHERE = 32, 47
HEADINGS = (
    *(
        "case",
        "kernel",
        "registers",
        "shared KB",
        "warps",
        "in flight KB",
        "MB",
        "GFLOP",
        "10^6 instructions",
    ),
    *("limited by", "floor us", "predicted us", "goal"),
)
GOALS = {
    "loss": ">= 90 % of copy speed: at most {:.1f} us",
    "forward": "with backward >= 1.6 x the best SDPA",
    "backward": ">= 1.8 x the best SDPA",
    "alignment": "with attention <= 1.25 x attention: all of it at most {:.1f} us",
}


class Launch(NamedTuple):
    """A launch as it is counted.

    Attributes:
        case: its name.
        kernel: source, name, type of the elements and numbers of the kernel.
        warps: of a block.
        shared: bytes of a block.
        bytes: that are moved.
        rounds: how often warps go through the code outside of loops, in the first loop, in the one within it
            and so on, over all warps.
        in_flight: bytes of a block's loads that are under way at a time.
        products: operations.
        exps: exponentials.
        cached: bytes that are read from the L2 cache, where they are far more than those that must be moved.
        instructions: those of each of the rounds, if they are not those of the code.
        goal: of GOALS, "" for none.
        limit: seconds that the goal allows.
        dropout: the code of dropout is executed too.
        masked: rows have a mask.
    """

    case: str
    kernel: tuple[str, str, str, tuple[int, ...]]
    warps: int
    shared: int
    bytes: float
    rounds: tuple[float, ...]
    in_flight: float
    products: float = 0.0
    exps: float = 0.0
    cached: float = 0.0
    instructions: tuple[float, ...] | None = None
    goal: str = ""
    limit: float = math.nan
    dropout: bool = False
    masked: bool = False

    def resident(self) -> int:
        """Return how many blocks a multiprocessor has."""
        registers = -(-_registers(self.kernel) // 8) * 8
        of_registers = REGISTERS // (registers * 32 * self.warps)
        return min(of_registers, SHARED // (self.shared + 1024), THREADS // (32 * self.warps), BLOCKS)

    def terms(self) -> dict[str, float]:
        """Return the seconds that each of RATES would take alone."""
        each = (
            _executed(self.kernel, self.dropout, self.masked)
            if self.instructions is None
            else self.instructions
        )
        numbers = {
            "memory": self.bytes,
            "products": self.products,
            "exp": self.exps,
            "L2": self.cached,
            "instructions": sum(n * times for n, times in zip(each, self.rounds, strict=False)),
        }
        return {name: number / RATES[name][0] for name, number in numbers.items()}

    def seconds(self) -> float:
        """Return how long it takes."""
        return max(self.terms().values()) + LAUNCH_SECONDS


def _name(kernel: Kernel) -> tuple[str, str, str, tuple[int, ...]]:
    return kernel.source, kernel.name, "".join(kernel.types[:1]), kernel.numbers


@cache
def _all_registers() -> dict[tuple[Any, ...], int]:
    return {_name(kernel): used["REG"] for kernel, used in resources() if kernel.arch == ARCH}


def _registers(kernel: tuple[Any, ...]) -> int:
    return _all_registers()[kernel]


@cache
def _codes() -> dict[tuple[Any, ...], str]:
    return {_name(kernel): code for kernel, code in listings(ARCH)}


def _executed(kernel: tuple[Any, ...], dropout: bool, masked: bool) -> tuple[int, ...]:
    return tuple(executed(_codes()[kernel], dropout, masked))


def _type(dtype: torch.dtype) -> str:
    return {torch.float32: "f", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}[dtype]


def losses(case: bench_cross_entropy.Case) -> Iterator[Launch]:
    """Yield the launch of cross entropy's forward pass, which writes the gradient."""
    (N, V), size = case.shape, case.dtype.itemsize
    per = 16 // size
    anywhere = V % per != 0
    sizes = ((128, 1), (128, 4), (256, 8), (512, 8), (1024, 8))
    whole = next((x for x in sizes if x[0] * x[1] * per >= V), None)
    threads, together = whole or (1024, 4)
    numbers = (per, threads, *(() if whole is None else (together,)), int(anywhere))
    copy = 2 * N * V * size / RATES["memory"][0]
    of_piece = OF_PIECE[size]
    if anywhere:
        of_piece += READ_ANYWHERE * (2 if whole is None else 1) + WRITTEN_ANYWHERE
    yield Launch(
        case.name,
        ("cross_entropy", "long_row" if whole is None else "whole_row", _type(case.dtype), numbers),
        warps=threads // 32,
        shared=272 + anywhere * together * threads,
        bytes=2 * N * V * size + 25 * N,
        rounds=(N * threads / 32,),
        in_flight=min(V * size, threads * 16 * together),
        exps=2 * N * V,
        instructions=(of_piece * V / per / threads + OF_ROW,),
        goal="loss",
        limit=copy / 0.9,
    )


def attention(case: bench_attention.Case, pairs: bool = False) -> Iterator[Launch]:
    """Yield the launches of attention over few keys, forward and backward."""
    B, H, L, S, D = case.shape
    rows, keys, kind = B * H * L * D * 2, B * H * S * D * 2, _type(case.dtype)
    K, chunks = 64 if S <= 64 else 128, math.ceil(S / 128)
    share = 0.5 * (1 + 16 / S) if case.causal else 1.0
    multiplied, dropped = B * H * L * K * chunks * share, case.dropout > 0
    tiles = B * H * math.ceil(L / 16)
    yield Launch(
        case.name,
        ("attention", "forward" if chunks == 1 else "forward_chunked", kind, (D, K, 4)),
        warps=4,
        shared=(4 * K + 64) * D * 2,
        bytes=2 * rows + 2 * keys + 4 * B * H * L,
        rounds=(0, B * H * 4, tiles) if chunks == 1 else (tiles, tiles * chunks * share),
        in_flight=2 * K * D * 2 + 64 * D * 2,
        products=4 * multiplied * D,
        exps=multiplied,
        goal="forward",
        dropout=dropped,
        masked=case.causal,
    )
    # more than 128 keys go by in turn, and the gradients of queries are added up in memory
    one, blocks, heads = L <= K and chunks == 1, math.ceil(L / K) * chunks, B * H * K / 16
    pairs = pairs and K == 64 and one
    yield Launch(
        case.name,
        ("attention", "backward", kind, (D, K, 2, int(one), int(pairs), int(chunks > 1))),
        warps=K // 16,
        shared=(8 * K * D + 2 * K * K) * 2 + pairs * K * (K + 8) * 4,
        bytes=(3 if chunks == 1 else 3 * chunks + 2 * (chunks - 1)) * rows + 4 * keys,
        rounds=(
            # a loop over chunks, where there are several, within that over heads; then those over queries
            *((0, heads) if chunks == 1 else (0, heads, heads * chunks)),
            *(heads * blocks, heads * blocks * (K / 16 if K > 64 else S / 8)),
        ),
        in_flight=4 * K * D * 2,
        products=10 * multiplied * D,
        exps=multiplied,
        goal="backward",
        dropout=dropped,
        masked=case.causal,
    )


def alignment(case: bench_alignment_loss.Case) -> Iterator[Launch]:
    """Yield the launches of an alignment loss with a pair a query, and of its attention."""
    B, H, L, S, D = case.shape
    n = H if case.heads is None else case.heads
    alone = bench_attention.Case(case.shape, dtype=case.dtype)
    limit = 1.25 * sum(x.seconds() for x in attention(alone))
    P, size, kind = B * L, case.dtype.itemsize, _type(case.dtype)
    pieces = -(-D * size // 16)
    together = max(1, 32 // pieces)
    yield from (x._replace(case=case.name, goal="") for x in attention(alone, pairs=True))
    yield Launch(
        case.name,
        ("alignment_loss", "forward", kind, (1,)),
        warps=4,
        shared=0,
        bytes=P * n * (2 * D * size + 8) + 24 * P,
        rounds=(P, P * -(-n // together), P * -(-n // together)),
        in_flight=4 * 2 * 32 * 16,
        goal="alignment",
        limit=limit,
    )
    yield Launch(
        case.name,
        ("alignment_loss", "group_pairs", "", ()),
        warps=8,
        shared=(L + S + 8) * 4,
        bytes=24 * P + 16 * P,
        # each block reads every pair
        cached=24 * P * B,
        # four pairs of a thread at a time; then a warp orders an entry's pairs by query, another by key, in
        # two passes and one over the rows: as the listing has it
        rounds=(8 * B, 8 * B * math.ceil(P / 1024), B * (4 * math.ceil(P / B / 32) + (L + S) / 32)),
        instructions=(350.0, 125.0, 45.0),
        in_flight=256 * 4 * 24,
    )


def predictions() -> list[Launch]:
    """Return the launches of the cases of a GPU that the compiled kernels serve."""
    found: list[Launch] = []
    for loss in bench_cross_entropy.CUDA_CASES:
        found += losses(loss)
    for case in bench_attention.CUDA_CASES:
        if case.shape[3] <= 512 and case.fill == 1.0:
            found += attention(case)
    for supervised in bench_alignment_loss.CUDA_CASES:
        if supervised.dtype != torch.float32:
            found += alignment(supervised)
    return found


def page() -> str:
    """Return the predictions as a Markdown page."""
    said = [f"- {name}: {rate:.3g} {what} a second, {source}" for name, (rate, what, source) in RATES.items()]
    parts = (
        "# Predicted times of the compiled CUDA kernels on an H200",
        "Written by `python -m benchmarks.predict_cuda`, whose text says how. Nothing is measured.\n"
        "Floor: the bytes alone. Warps: of a multiprocessor at a time.",
        "\n".join([*said, f"- a launch: {LAUNCH_SECONDS * 1e6:g} us, an assumption"]),
        report.markdown([HEADINGS, *map(_cells, predictions())]),
    )
    return "\n\n".join(parts) + "\n"


def _cells(launch: Launch) -> list[str]:
    terms, blocks = launch.terms(), launch.resident()
    limit = max(terms, key=terms.__getitem__)
    _, name, kind, numbers = launch.kernel
    return [
        launch.case,
        f"{name} {kind} {', '.join(map(str, numbers))}".strip(),
        *(str(_registers(launch.kernel)), f"{launch.shared / 1024:.0f}", str(blocks * launch.warps)),
        f"{blocks * launch.in_flight / 1024:.0f}",
        f"{launch.bytes / 1e6:.3g}",
        f"{launch.products / 1e9:.3g}",
        f"{terms['instructions'] * RATES['instructions'][0] / 1e6:.3g}",
        limit,
        f"{terms['memory'] * 1e6:.1f}",
        f"{launch.seconds() * 1e6:.1f}",
        GOALS[launch.goal].format(launch.limit * 1e6) if launch.goal else "-",
    ]


def main(arguments: Sequence[str]) -> int:
    """Print the page, or write it to the file that is named; without the CUDA library nothing but why."""
    if native.cuda_status() != "ok":
        print(f"no prediction of the CUDA kernels: {native.cuda_status()}", file=sys.stderr)
        return 0
    if arguments:
        with replacing(arguments[0]) as file:
            file.write(page().encode())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
