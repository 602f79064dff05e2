"""Cross entropy of a projection with smoothed labels, forward and backward, against PyTorch's ways to it.

Sizes are (N, V, D): rows, classes, features. Some labels of a masked language model are ignored: its share
of rows that count is given. Peak memory on the CPU is that of a step in a process of its own, beyond the
inputs and the gradients, which whoever computes them returns.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nlpfast
from nlpfast import dispatch

from . import compiled
from .gpu import Pass
from .measure import Settings, check_errors
from .process_memory import megabytes_in_a_process, megabytes_of

OP = "linear_cross_entropy"
OURS = "nlpfast"
EAGER = "F.linear + F.cross_entropy"
CHUNKED = "F.linear_cross_entropy"
# The strongest rival first: the quick run has time for one.
PEERS = (EAGER, "compile", CHUNKED)
CUDA_PEERS = (EAGER, "compile", CHUNKED)
CUDA_QUICK_PEERS = 2
# Rows of which errors are taken.
COMPARED = 256
IGNORED = -100

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: (N, V, D).
        dtype: of the rows, the weight and their gradients.
        smoothing: eps.
        counted: the share of rows whose target is not ignored.
        best_goal: how many times faster than the fastest peer ours must be.
        memory_goal: which share of the memory of `memory_peer` ours may take.
        quick: also part of the quick run.
    """

    shape: tuple[int, int, int]
    dtype: torch.dtype = torch.float32
    smoothing: float = 0.1
    counted: float = 1.0
    best_goal: float | None = None
    memory_goal: float | None = None
    quick: bool = False
    goal: None = None
    memory_peer: str = EAGER

    @property
    def peers(self) -> tuple[str, ...]:
        """Those of `PEERS` that it has: compiling takes a minute, and some sizes are for the memory alone."""
        return PEERS if self.shape[2] == 512 or self.memory_goal is None else (EAGER, CHUNKED)

    @property
    def name(self) -> str:
        """The size and what is special about it, in one line."""
        words = [str(self.shape).replace(" ", ""), str(self.dtype).removeprefix("torch.")]
        words += ["unsmoothed"] * (self.smoothing == 0) + [f"{self.counted:.0%}"] * (self.counted < 1)
        return " ".join(words)


CASES = (
    Case((4096, 32000, 512), best_goal=1.3, memory_goal=0.1),
    Case((4096, 32000, 512), torch.bfloat16, best_goal=3.0, memory_goal=0.1),
    Case((2048, 32000, 512), smoothing=0.0),
    Case((2048, 32000, 512), torch.bfloat16, smoothing=0.0),
    Case((2048, 30522, 256), smoothing=0.0, counted=0.15),
    Case((1024, 1000, 128), quick=True),
    *(Case((4096, V, 256), memory_goal=0.1) for V in (4000, 8000, 16000, 64000)),
)
CUDA_CASES = (
    *(
        Case(shape, torch.bfloat16, smoothing, memory_goal=0.35, quick=smoothing > 0)
        for shape in ((16384, 32000, 512), (16384, 50257, 768))
        for smoothing in (0.1, 0.0)
    ),
    Case((16384, 32000, 512)),
    Case((16384, 32000, 512), torch.float16),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype}


