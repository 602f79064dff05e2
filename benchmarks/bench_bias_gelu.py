"""Bias and GELU between two linear layers, forward and backward, against PyTorch's operations.

Shapes are (N, C): rows and channels. `copy` moves the bytes that a step must: x and the output forward, x and
both gradients backward; on a GPU all of it counts as a forward pass. PyTorch keeps the sum for its backward
pass, ours what the linear layer gave.
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

OP = "bias_gelu"
OURS = "nlpfast"
EAGER, COMPILED, COPY = "eager", "compile", "copy"
# The strongest rival first: the quick run has time for one.
PEERS = (EAGER, COPY)
CUDA_PEERS = (COMPILED, EAGER, COPY)
CUDA_QUICK_PEERS = 3


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: (N, C).
        dtype: of x and of the result; the bias of PyTorch's has it too, ours is float32, as under autocast.
        approximate: as of `F.gelu`.
        dropout_p: of the result.
        goal: how many times faster than the first peer ours must be.
        quick: also part of the quick run.
    """

    shape: tuple[int, int]
    dtype: torch.dtype = torch.float32
    approximate: str = "none"
    dropout_p: float = 0.0
    goal: float | None = None
    quick: bool = False
    best_goal: None = None

    @property
    def name(self) -> str:
        """The size and what is special about it, in one line."""
        words = f"{self.shape} {self.dtype}".replace(" ", "").replace("torch.", " ")
        words += " tanh" if self.approximate == "tanh" else ""
        return f"{words} with dropout" if self.dropout_p else words


CASES = (
    Case((2048, 1024), quick=True),
    Case((2048, 1024), torch.bfloat16),
    Case((2048, 1024), approximate="tanh"),
    Case((2048, 1024), torch.bfloat16, approximate="tanh"),
    Case((2048, 1024), torch.bfloat16, dropout_p=0.1),
    Case((4096, 3072)),
    Case((4096, 3072), torch.bfloat16),
)
CUDA_CASES = (
    Case((32768, 1024), torch.bfloat16, quick=True),
    Case((32768, 1024), torch.bfloat16, dropout_p=0.1),
    Case((16384, 3072), torch.bfloat16),
)

Function = Callable[[Tensor, Tensor], Tensor]


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype}


def flops(case: Case) -> float:
    """Return about how many operations there are, sixty an element."""
    N, C = case.shape
    return 60.0 * N * C


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass must move at the least.

    Forward: x in, the result out. Backward: the upstream gradient and x in, the gradient of x out.
    """
    N, C = case.shape
    return 2 * N * C * case.dtype.itemsize, 3 * N * C * case.dtype.itemsize


def unserved(case: Case, implementation: str) -> str | None:
    """Return None: every implementation serves every case."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    x = torch.empty(1, 8, dtype=case.dtype, device=settings.device)
    return dispatch.choose(OP, x.device.type, settings.backend, (x,)).__name__.rpartition(".")[2]


class Step:
    """An implementation on inputs of its own."""

    def __init__(self, case: Case, implementation: str, settings: Settings) -> None:
        self.tensors, self.upstream = _inputs(case, implementation, settings.device)
        self.function = _function(case, implementation, case.dropout_p, settings.backend)
        N, C = case.shape
        # two tensors there and three back
        nbytes = 5 * N * C * case.dtype.itemsize
        self.bytes = None
        if implementation == COPY:
            self.bytes = torch.empty(2, nbytes // 2, dtype=torch.uint8, device=settings.device)

    def forward(self) -> Tensor:
        """Return the result, or the copy."""
        return self.function(*self.tensors) if self.bytes is None else self.bytes[0].copy_(self.bytes[1])

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of x and bias, which for the copy are there."""
        return (out,) if self.bytes is not None else torch.autograd.grad(out, self.tensors, self.upstream)

    def step(self) -> tuple[Tensor, ...]:
        """Run once."""
        return self.backward(self.forward())


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Any]:
    """Return an implementation's step, on some copies."""
    return [Step(case, implementation, settings) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of result and gradients against float64, without dropout."""
    tensors, upstream = _inputs(case, OURS, settings.device)
    wide = tuple(x.detach().double().requires_grad_() for x in tensors)
    exact = _results(_function(case, EAGER, 0.0, None), wide, upstream.double())
    found = {}
    for name in dict.fromkeys((EAGER, *implementations)):
        if name == COPY:
            found[name] = dict.fromkeys(exact, 0.0)
            continue
        tensors, upstream = _inputs(case, name, settings.device)
        results = _results(_function(case, name, 0.0, settings.backend), tensors, upstream)
        found[name] = {key: (x.double() - exact[key]).abs().max().item() for key, x in results.items()}
    if OURS in found:
        check_errors(case.name, found[OURS], found[EAGER])
    return {name: found[name] for name in found if name in implementations}


def _inputs(case: Case, implementation: str, device: str) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return x and bias, and the upstream gradient."""
    generator = torch.Generator().manual_seed(0)
    N, C = case.shape
    x, upstream = (torch.randn(N, C, generator=generator).to(device, case.dtype) for _ in range(2))
    # rounded for all alike
    bias = torch.randn(C, generator=generator).to(device, case.dtype)
    bias = bias.float() if implementation == OURS else bias
    return (x.requires_grad_(), bias.requires_grad_()), upstream


def _results(function: Function, tensors: tuple[Tensor, Tensor], upstream: Tensor) -> dict[str, Tensor]:
    out = function(*tensors)
    dx, d_bias = torch.autograd.grad(out, tensors, upstream)
    return {"out": out.detach(), "dx": dx, "d_bias": d_bias}


def _function(case: Case, implementation: str, dropout_p: float, backend: str | None) -> Function:
    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return nlpfast.bias_gelu(x, bias, dropout_p, approximate=case.approximate, backend=backend)

    def eager(x: Tensor, bias: Tensor) -> Tensor:
        out = F.gelu(x + bias, approximate=case.approximate)
        return F.dropout(out, dropout_p) if dropout_p else out

    if implementation == COMPILED:
        # otherwise the functions of many cases share one cache, which is limited
        torch.compiler.reset()
        return torch.compile(eager, fullgraph=True, dynamic=False)
    return ours if implementation == OURS else eager
