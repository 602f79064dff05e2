"""Whole training steps of CS224N's assignment 5, and its block from tokens to latents, against eager code.

A pretraining step is forward, backward, clipping of the gradient's norm and AdamW, with dropout 0.1, on one
batch of biographies with a hole, which is read again in every step. The assignment pads each document to the
block; ours packs them, and the loading process would have done so: neither is part of a step. The eager model
computes attention with all scores in memory, the model "sdpa" has PyTorch's attention in that place, and
"compile" is the latter compiled. All but "eager float32" have the case's precision, bfloat16 by autocast.

The step of a block is forward and backward with respect to its input and its parameters.

On a GPU a pretraining step is timed twice: as the replay of a CUDA graph, and as Python launches it. There
our model "joined" has sums, norms, activations and dropout as one operation, as on CPUs: where it is faster,
`nlpfast.nn.joined` is to have it by default.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from nlpfast import dispatch

from . import training_steps as steps
from .compiled import unavailable
from .gpu import StepTimer
from .measure import Settings, check_errors
from .process_memory import megabytes_in_a_process, megabytes_of
from .training_steps import (
    EAGER,
    JOINED,
    OURS,
    PEERS,
    Block,
    Case,
    Pretraining,
    PretrainingStep,
    Step,
    step_of,
)

__all__ = ["OURS", "PEERS", "unavailable"]

OP = "training"

CASES: tuple[Case, ...] = (
    *(
        Pretraining("vanilla", dtype, goal, few=True, quick=dtype == torch.float32)
        for dtype, goal in ((torch.float32, 3.0), (torch.bfloat16, 8.0))
    ),
    *(
        Pretraining(model, dtype, goal)
        for model in ("vanilla", "perceiver")
        for dtype, goal in ((torch.float32, 3.0), (torch.bfloat16, 8.0))
    ),
    Block(1024, 64, goal=10.0, quick=True),
    *(Block(tokens, m) for tokens, m in ((1024, 32), (512, 64), (512, 32), (128, 64), (128, 32))),
)

CUDA_PEERS = ("eager", "sdpa", "compile", JOINED)
CUDA_QUICK_PEERS = 4
CUDA_TIMER = StepTimer
CUDA_GOALS = {"eager": 2.0, "compile": 1.3}
CUDA_CASES: tuple[Pretraining, ...] = tuple(
    Pretraining(
        *(model, torch.bfloat16, None, few),
        quick=model == "vanilla" and not few,
        goals=CUDA_GOALS if model == "vanilla" and not few else {},
        memory_peer="eager",
    )
    for model, few in (("vanilla", False), ("perceiver", False), ("vanilla", True))
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    return {"name": case.name, **asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}


def flops(case: Case) -> float:
    """Return the operations of the matrix products of a step, of what its result depends on.

    That is without padding, and without the keys that the mask hides from all latents; scores above the
    diagonal are counted. A product takes 2 operations forward and 4 backward; the optimizer has none.
    """
    if isinstance(case, Block):
        n = torch.full((steps.B,), case.tokens)
        k = n.clamp(max=case.latents)
        weights, pairs = _down(k), (k * k).sum()
        return 6.0 * int(weights * steps.C**2 + 2 * steps.C * pairs)
    n = torch.tensor([len(targets) for _, targets in steps.unpadded(case.documents)])
    k = n.clamp(max=steps.LATENTS)
    weights, pairs = 12 * steps.LAYERS * n.sum(), steps.LAYERS * (n * n).sum()
    if case.model == "perceiver":
        # query, projection and network of the tokens, and keys and values of the latents
        up = 10 * n.sum() + 2 * k.sum()
        weights = _down(k) + 12 * (steps.LAYERS - 2) * k.sum() + up
        pairs = (steps.LAYERS - 1) * (k * k).sum() + (n * k).sum()
    return 6.0 * int(weights * steps.C**2 + n.sum() * steps.V * steps.C + 2 * steps.C * pairs)


def _down(k: Tensor) -> Tensor:
    """Return rows times matrices C x C of the block to k latents: the batch shares the latents' queries."""
    return 11 * k.sum() + k.max()


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves attention."""
    packed, device = isinstance(case, Pretraining), torch.device(settings.device)
    x = torch.empty(*((1, 1) if packed else (1, 1, 1)), 8, dtype=case.dtype, device=device)
    ends = torch.zeros(2, dtype=torch.int64, device=device)
    op, further = ("varlen_attention", (ends, ends, 1)) if packed else ("attention", (None, None, None))
    return dispatch.choose(op, device.type, None, (x, x, x, *further)).__name__.rpartition(".")[2]


def unserved(case: Case, implementation: str) -> str | None:
    """Return None: every implementation serves every case."""
    return None


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Step]:
    """Return an implementation's step, on some copies."""
    return [step_of(case, implementation, steps.DROPOUT, device=settings.device) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the errors against the eager code in float64, without dropout, over the largest value.

    Of a model they are those of the loss and of all gradients, of `COMPARED` documents; of a block those of
    its output and gradients. "compile" stands for itself before it is compiled, which takes a minute.
    """
    baseline, device = "eager" if case.dtype == torch.bfloat16 else EAGER, settings.device
    exact = step_of(case, EAGER, 0.0, torch.float64, device).results()
    found = {}
    for name in dict.fromkeys((baseline, *implementations)):
        results = step_of(case, "sdpa" if name == "compile" else name, 0.0, device=device).results()
        found[name] = {part: distance(results[part], values) for part, values in exact.items()}
    return checked(case.name, found, baseline, implementations)


def checked(
    case: str, found: dict[str, dict[str, float]], baseline: str, implementations: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the errors of implementations; those of ours must not be larger than the baseline's."""
    if OURS in found:
        limits = dict(found[baseline])
        # a single number may be right by luck
        limits["loss"] = max(limits.values())
        check_errors(case, found[OURS], limits)
    return {name: found[name] for name in implementations}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the largest difference of tensors by name, over the largest value."""
    if found.keys() != exact.keys():
        raise RuntimeError(f"there are {sorted(found)}, expected {sorted(exact)}")
    largest = max(y.abs().max().item() for y in exact.values())
    # torch's maximum is NaN where one of the numbers is
    differences = [(found[name].double() - y).abs().max() for name, y in exact.items()]
    return torch.stack(differences).max().item() / largest


def memory(case: Case, implementation: str) -> float | None:
    """Return the megabytes that a pretraining step takes at most beyond model and batch; only on Linux.

    None for peers without a goal, and for a block.
    """
    if not isinstance(case, Pretraining) or implementation not in (OURS, EAGER):
        return None
    return megabytes_in_a_process(__name__, CASES.index(case), implementation)


def main(index: str, implementation: str) -> None:
    """Print what `memory` returns for a case of CASES; for a process of its own."""
    torch.set_num_threads(1)
    case = CASES[int(index)]
    assert isinstance(case, Pretraining)
    step = PretrainingStep(case, implementation, steps.DROPOUT)
    # a smaller batch loads the code of the libraries, and makes the optimizer's state
    step.read(steps.documents(steps.COMPARED))
    step.step()
    step.optimizer.zero_grad()
    step.read(steps.documents(case.documents))
    print(megabytes_of(step.step))


if __name__ == "__main__":
    main(*sys.argv[1:])