def flops(case: Case) -> float:
    """Return the operations of the three products that a step takes at the least, of the rows that count."""
    N, V, D = case.shape
    return 6.0 * round(N * case.counted) * V * D


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass of ours must move at the least.

    Forward: rows and weight in, their gradients out, and the logits, too many for a cache, written and read
    twice, as themselves and as their gradient. Backward: the gradients, which are scaled.
    """
    N, V, D = case.shape
    return (2 * D * (N + V) + 4 * N * V) * case.dtype.itemsize, 2 * D * (N + V) * case.dtype.itemsize


def unavailable(implementation: str) -> str | None:
    """Return why an implementation cannot run on this machine, or None."""
    if implementation == CHUNKED and not hasattr(F, "linear_cross_entropy"):
        return f"{CHUNKED} needs PyTorch 2.13: install it"
    return compiled.unavailable(implementation)


def unserved(case: Case, implementation: str) -> str | None:
    """Return why an implementation does not serve a case, or None."""
    if implementation == CHUNKED and case.smoothing:
        return "it does not take smoothed labels in chunks"
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    device = torch.device(settings.device)
    x = torch.empty(1, 1, 2, dtype=case.dtype, device=device)
    request = (x, x[0], None, torch.zeros(1, 1, dtype=torch.int64, device=device))
    return dispatch.choose(OP, device.type, settings.backend, request).__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Pass]:
    """Return an implementation's step on each of some copies of the inputs, of which large ones need one."""
    found = []
    for _ in range(1 if case.shape[0] * case.shape[1] >= 2**28 else copies):
        rows, weight, target = _inputs(case, settings.device)
        loss = _function(case, implementation, settings, target)
        found.append(
            Pass(
                loss,
                (rows, weight),
                torch.ones((), dtype=_loss_dtype(case, implementation), device=settings.device),
            )
        )
    return found


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of loss and gradients of some rows against float64."""
    case = replace(case, shape=(min(case.shape[0], COMPARED), *case.shape[1:]))
    rows, weight, target = _inputs(case, settings.device)
    wide = [x.detach().double().requires_grad_() for x in (rows, weight)]
    exact = _results(_function(case, EAGER, settings, target), *wide)
    found = {}
    for name in dict.fromkeys((EAGER, *implementations)):
        results = _results(_function(case, name, settings, target), rows, weight)
        found[name] = {key: (y.double() - exact[key]).abs().max().item() for key, y in results.items()}
    if OURS in found:
        # a single number can be right by chance: half a unit in its last place is no error of eager's
        last = torch.finfo(torch.float32).eps * exact["loss"].abs().item() / 2
        limits = {**found[EAGER], "loss": max(found[EAGER]["loss"], last)}
        check_errors(case.name, found[OURS], limits)
    return {name: found[name] for name in found if name in implementations}


def memory(case: Case, implementation: str) -> float | None:
    """Return the megabytes that a step on the CPU takes at most beyond inputs and gradients.

    None for what is not measured: only ours and the eager peer of cases with a goal, and only on Linux.
    """
    if case.memory_goal is None or implementation not in (OURS, EAGER):
        return None
    return megabytes_in_a_process(__name__, CASES.index(case), implementation)


def main(index: str, implementation: str) -> None:
    """Print what `memory` returns for a case of CASES; for a process of its own."""
    torch.set_num_threads(1)
    case = CASES[int(index)]

    def step(case: Case) -> float:
        (work,) = passes(case, implementation, Settings(), 1)
        gradients: list[Tensor] = []
        taken = megabytes_of(lambda: gradients.extend(work.step()))
        return taken - sum(x.nbytes for x in gradients) / 2**20

    # loads the code of the libraries
    step(replace(case, shape=(128, 1024, case.shape[2])))
    print(step(case))


def _inputs(case: Case, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows and weight, whose logits are about normal, and targets; the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    N, V, D = case.shape
    options = {"generator": generator, "device": device}
    rows, weight = torch.randn(N, D, **options), torch.randn(V, D, **options) * D**-0.5
    target = torch.randint(V, (N,), **options)
    ignored = torch.randperm(N, **options)[round(N * case.counted) :]
    target[ignored] = IGNORED
    return rows.to(case.dtype).requires_grad_(), weight.to(case.dtype).requires_grad_(), target


def _results(loss: Loss, *inputs: Tensor) -> dict[str, Tensor]:
    value = loss(*inputs)
    gradients = torch.autograd.grad(value, inputs)
    return {"loss": value.detach(), "d_input": gradients[0], "d_weight": gradients[1]}


def _function(case: Case, implementation: str, settings: Settings, target: Tensor) -> Loss:
    """Return the loss as a function of rows and weight."""
    eps = {"label_smoothing": case.smoothing}

    def eager(rows: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(rows, weight), target, **eps)

    if implementation == OURS:
        ours = functools.partial(nlpfast.linear_cross_entropy, backend=settings.backend, **eps)
        return lambda rows, weight: ours(rows, weight, target)
    if implementation == "compile":
        torch._dynamo.reset()
        return torch.compile(eager)
    if implementation == CHUNKED:
        options = None if case.smoothing else nn.LinearCrossEntropyOptions()
        return lambda rows, weight: F.linear_cross_entropy(rows, weight, target, options=options, **eps)
    return eager


def _loss_dtype(case: Case, implementation: str) -> torch.dtype:
    return torch.float32 if implementation == OURS else case.dtype


if __name__ == "__main__":
    main(*sys.argv[1:])
