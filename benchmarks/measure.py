"""Time implementations side by side, and measure what the machine can do at best.

A benchmark module (`bench_<op>.py`) offers the names `OP`, `CASES`, `OURS`, `PEERS` and these functions:

- `describe(case)`: the case as plain data, with its `name`, its `goal` against the first of `PEERS` and its
  `best_goal` against the fastest (ratios of times, or None); a case also says whether it is `quick`;
- `flops(case)`: floating-point operations of one step;
- `unavailable(implementation)`: None, or why it cannot run here;
- `chosen(case, settings)`: the name of the backend that serves ours;
- `prepare(case, implementation, settings)`: one training step, as a callable of no arguments;
- `errors(case, implementations, settings)`: largest errors of outputs and gradients against float64;
  RuntimeError when ours are wrong.

`run` does the rest for every op.
"""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from nlpfast.cli import info

Step = Callable[[], object]
Result = dict[str, Any]

WARMUP_ROUNDS = 3
MIN_ROUNDS = 5
MAX_ROUNDS = 2000
SECONDS_PER_STEP = {"quick": 0.8, "full": 1.5}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        quick: only the cases marked so, only the first peer, and fewer rounds.
        threads: numbers of CPU threads, by default 1 and torch's own number; a GPU has one row a case.
        backend: the backend of ours, by default the one that a user would get.
        device: where the inputs lie.
    """

    quick: bool = False
    threads: tuple[int, ...] = ()
    backend: str | None = None
    device: str = "cpu"


def run(bench: ModuleType, settings: Settings, progress: Callable[[str], None] = lambda line: None) -> Result:
    """Measure one op: every case, every peer, every number of threads.

    Args:
        bench: a benchmark module.
        settings: what to measure.
        progress: is given one line before each case.

    Returns:
        Plain data for a JSON file: what the machine can do (`rates`), one dictionary a row, and notes.

    Raises:
        RuntimeError: an output or a gradient of ours is wrong; nothing of that case is timed then.
    """
    before = torch.get_num_threads()
    counts = settings.threads or tuple(sorted({1, before}))
    if settings.device != "cpu":
        counts = (before,)
    names, notes = _implementations(bench, settings)
    cases = [case for case in bench.CASES if case.quick or not settings.quick]
    rates: dict[str, Result] = {}
    rows: list[Result] = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            rates[str(count)] = machine_rates(settings.device)
            for case in cases:
                progress(f"{bench.OP}: {case.name}, {count} thread{'s' if count > 1 else ''}")
                rows += _measure_case(bench, case, names, settings, rates[str(count)])
    finally:
        torch.set_num_threads(before)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": settings.device,
        "quick": settings.quick,
        "rates": rates,
        "rows": rows,
        "notes": notes,
    }


def machine_facts() -> Result:
    """Return the description of this machine and of the software, as it stands in a results file."""
    return {
        "machine": info.machine(),
        "versions": info.versions(),
        "native": info.native_library(),
    }


def interleave(steps: Mapping[str, Step], seconds: float, device: str = "cpu") -> dict[str, list[float]]:
    """Time several steps in turn, A B A B ..., so that a slow phase of the machine falls on all of them.

    Args:
        steps: name to a callable of no arguments.
        seconds: how long to go on; at least MIN_ROUNDS rounds are run, at most MAX_ROUNDS.
        device: a CUDA device is waited for after each step.

    Returns:
        Name to the seconds of each round.
    """
    for _ in range(WARMUP_ROUNDS):
        for step in steps.values():
            _timed(step, device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    for rounds in range(MAX_ROUNDS):
        if rounds >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, step in steps.items():
            times[name].append(_timed(step, device))
    return times


def machine_rates(device: str = "cpu") -> Result:
    """Measure what the machine reaches with the present number of threads: large GEMMs and a large copy.

    Args:
        device: where to measure.

    Returns:
        `gemm_gflops`, float32, 1024 x 1024 x 1024; `gemm_16_gflops`, the same in bfloat16; `copy_gbytes`,
        bytes read plus bytes written in a second.
    """
    size = 1024
    left, right = torch.randn(2, size, size, device=device)
    product = torch.empty(size, size, device=device)
    left_16, right_16, product_16 = (x.to(torch.bfloat16) for x in (left, right, product))
    source = torch.randn(2**24, device=device)
    target = torch.randn(2**24, device=device)
    steps = {
        "gemm": lambda: torch.mm(left, right, out=product),
        "gemm_16": lambda: torch.mm(left_16, right_16, out=product_16),
        "copy": lambda: target.copy_(source),
    }
    best = {name: min(times) for name, times in interleave(steps, 0.5, device).items()}
    return {
        "gemm_gflops": round(2 * size**3 / best["gemm"] / 1e9, 1),
        "gemm_16_gflops": round(2 * size**3 / best["gemm_16"] / 1e9, 1),
        "copy_gbytes": round(2 * source.numel() * source.element_size() / best["copy"] / 1e9, 1),
    }


def distance(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the largest absolute error of out, dq, dk, dv; a NaN gives NaN, which no limit allows."""
    pairs = zip(("out", "dq", "dk", "dv"), actual, exact, strict=True)
    return {name: (x.double() - y.double()).abs().max().item() for name, x, y in pairs}


