"""How long a call of a CUDA C++ operation takes in Python: checks, outputs and the launch, not the kernel.

    python -m benchmarks.overhead FOLDER

The operations are called on a few numbers, so that the device is done with one before the next, many times
without waiting for it; beside them functions of PyTorch. The rows go to the results file of the GPU in
FOLDER, which `benchmarks.report` reads.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F

from . import sections

__all__ = ["main", "measured", "operations"]

# microseconds of an operation forward
GOAL = 6.0
# calls in a round: fewer than a stream queues
CALLS, ROUNDS = 500, 20
PYTORCH = "PyTorch: "
Call = Callable[[], object]


def operations(device: str) -> dict[str, Call]:
    """Return what is called, by name.

    Args:
        device: where its inputs lie.
    """
    B, H, T, D, N, V = 1, 2, 16, 32, 16, 64
    numbers = torch.Generator().manual_seed(0)
    half = torch.randn(B, H, T, D, generator=numbers).to(device, torch.bfloat16)
    out, gradients = torch.empty_like(half), [torch.empty_like(half) for _ in range(3)]
    lse = torch.zeros(B, H, T, device=device)
    pairs = torch.tensor([[0, t, t] for t in range(T)], device=device)
    logits = torch.randn(1, N, V, generator=numbers).to(device)
    gradient, target = torch.empty_like(logits), torch.arange(N, device=device)[None]
    one = torch.ones((), device=device)
    x, weight = logits[0], torch.ones(V, device=device)
    ops, scale = torch.ops.nlpfast, D**-0.5
    # no lengths and no offsets of packed sequences, keys at most, no dropout, not causal
    lengths, rest = [None] * 4, (T, None, 0.0, 0, scale)
    return {
        "attention, forward": lambda: ops.cuda_attention_forward(
            *(half, half, half, *lengths, T, *rest, out)
        ),
        "attention, backward": lambda: ops.cuda_attention_backward(
            *(half, None, half, half, half, *lengths, *rest), *[None] * 6, [], *gradients
        ),
        "cross_entropy, forward": lambda: ops.cuda_cross_entropy_forward(
            logits, target, -100, -1, 1.0, 0.0, one, gradient
        ),
        "add_layer_norm, forward": lambda: ops.cuda_add_layer_norm_forward(
            x, x, weight, weight, None, 0, 1e-5, torch.float32
        ),
        "alignment_loss, forward": lambda: ops.cuda_alignment_loss_forward(
            half, half, lse, pairs, [0], scale
        ),
        f"{PYTORCH}scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(half, half, half),
        f"{PYTORCH}cross_entropy": lambda: F.cross_entropy(logits[0], target[0]),
        f"{PYTORCH}layer_norm": lambda: F.layer_norm(x, [V], weight, weight),
    }


def measured(calls: Mapping[str, Call], wait: Call) -> sections.Rows:
    """Return a row for each: its name, microseconds of a call by minimum and median of the rounds, the goal.

    Args:
        calls: what is called, by name.
        wait: until the device is done.
    """
    rows = []
    for name, call in calls.items():
        times = []
        # the first round warms up
        for _ in range(ROUNDS + 1):
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            times.append((time.perf_counter() - start) / CALLS * 1e6)
        goal = GOAL if name.endswith(", forward") else None
        us = {"min": min(times[1:]), "median": statistics.median(times[1:])}
        rows.append({"name": name, "us": us, "goal": goal})
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a line for each row, and write the rows.

    Args:
        argv: the words after the module; those of the process when None.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args(argv).folder
    with torch.inference_mode():
        rows = measured(operations("cuda"), torch.cuda.synchronize)
    for row in rows:
        print(row, file=sys.stderr)
    sections.change(folder, "cuda", "overhead", lambda _: rows)


if __name__ == "__main__":
    main()
