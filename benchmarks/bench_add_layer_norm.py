"""Residual sum, dropout of 0.1 and layer norm, forward and backward, against PyTorch's three operations.

Shapes are (N, C): rows and channels. The dtype is that of what is added; the residual is float32, and the
norm has the dtype of the linear layer that reads it. `copy` moves the bytes that a step must: inputs and
outputs once each way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import nlpfast
from nlpfast import dispatch

from .measure import Settings, check_errors

OP = "add_layer_norm"
OURS = "nlpfast"
EAGER, COPY = "eager", "copy"
# The strongest rival first: the quick run has time for one.
PEERS = (EAGER, COPY)
DROPOUT, EPS = 0.1, 1e-5


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: (N, C).
        dtype: of what is added, and of the norm.
        dropout_p: of what is added.
        goal: how many times faster than the first peer ours must be.
        quick: also part of the quick run.
    """

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    dropout_p: float = DROPOUT
    goal: float | None = None
    quick: bool = False
    best_goal: None = None

    @property
    def name(self) -> str:
        """The size and what is special about it, in one line."""
        words = f"{self.shape} {self.dtype}".replace(" ", "").replace("torch.", " ")
        return words if self.dropout_p else f"{words} without dropout"


CASES = (
    Case((2048, 256), quick=True),
    Case((2048, 256), torch.bfloat16),
    Case((2048, 256), dropout_p=0.0),
    Case((4096, 768)),
    Case((4096, 768), torch.bfloat16),
)

Function = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype}


def flops(case: Case) -> float:
    """Return about how many operations there are, twenty an element; the time goes into moving them."""
    N, C = case.shape
    return 20.0 * N * C


def unavailable(implementation: str) -> str | None:
    """Return None: everything runs everywhere."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    residual = torch.empty(1, 8)
    request = (residual.to(case.dtype), residual, case.dtype)
    return dispatch.choose(OP, "cpu", settings.backend, request).__name__.rpartition(".")[2]


class Step:
    """An implementation on inputs of its own."""

    def __init__(self, case: Case, implementation: str, settings: Settings) -> None:
        self.tensors, self.upstream = _inputs(case)
        self.function = _function(case, implementation, case.dropout_p, settings.backend)
        N, C = case.shape
        # part, residual, norm and sum, there and back
        nbytes = 2 * N * C * (2 * case.dtype.itemsize + 2 * 4)
        self.bytes = torch.empty(2, nbytes // 2, dtype=torch.uint8) if implementation == COPY else None

    def step(self) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs."""
        if self.bytes is not None:
            return (self.bytes[0].copy_(self.bytes[1]),)
        return torch.autograd.grad(self.function(*self.tensors), self.tensors, self.upstream)


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Any]:
    """Return an implementation's step, on some copies."""
    return [Step(case, implementation, settings) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of results and gradients against float64, without dropout."""
    tensors, upstream = _inputs(case)
    wide = tuple(x.detach().double().requires_grad_() for x in tensors)
    exact = _results(_function(case, EAGER, 0.0, None), wide, tuple(g.double() for g in upstream))
    found = {}
    for name in dict.fromkeys((EAGER, *implementations)):
        if name == COPY:
            found[name] = dict.fromkeys(exact, 0.0)
            continue
        results = _results(_function(case, name, 0.0, settings.backend), tensors, upstream)
        found[name] = {key: (x.double() - exact[key]).abs().max().item() for key, x in results.items()}
    if OURS in found:
        check_errors(case.name, found[OURS], found[EAGER])
    return {name: found[name] for name in found if name in implementations}


def _inputs(case: Case) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Return part, residual, weight and bias, and the upstream gradients of norm and sum."""
    generator = torch.Generator().manual_seed(0)
    N, C = case.shape

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    tensors = (drawn(N, C, dtype=case.dtype), drawn(N, C), drawn(C), drawn(C))
    return tuple(x.requires_grad_() for x in tensors), (drawn(N, C, dtype=case.dtype), drawn(N, C))


def _results(
    function: Function, tensors: tuple[Tensor, ...], upstream: tuple[Tensor, ...]
) -> dict[str, Tensor]:
    found = function(*tensors)
    grads = torch.autograd.grad(found, tensors, upstream)
    names = ("norm", "sum", "d_part", "d_residual", "d_weight", "d_bias")
    return dict(zip(names, (*(x.detach() for x in found), *grads), strict=True))


def _function(case: Case, implementation: str, dropout_p: float, backend: str | None) -> Function:
    def ours(part: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        options = {"out_dtype": case.dtype, "backend": backend}
        return nlpfast.add_layer_norm(part, residual, weight, bias, dropout_p, EPS, **options)

    def eager(part: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + F.dropout(part, dropout_p)
        norm = F.layer_norm(total, weight.shape, weight, bias, EPS)
        return norm if norm.dtype == torch.float64 else norm.to(case.dtype), total

    return ours if implementation == OURS else eager
