"""Cross entropy with smoothed labels, forward and backward, against PyTorch's and a copy of the logits.

Sizes are (N, V): rows, classes. The copy, of the logits into memory that is there, is the time that a kernel
takes which reads the logits once and writes a gradient once. In place, a step's logits are the gradient of
the step before it.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import nlpfast
from nlpfast import dispatch

from .measure import Settings, check_errors

OP = "cross_entropy"
OURS = "nlpfast"
# The strongest rival first: the quick run has time for one.
PEERS = ("F.cross_entropy", "fairseq", "compile", "copy")
SMOOTHING = 0.1


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: (N, V).
        dtype: of the logits and their gradient.
        inplace: the gradient takes the place of the logits.
        goals: how many times faster than a peer ours must be, by the peer's name.
        quick: also part of the quick run.
    """

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    inplace: bool = False
    goals: tuple[tuple[str, float], ...] = ()
    quick: bool = False
    goal: None = None
    best_goal: None = None

    @property
    def name(self) -> str:
        """The size and what is special about it, in one line."""
        words = [str(self.shape).replace(" ", ""), str(self.dtype).removeprefix("torch.")]
        return " ".join(words + ["in place"] * self.inplace)


def _goals(copy: float) -> tuple[tuple[str, float], ...]:
    return (("F.cross_entropy", 10.0), ("compile", 5.0), ("copy", copy))


CASES = (
    Case((2048, 32000), goals=_goals(0.9)),
    Case((2048, 32000), torch.bfloat16, goals=_goals(0.65)),
    Case((2048, 50257), goals=_goals(0.9)),
    Case((2048, 50257), torch.bfloat16, goals=_goals(0.65)),
    Case((2048, 32000), inplace=True),
    Case((2048, 32000), torch.bfloat16, inplace=True),
    Case((4096, 1000), quick=True),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {
        "name": case.name,
        **asdict(case),
        "shape": list(case.shape),
        "dtype": dtype,
        "goals": dict(case.goals),
    }


def flops(case: Case) -> float:
    """Return 0: there are no products of matrices."""
    return 0.0


def unavailable(implementation: str) -> str | None:
    """Return why an implementation cannot run on this machine, or None."""
    compiler = os.environ.get("CXX", "g++")
    if implementation == "compile" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and finds no {compiler}: install g++ or set CXX"
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    x, target = torch.empty(1, 1, 2, dtype=case.dtype), torch.zeros(1, 1, dtype=torch.int64)
    return dispatch.choose(OP, "cpu", settings.backend, (x, target)).__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[_Step]:
    """Return an implementation's step on each of some copies of the inputs."""
    return [_Step(case, implementation, settings) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of loss and gradient against float64; the copy has none."""
    x, target = _inputs(case)
    x = x[:64].clone().requires_grad_()
    wide = x.detach().double().requires_grad_()
    exact = _results(_pytorch, wide, target[:64])
    found = {}
    for name in {*implementations, "F.cross_entropy"}:
        if name == "copy":
            found[name] = dict.fromkeys(exact, 0.0)
            continue
        function = _function(case, name, settings)
        # a gradient takes the place of the logits: not of those that the others are given
        spared = functools.partial(_on_a_copy, function) if name == OURS and case.inplace else function
        results = _results(spared, x, target[:64])
        found[name] = {key: (y.double() - exact[key]).abs().max().item() for key, y in results.items()}
    check_errors(case.name, found[OURS], found["F.cross_entropy"])
    return found


class _Step:
    """Forward and backward of one implementation on inputs of its own."""

    def __init__(self, case: Case, implementation: str, settings: Settings) -> None:
        self.x, self.target = _inputs(case)
        self.copied = torch.empty_like(self.x) if implementation == "copy" else None
        self.loss = None if implementation == "copy" else _function(case, implementation, settings)

    def step(self) -> None:
        """Run once."""
        if self.loss is None:
            assert self.copied is not None
            self.copied.copy_(self.x)
        else:
            torch.autograd.grad(self.loss(self.x, self.target), self.x)


def _inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    N, V = case.shape
    x = torch.empty(N, V, dtype=case.dtype)
    for row in x:
        row.copy_(2 * torch.randn(V, generator=generator))
    return x.requires_grad_(), torch.randint(V, (N,), generator=generator)


def _results(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor) -> dict[str, Tensor]:
    value = loss(x, target)
    (gradient,) = torch.autograd.grad(value, x)
    return {"loss": value.detach(), "gradient": gradient}


def _on_a_copy(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, target: Tensor) -> Tensor:
    return loss(x.clone(), target)


def _function(case: Case, implementation: str, settings: Settings) -> Callable[[Tensor, Tensor], Tensor]:
    if implementation == OURS:
        return functools.partial(
            nlpfast.cross_entropy, label_smoothing=SMOOTHING, inplace=case.inplace, backend=settings.backend
        )
    if implementation == "compile":
        torch._dynamo.reset()
        return torch.compile(_pytorch)
    return {"F.cross_entropy": _pytorch, "fairseq": _fairseq}[implementation]


def _pytorch(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target, label_smoothing=SMOOTHING)


def _fairseq(x: Tensor, target: Tensor) -> Tensor:
    """The recipe of fairseq's criterion, with the eps that makes it the same loss."""
    V = x.shape[-1]
    eps = SMOOTHING * (V - 1) / V
    logp = F.log_softmax(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))
    nll = -logp.gather(-1, target.unsqueeze(-1)).sum()
    smooth = -logp.sum(-1).sum()
    share = eps / (V - 1)
    return ((1.0 - eps - share) * nll + share * smooth) / target.numel()