def check_errors(case: str, ours: Mapping[str, float], baseline: Mapping[str, float]) -> None:
    """Raise RuntimeError if an error of ours is over four times that of the definition in the same dtype."""
    for tensor, error in ours.items():
        limit = 4 * baseline[tensor] + 1e-7
        # a NaN is not within any limit
        if not error <= limit:
            raise RuntimeError(
                f"{case}: {tensor} has error {error:.2e}, more than {limit:.2e}: fix the kernel"
            )


def _implementations(bench: ModuleType, settings: Settings) -> tuple[list[str], list[str]]:
    """Return the names that can run here, ours first, and one note for each that cannot."""
    names, notes = [], []
    for name in [bench.OURS, *(bench.PEERS[:1] if settings.quick else bench.PEERS)]:
        reason = bench.unavailable(name)
        if reason is None:
            names.append(name)
        else:
            notes.append(f"{name} was left out: {reason}")
    return names, notes


def _measure_case(
    bench: ModuleType, case: Any, names: Sequence[str], settings: Settings, rates: Result
) -> list[Result]:
    errors = bench.errors(case, names, settings)
    steps = {name: bench.prepare(case, name, settings) for name in names}
    seconds = SECONDS_PER_STEP["quick" if settings.quick else "full"] * len(steps)
    times = interleave(steps, seconds, settings.device)
    ours, backend = times[bench.OURS], bench.chosen(case, settings)
    description = bench.describe(case)
    rate = bench.flops(case) / min(ours) / 1e9
    gemm = rates["gemm_gflops" if description["dtype"] == "float32" else "gemm_16_gflops"]
    fastest = min(names[1:], key=lambda name: min(times[name]), default=None)
    return [
        {
            **description,
            "threads": torch.get_num_threads(),
            "backend": backend,
            "peer": peer,
            "goal_peer": bench.PEERS[0],
            "best_peer": fastest,
            "rounds": len(ours),
            "ours_ms": _milliseconds(ours),
            "peer_ms": _milliseconds(times[peer]),
            "ratio_of_minima": round(min(times[peer]) / min(ours), 3),
            "ratio_of_medians": round(statistics.median(times[peer]) / statistics.median(ours), 3),
            "gemm_share": round(rate / gemm, 3),
            "ours_error": errors[bench.OURS],
            "peer_error": errors[peer],
        }
        for peer in names
        if peer != bench.OURS
    ]


def _milliseconds(times: Sequence[float]) -> dict[str, float]:
    return {"min": round(min(times) * 1e3, 4), "median": round(statistics.median(times) * 1e3, 4)}


def _timed(step: Step, device: str) -> float:
    start = time.perf_counter()
    step()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start
