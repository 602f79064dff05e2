"""Predict how long the Triton kernels of attention take on an H200, from what they move and compute.

`python -m benchmarks.predict_attention [FILE]` prints the prediction, or writes it as a Markdown file. No GPU
is needed: the backend gets tensors that hold nothing, its launches are written down instead of made, and the
loops of each kernel are followed tile by tile, as CONFIGS has the tiles. A kernel takes the longest of five
counts over their RATES, and a launch.

What is read for the first time comes from device memory, and what is written goes there. What is read again,
and sums that come and go between two tiles of keys, stay in the L2 cache if it holds them for all heads in
work at a time, and count as device memory if not. Matrix products, exponentials and calls of Philox are those
of whole tiles, also of their masked parts.

Left out is what makes kernels slower: the five overlap, but not perfectly; loads are waited for; addresses,
masks, rounding and sums over rows are arithmetic too; the last wave of programs is not full; with dropout a
launch draws the seed. And what makes them faster: what L1 holds, and L2 from the kernel before.

Legend: H heads, L queries, S keys, D head size; M queries and N keys of a tile; i queries, j keys.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from nlpfast.files import replacing
from nlpfast.ops.attention import triton_launch

from . import bench_attention, bench_varlen_attention, report

# In a second, and where the number is from.
RATES = {
    "memory": (4.3e12, "bytes", "read plus written by a large copy, measured on an H200"),
    "L2": (5.5e12, "bytes", "an assumption"),
    "products": (790e12, "operations", "a large bfloat16 matrix product, measured on an H200"),
    "exp": (3.7e12, "exponentials", "16 a clock on each of 132 multiprocessors"),
    "philox": (0.13e12, "calls", "an assumption: 110 integer instructions each, 64 a clock on each of them"),
}
LAUNCH_SECONDS, L2_BYTES, MULTIPROCESSORS = 2e-6, 60e6, 132
# An assumption: a thread takes all the registers that it can get, 255 of 65536.
RESIDENT_WARPS = 8

CASE_HEADINGS = (
    *("case", "forward: floor us", "predicted", "ratio", "backward: floor us", "predicted", "ratio"),
    *("zeros us", "three kernels us", "times ours"),
)
KERNEL_HEADINGS = (
    *("case", "kernel", "tile", "programs", "memory MB", "L2 MB", "GFLOP", "10^9 exp", "10^6 Philox"),
    *("limited by", "us"),
)


class Entry(NamedTuple):
    """One sequence of a batch: its queries, its keys, and how many of these are no padding."""

    queries: int
    length: int
    keys: int


@dataclass(frozen=True)
class Walk:
    """A kernel as it goes through one head: its tiles, and what of a call makes a difference to it.

    Attributes:
        M, N, D: queries, keys and columns of a tile.
        row: bytes of a row of the tensors.
        whole: one tile holds all keys.
        saves: the maximum and the sum of a row are written.
    """

    M: int
    N: int
    D: int
    row: int
    causal: bool = False
    dropout: bool = False
    whole: bool = False
    saves: bool = False

    def seen(self, entry: Entry, i: int) -> int:
        """Return how many keys query i sees."""
        return min(i + 1, entry.keys) if self.causal else entry.keys

    def first(self, entry: Entry, j: int) -> int:
        """Return the first query of the first tile that sees key j; the first tile of keys visits all."""
        first = j if self.causal else 0
        if j > 0 and (j >= entry.keys or first >= entry.queries):
            return entry.queries
        return first // self.M * self.M


# Bytes that are `read` for the first time, read `again` (also written again), `written`, and those that are
# `kept` to be read again; operations of matrix `products`; calls of `exp` and `philox`.
Count = Counter[str]


def _add_scores(count: Count, walk: Walk, products: int, tiles: int = 1) -> None:
    """Add the arithmetic of some tiles of scores, each with so many matrix products."""
    count["products"] += tiles * products * 2 * walk.M * walk.N * walk.D
    count["exp"] += tiles * walk.M * walk.N
    count["philox"] += tiles * walk.dropout * walk.M // 8 * walk.N


def _queries_first(walk: Walk, entry: Entry, products: int, read: int, each: int, written: int) -> Count:
    """Count a kernel whose programs own a tile of queries, with bytes for each query.

    Those of ``each`` are read with every tile of keys.
    """
    count, known = Count(kept=2 * walk.row * entry.keys), 0
    for i0 in range(0, entry.queries, walk.M):
        rows = min(walk.M, entry.queries - i0)
        most = walk.seen(entry, i0 + rows - 1)
        fresh, tiles = max(0, most - known), triton.cdiv(most, walk.N)
        known += fresh
        count["read"] += rows * (read + each) + fresh * 2 * walk.row
        count["again"] += rows * each * (tiles - 1) + (most - fresh) * 2 * walk.row
        count["written"] += rows * written
        _add_scores(count, walk, products, tiles)
    return count


def _keys_first(walk: Walk, entry: Entry, products: int, read: int, sums: int, written: int) -> Count:
    """Count a kernel whose programs own tiles of keys, with bytes for each query that a tile visits.

    A query's ``sums`` are written after all but its last tile of keys and read after all but its first;
    ``written`` is what it has at the end.
    """
    count = Count(kept=(read + sums) * entry.queries)
    most = walk.seen(entry, entry.queries - 1)
    for j0 in range(0, max(entry.length, 1), walk.N):
        count["read"] += 2 * walk.row * max(0, min(walk.N, most - j0))
        count["written"] += 2 * walk.row * min(walk.N, entry.length - j0)
        for i0 in range(walk.first(entry, j0), entry.queries, walk.M):
            rows = min(walk.M, entry.queries - i0)
            last = j0 + walk.N >= walk.seen(entry, i0 + rows - 1)
            count["read"] += rows * read * (j0 == 0)
            count["again"] += rows * ((read + sums) * (j0 > 0) + sums * (not last))
            count["written"] += rows * written * last
            _add_scores(count, walk, products)
    return count


def _fwd_kernel(walk: Walk, entry: Entry) -> Count:
    """Count a kernel that reads Q and writes O, lse and, where backward wants them, maximum and sum."""
    return _queries_first(walk, entry, 2, walk.row, 0, walk.row + 4 + 8 * walk.saves)


def _bwd_kernel(walk: Walk, entry: Entry) -> Count:
    """Count a kernel that reads Q and dO, unless the row is whole also O, maximum and sum, and sums dQ."""
    read, sums = (2 * walk.row, 0) if walk.whole else (3 * walk.row + 8, 4 * walk.D)
    return _keys_first(walk, entry, 5, read, sums, walk.row)


def _bwd_dq_kernel(walk: Walk, entry: Entry) -> Count:
    """Count a kernel that reads Q and dO, unless the row is whole also O, maximum and sum; leaves a shift."""
    read, each = (2 * walk.row, 0) if walk.whole else (3 * walk.row, 8)
    return _queries_first(walk, entry, 3, read, each, walk.row + 4)


def _bwd_dkdv_kernel(walk: Walk, entry: Entry) -> Count:
    """Count a kernel that reads Q, dO, maximum, sum and shift."""
    return _keys_first(walk, entry, 4, 2 * walk.row + 12, 0, 0)


KERNELS: dict[str, Callable[[Walk, Entry], Count]] = {
    each.__name__: each for each in (_fwd_kernel, _bwd_kernel, _bwd_dq_kernel, _bwd_dkdv_kernel)
}


class Launched(NamedTuple):
    """A launch that was written down, with its pointers by the kernel's names for them."""

    launch: triton_launch.Launch
    pointers: dict[str, torch.Tensor | None]

    def count(self, entries: Sequence[Entry]) -> Count:
        """Count what it does for the sequences of a batch."""
        constants, query = self.launch.constants, self.pointers["q_ptr"]
        assert query is not None
        walk = Walk(
            *(constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_D")),
            constants["D"] * query.dtype.itemsize,
            causal=constants["CAUSAL"] != 0,
            dropout=constants["DROPOUT"],
            whole=constants.get("WHOLE", False),
            saves=self.pointers.get("stats_ptr") is not None,
        )
        total = Count()
        for entry, times in Counter(entries).items():
            for what, number in KERNELS[self.launch.kernel.__name__](walk, entry).items():
                total[what] += number * times * query.shape[1]
        return total

    def terms(self, count: Count) -> dict[str, float]:
        """Return the seconds that each of RATES would take alone."""
        resident = MULTIPROCESSORS * max(1, RESIDENT_WARPS // self.launch.constants["num_warps"])
        fits = count["kept"] * min(1, resident / self.launch.programs) <= L2_BYTES
        once = count["read"] + count["written"]
        numbers = {
            "memory": once if fits else once + count["again"],
            "L2": once + count["again"],
            **{name: count[name] for name in ("products", "exp", "philox")},
        }
        return {name: number / RATES[name][0] for name, number in numbers.items()}


class Prediction(NamedTuple):
    """A case, the sequences of its batch, and its launches."""

    name: str
    case: Any
    entries: list[Entry]
    forward: list[Launched]
    backward: list[Launched]

    def seconds(self, launches: Sequence[Launched]) -> float:
        """Return how long some of the launches take, one after the other."""
        return sum(max(x.terms(x.count(self.entries)).values()) + LAUNCH_SECONDS for x in launches)


class Floor(NamedTuple):
    """Seconds that no kernel can beat, and those of the backward pass of FlashAttention 2 and cuDNN.

    Attributes:
        forward: Q, K, V in, O out and a float32 number a row; or products; or exponentials.
        backward: Q, K, V and dO in, dQ, dK and dV out, 14 bytes a number of 16 bits; or as above.
        zeros: gradients of keys that no query sees, which `backward` does not count.
        three_kernels: that prepare, compute and finish, and sum dQ in float32: 26 bytes a number of the
            queries and 8 of the keys, 34 where there are as many; or as above.
    """

    forward: float
    backward: float
    zeros: float
    three_kernels: float


def predict(case: Any) -> Prediction:
    """Write down what the backend launches for a case of one of the benchmarks."""
    launches: list[Launched] = []

    def write(launch: triton_launch.Launch, *pointers: torch.Tensor | None) -> None:
        launches.append(Launched(launch, dict(zip(launch.kernel.arg_names, pointers, strict=False))))

    tensors, options, entries = _call_of(case)
    with mock.patch.object(triton_launch.Launch, "__call__", write):
        out, _, stats = triton_launch.run_forward(*tensors, *options)
        forward = list(launches)
        triton_launch.run_backward(torch.empty_like(out), None, out, stats, False, *tensors, *options)
    name = case.name + " packed" * isinstance(case, bench_varlen_attention.Case)
    return Prediction(name, case, entries, forward, launches[len(forward) :])


def _call_of(case: Any) -> tuple[list[torch.Tensor], tuple[Any, ...], list[Entry]]:
    """Return query, key and value without numbers, the other arguments, and the sequences of the batch."""
    B, H, L, D = *case.shape[:3], case.shape[-1]
    if isinstance(case, bench_varlen_attention.Case):
        entries = [Entry(n, n, n) for n in bench_varlen_attention.lengths_of(case)]
        shapes = [(sum(entry.queries for entry in entries), H, D)] * 3
        S, real, cu_seq = L, None, torch.empty(B + 1, dtype=torch.int64, device="meta")
        dropout, causal = 0.0, "none"
    else:
        S, real, cu_seq = case.shape[3], bench_attention.lengths_of(case, "cpu"), None
        entries = [Entry(L, S, n) for n in ([S] * B if real is None else real.tolist())]
        shapes = [(B, H, L, D), (B, H, S, D), (B, H, S, D)]
        dropout, causal = case.dropout, "top_left" if case.causal else "none"
    tensors = [torch.empty(shape, dtype=case.dtype, device="meta") for shape in shapes]
    masks = (None, None if real is None else real.to("meta"), None, cu_seq, cu_seq)
    seed = torch.empty(2, dtype=torch.int64, device="meta") if dropout > 0 else None
    return tensors, (*masks, L, S, seed, dropout, causal, D**-0.5), entries


def floor_of(prediction: Prediction) -> Floor:
    """Return the floors of a case, whose numbers have 16 bits."""
    case, entries, causal = *prediction[1:3], prediction.forward[0].launch.constants["CAUSAL"] != 0
    bench = bench_varlen_attention if isinstance(case, bench_varlen_attention.Case) else bench_attention
    H, D = case.shape[1], case.shape[-1]
    seen = sum(min(entry.keys, entry.queries) if causal else entry.keys for entry in entries) * H * D
    queries, keys = (sum(entry[i] for entry in entries) * H * D for i in (0, 1))
    copy, flops = RATES["memory"][0], bench.flops(case)
    products, exps = flops / 7 / RATES["products"][0], flops / 14 / D / RATES["exp"][0]
    return Floor(
        max((4 * queries + 4 * seen + 4 * queries / D) / copy, 2 * products, exps),
        max((6 * queries + 8 * seen) / copy, 5 * products, exps),
        4 * (keys - seen) / copy,
        max((26 * queries + 8 * keys) / copy, 5 * products, exps),
    )


def page() -> str:
    """Return the predictions for the cases of a GPU as a Markdown page."""
    found = [predict(case) for case in (*bench_attention.CUDA_CASES, *bench_varlen_attention.CUDA_CASES)]
    said = [f"- {name}: {rate:.3g} {what} a second, {source}" for name, (rate, what, source) in RATES.items()]
    parts = (
        "# Predicted times of the Triton kernels of attention on an H200",
        "Written by `python -m benchmarks.predict_attention`, whose text says how. Nothing is measured.\n"
        "The floor does not count zeros, gradients of keys that no query sees. Three kernels: the backward\n"
        "pass of FlashAttention 2 and cuDNN at the same rates.",
        "\n".join([*said, f"- a launch: {LAUNCH_SECONDS * 1e6:g} us, an assumption"]),
        report.markdown([CASE_HEADINGS, *map(_case_cells, found)]),
        report.markdown([KERNEL_HEADINGS, *itertools.chain.from_iterable(map(_kernel_cells, found))]),
    )
    return "\n\n".join(parts) + "\n"


def _case_cells(prediction: Prediction) -> list[str]:
    floor, backward = floor_of(prediction), prediction.seconds(prediction.backward)
    cells = [prediction.name]
    for lowest, ours in ((floor.forward, prediction.seconds(prediction.forward)), (floor.backward, backward)):
        cells += [f"{lowest * 1e6:.1f}", f"{ours * 1e6:.1f}", f"{ours / lowest:.2f}"]
    cells += [f"{seconds * 1e6:.1f}" for seconds in (floor.zeros, floor.three_kernels)]
    return [*cells, f"{floor.three_kernels / backward:.2f}"]


def _kernel_cells(prediction: Prediction) -> list[list[str]]:
    rows = []
    for launched in (*prediction.forward, *prediction.backward):
        launch, count = launched.launch, launched.count(prediction.entries)
        terms = launched.terms(count)
        limit = max(terms, key=terms.__getitem__)
        moved = (terms[name] * RATES[name][0] / 1e6 for name in ("memory", "L2"))
        sizes = (*moved, count["products"] / 1e9, count["exp"] / 1e9, count["philox"] / 1e6)
        tile = "{BLOCK_M} x {BLOCK_N}".format(**launch.constants)
        cells = [prediction.name, f"{launch.kernel.__name__} {launch.line[0]}", tile, str(launch.programs)]
        cells += [*(f"{size:.3g}" for size in sizes), limit]
        rows.append([*cells, f"{(terms[limit] + LAUNCH_SECONDS) * 1e6:.1f}"])
    return rows


def main(arguments: Sequence[str]) -> int:
    """Print the page, or write it to the file that is named."""
    if arguments:
        with replacing(arguments[0]) as file:
            file.write(page().encode())
    else:
        print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
