"""Time implementations side by side, and measure what the machine can do at best.

A benchmark module (`bench_<op>.py`) offers the names `OP`, `CASES`, `OURS`, `PEERS` and these functions:

- `describe(case)`: the case as plain data, with its `name`, its `goal` against the first of `PEERS` and its
  `best_goal` against the fastest (ratios of times, or None), and maybe `goals` by the names of peers; a case
  also says whether it is `quick`, and maybe which of `PEERS` it has on the CPU (`peers`) and, where a step
  takes seconds, how many rounds warm up and how many are timed at least (`rounds`);
- `flops(case)`: floating-point operations of one step;
- `unavailable(implementation)`: None, or why it cannot run here;
- maybe `memory(case, implementation)`: megabytes that a step takes on the CPU, or None; a case's
  `memory_goal` is the share that ours may have of what its `memory_peer` takes, also on a GPU;
- `chosen(case, settings)`: the name of the backend that serves ours;
- `passes(case, implementation, settings, copies)`: one training step for each copy of the inputs;
- `errors(case, implementations, settings)`: largest errors of outputs and gradients against float64;
  RuntimeError when ours are wrong.

On a GPU its cases are `CUDA_CASES`, their `goal` and `backward_goal` being against the fastest backend of
`sdpa`; the peers are `CUDA_PEERS`, for a quick run the first `CUDA_QUICK_PEERS`; and it also offers

- `traffic(case)`: the bytes that a forward and a backward pass must move at the least; or, for whole training
  steps, `CUDA_TIMER`, which is `gpu.StepTimer`;
- `unserved(case, implementation)`: None, or why an implementation does not serve a case.

`run` does the rest for every op.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, TypeVar

import torch

from nlpfast.cli import info

from .gpu import TRITON, Gpu, Step, timers_of
from .rows import Measured, of_passes, of_rounds, of_steps

T = TypeVar("T")
Result = dict[str, Any]
Rounds = tuple[int, int] | None

WARMUP_ROUNDS = 3
MIN_ROUNDS = 5
MAX_ROUNDS = 2000
SECONDS_PER_STEP = {"quick": 0.8, "full": 1.5}
# A GPU keeps its pace, and most of a run's time there goes into compiling.
CUDA_SECONDS_PER_STEP = {"quick": 0.3, "full": 0.5}


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        quick: only the cases marked so, only the first peers, and fewer rounds.
        threads: numbers of CPU threads, by default 1 and torch's own number; a GPU has one row a case.
        backend: the backend of ours, by default the one that a user would get. Triton's is a peer of "cuda".
        device: where the inputs lie.
    """

    quick: bool = False
    threads: tuple[int, ...] = ()
    backend: str | None = None
    device: str = "cpu"


def run(
    bench: ModuleType,
    settings: Settings,
    progress: Callable[[str], None] = lambda line: None,
    gpu: Any = None,
) -> Result:
    """Measure one op: every case, every peer, every number of threads.

    Args:
        bench: a benchmark module.
        settings: what to measure.
        progress: is given one line before each case.
        gpu: how to time on a GPU; `Gpu(settings.device)` unless that is the CPU.

    Returns:
        Plain data for a JSON file: what the machine can do (`rates`), one dictionary a row, and notes.

    Raises:
        RuntimeError: an output or a gradient of ours is wrong; nothing of that case is timed then.
    """
    before = torch.get_num_threads()
    counts = settings.threads or tuple(sorted({1, before}))
    if gpu is None and settings.device != "cpu":
        gpu = Gpu(settings.device)
    if gpu is not None:
        counts = (before,)
    names, notes = _implementations(bench, settings, gpu is not None)
    all_cases = bench.CASES if gpu is None else bench.CUDA_CASES
    cases = [case for case in all_cases if case.quick or not settings.quick]
    rates: dict[str, Result] = {}
    rows: list[Result] = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            rates[str(count)] = machine_rates(settings.device)
            for case in cases:
                progress(f"{bench.OP}: {case.name}, {count} thread{'s' if count > 1 else ''}")
                if gpu is None:
                    rows += _measure_case(bench, case, names, settings, rates[str(count)])
                else:
                    rows += _measure_on_gpu(bench, case, names, settings, rates[str(count)], gpu, notes)
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


def machine_facts(device: str = "cpu") -> Result:
    """Return the description of this machine and of the software, as it stands in a results file.

    Args:
        device: whose name is among them, if it is not the CPU.
    """
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name(device)}
    machine = {**info.machine(), **gpu}
    return {"machine": machine, "versions": info.versions(), "native": info.native_library()}


