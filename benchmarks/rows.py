"""What a results file says of a case that was timed: a row for each peer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from .gpu import StepTimer, StepTimes, Timer, Times

__all__ = ["Measured", "of_passes", "of_rounds", "of_steps"]

Result = dict[str, Any]
LAUNCHED = ", launched by Python"


class Measured(NamedTuple):
    """A case, and what is known of it besides times.

    Attributes:
        bench: a benchmark module.
        case: one of its cases.
        settings: what is measured.
        rates: what the machine reaches.
        errors: of each implementation, by name.
    """

    bench: ModuleType
    case: Any
    settings: Any
    rates: Result
    errors: Mapping[str, Mapping[str, float]]


def of_rounds(measured: Measured, times: Mapping[str, Sequence[float]]) -> list[Result]:
    """Return a row for each peer that was timed.

    Args:
        measured: the case.
        times: seconds of the rounds, by name, ours too.
    """
    bench, case, settings, rates, errors = measured
    ours, backend = times[bench.OURS], bench.chosen(case, settings)
    description = bench.describe(case)
    rate = bench.flops(case) / min(ours) / 1e9
    gemm = rates["gemm_gflops" if description["dtype"] == "float32" else "gemm_16_gflops"]
    peers = [name for name in times if name != bench.OURS]
    fastest = min(peers, key=lambda name: min(times[name]), default=None)
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
            **_ratios("ratio", ours, times[peer]),
            "gemm_share": round(rate / gemm, 3),
            "ours_error": errors[bench.OURS],
            "peer_error": errors[peer],
        }
        for peer in peers
    ]


def of_passes(
    measured: Measured, times: Mapping[str, Sequence[Times]], timers: Mapping[str, Timer]
) -> list[Result]:
    """Return a row for each peer that was timed on a GPU, pass by pass.

    Args:
        measured: the case.
        times: of the rounds, by name, ours too.
        timers: of each, by name.
    """
    steps = {name: [each.step for each in rounds] for name, rounds in times.items()}
    rows = of_rounds(measured, steps)
    return [{**row, **_columns(measured, row["peer"], times, timers)} for row in rows]


def of_steps(
    measured: Measured, times: Mapping[str, Sequence[StepTimes]], timers: Mapping[str, StepTimer]
) -> list[Result]:
    """Return two rows for each peer whose steps were timed on a GPU: of graphs, and as Python launches them.

    Args:
        measured: the case.
        times: of the rounds, by name, ours too.
        timers: of each, by name.
    """
    found = []
    for part, words in (("step", ""), ("launched", LAUNCHED)):
        steps = {name: [getattr(each, part) for each in rounds] for name, rounds in times.items()}
        for row in of_rounds(measured, steps):
            row["name"] += words
            found.append({**row, **_timed(measured.bench.OURS, row["peer"], timers)})
    return found


def _timed(ours: str, peer: str, timers: Mapping[str, Timer] | Mapping[str, StepTimer]) -> Result:
    """Return whether both were captured, and the megabytes that their steps take."""
    who = {"ours": timers[ours], "peer": timers[peer]}
    return {
        "captured": {name: timer.refusal is None for name, timer in who.items()},
        "memory_mb": {name: round(timer.memory / 1e6, 1) for name, timer in who.items()},
    }


def _columns(
    measured: Measured, peer: str, times: Mapping[str, Sequence[Times]], timers: Mapping[str, Timer]
) -> Result:
    """Return what a row has only on a GPU: the passes apart, Python's part, bytes in a second, memory."""
    bench, case, _, rates, _ = measured
    pair = {"ours": bench.OURS, "peer": peer}
    found: Result = {
        "goal_peer": _fastest_sdpa(times, "step"),
        "backward_peer": _fastest_sdpa(times, "backward"),
        "copies": len(timers[peer].passes),
        **_timed(bench.OURS, peer, timers),
    }
    for part in ("forward", "backward", "latency"):
        each = {who: [getattr(x, part) for x in times[name]] for who, name in pair.items()}
        found[f"{part}_ms"] = {who: _milliseconds(seconds) for who, seconds in each.items()}
        found |= _ratios(f"{part}_ratio", each["ours"], each["peer"])
    for part, nbytes in zip(("forward", "backward"), bench.traffic(case), strict=True):
        rate = nbytes / found[f"{part}_ms"]["ours"]["median"] / 1e6
        found[f"{part}_gbytes"] = round(rate, 1)
        found[f"{part}_copy_share"] = round(rate / rates["copy_gbytes"], 3)
    return found


def _fastest_sdpa(times: Mapping[str, Sequence[Times]], part: str) -> str | None:
    """Return the fastest of PyTorch's backends, which the goals are against."""
    best = {name: min(getattr(x, part) for x in times[name]) for name in times if name.startswith("sdpa")}
    return min(best, key=best.__getitem__, default=None)


def _milliseconds(times: Sequence[float]) -> dict[str, float]:
    return {"min": round(min(times) * 1e3, 4), "median": round(statistics.median(times) * 1e3, 4)}


def _ratios(name: str, ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    return {
        f"{name}_of_minima": round(min(peer) / min(ours), 3),
        f"{name}_of_medians": round(statistics.median(peer) / statistics.median(ours), 3),
    }
