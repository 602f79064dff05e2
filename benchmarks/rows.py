"""What a results file says of a case that was timed: a row for each peer."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from .gpu import StepTimer, StepTimes, Timer, Times

__all__ = ["of_passes", "of_rounds", "of_steps"]

Result = dict[str, Any]
LAUNCHED = ", launched by Python"


def of_rounds(
    bench: ModuleType,
    case: Any,
    settings: Any,
    rates: Result,
    times: Mapping[str, Sequence[float]],
    errors: Mapping[str, Mapping[str, float]],
) -> list[Result]:
    """Return a row for each peer that was timed.

    Args:
        bench: a benchmark module.
        case: one of its cases.
        settings: what is measured.
        rates: what the machine reaches.
        times: seconds of the rounds, by name, ours too.
        errors: of each, by name.
    """
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
    bench: ModuleType,
    case: Any,
    settings: Any,
    rates: Result,
    times: Mapping[str, Sequence[Times]],
    timers: Mapping[str, Timer],
    errors: Mapping[str, Mapping[str, float]],
) -> list[Result]:
    """Return a row for each peer that was timed on a GPU; see `of_rounds`.

    Args:
        bench: a benchmark module.
        case: one of its cases.
        settings: what is measured.
        rates: what the machine reaches.
        times: of the rounds, by name, ours too.
        timers: of each, by name.
        errors: of each, by name.
    """
    steps = {name: [each.step for each in rounds] for name, rounds in times.items()}
    return [
        {**row, **_columns(bench, case, row["peer"], times, timers, rates)}
        for row in of_rounds(bench, case, settings, rates, steps, errors)
    ]


def of_steps(
    bench: ModuleType,
    case: Any,
    settings: Any,
    rates: Result,
    times: Mapping[str, Sequence[StepTimes]],
    timers: Mapping[str, StepTimer],
    errors: Mapping[str, Mapping[str, float]],
) -> list[Result]:
    """Return two rows for each peer whose steps were timed on a GPU: of graphs, and as Python launches them.

    Args:
        bench: a benchmark module.
        case: one of its cases.
        settings: what is measured.
        rates: what the machine reaches.
        times: of the rounds, by name, ours too.
        timers: of each, by name.
        errors: of each, by name.
    """
    found = []
    for part, words in (("step", ""), ("launched", LAUNCHED)):
        steps = {name: [getattr(each, part) for each in rounds] for name, rounds in times.items()}
        for row in of_rounds(bench, case, settings, rates, steps, errors):
            row["name"] += words
            who = {"ours": timers[bench.OURS], "peer": timers[row["peer"]]}
            row["captured"] = {name: timer.refusal is None for name, timer in who.items()}
            row["memory_mb"] = {name: round(timer.memory / 1e6, 1) for name, timer in who.items()}
            found.append(row)
    return found


def _columns(
    bench: ModuleType,
    case: Any,
    peer: str,
    times: Mapping[str, Sequence[Times]],
    timers: Mapping[str, Timer],
    rates: Result,
) -> Result:
    """Return what a row has only on a GPU: the passes apart, Python's part, bytes in a second, memory."""
    pair = {"ours": bench.OURS, "peer": peer}
    found: Result = {
        "goal_peer": _fastest_sdpa(times, "step"),
        "backward_peer": _fastest_sdpa(times, "backward"),
        "copies": len(timers[peer].passes),
        "captured": {who: timers[name].refusal is None for who, name in pair.items()},
        "memory_mb": {who: round(timers[name].memory / 1e6, 1) for who, name in pair.items()},
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