def interleave(steps: Mapping[str, Step], seconds: float, rounds: Rounds = None) -> dict[str, list[float]]:
    """Time several steps in turn, A B A B ..., so that a slow phase of the machine falls on all of them.

    Args:
        steps: name to a callable of no arguments.
        seconds: how long to go on; at most MAX_ROUNDS rounds are run.
        rounds: how many warm up and how many are run at least, by default WARMUP_ROUNDS and MIN_ROUNDS.

    Returns:
        Name to the seconds of each round.
    """
    return take_turns({name: partial(_timed, step) for name, step in steps.items()}, seconds, rounds)


def take_turns(
    clocks: Mapping[str, Callable[[], T]], seconds: float, rounds: Rounds = None
) -> dict[str, list[T]]:
    """Collect what several clocks say, in turn; a clock runs what it times. See `interleave`."""
    warmups, least = rounds or (WARMUP_ROUNDS, MIN_ROUNDS)
    for _ in range(warmups):
        for clock in clocks.values():
            clock()
    times: dict[str, list[T]] = {name: [] for name in clocks}
    end = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= least and time.perf_counter() > end:
            break
        for name, clock in clocks.items():
            times[name].append(clock())
    return times


def machine_rates(device: str = "cpu") -> Result:
    """Measure what the machine reaches with the present number of threads: large GEMMs and a large copy.

    Args:
        device: where to measure.

    Returns:
        `gemm_gflops`, float32, 1024 x 1024 x 1024, on a GPU 8192 each way; `gemm_16_gflops`, the same in
        bfloat16; `copy_gbytes`, bytes read plus bytes written in a second.
    """
    size, length = (1024, 2**24) if device == "cpu" else (8192, 2**28)
    left, right = torch.randn(2, size, size, device=device)
    product = torch.empty(size, size, device=device)
    left_16, right_16, product_16 = (x.to(torch.bfloat16) for x in (left, right, product))
    source = torch.randn(length, device=device)
    target = torch.randn(length, device=device)
    steps = {
        "gemm": lambda: torch.mm(left, right, out=product),
        "gemm_16": lambda: torch.mm(left_16, right_16, out=product_16),
        "copy": lambda: target.copy_(source),
    }
    clock = _timed if device == "cpu" else Gpu(device).seconds_of
    times = take_turns({name: partial(clock, step) for name, step in steps.items()}, 0.5)
    best = {name: min(each) for name, each in times.items()}
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
            found = f"{error:.2e}, more than {limit:.2e}"
            raise RuntimeError(f"{case}: {tensor} has error {found}: fix the kernel")


def _implementations(
    bench: ModuleType, settings: Settings, on_gpu: bool = False
) -> tuple[list[str], list[str]]:
    """Return the names that can run here, ours first, and one note for each that cannot."""
    peers, few = (bench.CUDA_PEERS, bench.CUDA_QUICK_PEERS) if on_gpu else (bench.PEERS, 1)
    own = [TRITON] if on_gpu and settings.backend == "cuda" else []
    offered = [bench.OURS, *own, *(peers[:few] if settings.quick else peers)]
    reasons = {name: None if name in own else bench.unavailable(name) for name in offered}
    notes = [f"{name} was left out: {reason}" for name, reason in reasons.items() if reason is not None]
    return [name for name in offered if reasons[name] is None], notes


def _measure_case(
    bench: ModuleType, case: Any, names: Sequence[str], settings: Settings, rates: Result
) -> list[Result]:
    names = [name for name in names if name in (bench.OURS, *getattr(case, "peers", bench.PEERS))]
    errors = bench.errors(case, names, settings)
    steps = {name: bench.passes(case, name, settings, 1)[0].step for name in names}
    seconds = SECONDS_PER_STEP["quick" if settings.quick else "full"] * len(steps)
    times = interleave(steps, seconds, getattr(case, "rounds", None))
    rows = of_rounds(Measured(bench, case, settings, rates, errors), times)
    if hasattr(bench, "memory") and torch.get_num_threads() == 1 and not settings.quick:
        megabytes = {name: bench.memory(case, name) for name in names}
        for row in rows:
            row["memory_mb"] = {"peer": megabytes[row["peer"]], "ours": megabytes[bench.OURS]}
    return rows


def _measure_on_gpu(
    bench: ModuleType,
    case: Any,
    names: Sequence[str],
    settings: Settings,
    rates: Result,
    gpu: Any,
    notes: list[str],
) -> list[Result]:
    """Return a row for each peer that serves the case, and add a note for each that does not."""
    timers, errors, said = timers_of(bench, case, names, settings, gpu)
    notes += said
    if bench.OURS not in timers:
        return []
    seconds = CUDA_SECONDS_PER_STEP["quick" if settings.quick else "full"] * len(timers)
    times = take_turns({name: timer.times for name, timer in timers.items()}, seconds)
    of_kind = of_steps if hasattr(bench, "CUDA_TIMER") else of_passes
    return of_kind(Measured(bench, case, settings, rates, errors), times, timers)


def _timed(step: Step) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start
