"""Residual sum, dropout of 0.1 and layer norm, forward and backward, against PyTorch's three operations.

Shapes are (N, C): rows and channels. The dtype is that of what is added; the residual is float32, and the
norm has the dtype of the linear layer that reads it. `copy` moves the bytes that a step must: inputs and
outputs once each way. On a GPU all of it counts as a forward pass.
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

from .compiled import unavailable
from .measure import Settings, check_errors

__all__ = ["unavailable"]

OP = "add_layer_norm"
OURS = "nlpfast"
EAGER, COMPILED, COPY = "eager", "compile", "copy"
# The strongest rival first: the quick run has time for one.
PEERS = (EAGER, COPY)
CUDA_PEERS = (COMPILED, EAGER, COPY)
CUDA_QUICK_PEERS = 3
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
CUDA_CASES = (
    Case((32768, 768), torch.bfloat16, quick=True),
    Case((32768, 256), torch.bfloat16, quick=True),
    Case((32768, 768)),
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


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass must move at the least.

    Forward: what is added and the residual in, their sum and its norm out, and two statistics of a row.
    Backward: both upstream gradients, sum and statistics in, the gradients of the first two out.
    """
    N, C = case.shape
    return N * C * (2 * case.dtype.itemsize + 8) + 8 * N, N * C * (2 * case.dtype.itemsize + 12) + 8 * N


def unserved(case: Case, implementation: str) -> str | None:
    """Return None: every implementation serves every case."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    residual = torch.empty(1, case.shape[1], device=settings.device)
    request = (residual.to(case.dtype), residual, case.dtype)
    device_type = torch.device(settings.device).type
    return dispatch.choose(OP, device_type, settings.backend, request).__name__.rpartition(".")[2]


class Step:
    """An implementation on inputs of its own."""

    def __init__(self, case: Case, implementation: str, settings: Settings) -> None:
        self.tensors, self.upstream = _inputs(case, settings.device)
        self.function = _function(case, implementation, case.dropout_p, settings.backend)
        N, C = case.shape
        # part, residual, norm and sum, there and back
        nbytes = 2 * N * C * (2 * case.dtype.itemsize + 2 * 4)
        self.bytes = None
        if implementation == COPY:
            self.bytes = torch.empty(2, nbytes // 2, dtype=torch.uint8, device=settings.device)
        self.total: Tensor | None = None

    def forward(self) -> Tensor:
        """Return the norm, or the copy."""
        if self.bytes is not None:
            return self.bytes[0].copy_(self.bytes[1])
        norm, self.total = self.function(*self.tensors)
        return norm

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs, which for the copy are there."""
        if self.bytes is not None or self.total is None:
            return (out,)
        return torch.autograd.grad((out, self.total), self.tensors, self.upstream)

    def step(self) -> tuple[Tensor, ...]:
        """Run once."""
        return self.backward(self.forward())


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Any]:
    """Return an implementation's step, on some copies."""
    return [Step(case, implementation, settings) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of results and gradients against float64, without dropout."""
    tensors, upstream = _inputs(case, settings.device)
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


def _inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """Return part, residual, weight and bias, and the upstream gradients of norm and sum."""
    generator = torch.Generator().manual_seed(0)
    N, C = case.shape

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

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

    if implementation == COMPILED:
        # otherwise the functions of many cases share one cache, which is limited
        torch.compiler.reset()
        return torch.compile(eager, fullgraph=True, dynamic=False)
    return ours if implementation == OURS else eager
