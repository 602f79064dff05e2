"""Dropout of 0.1, forward and backward, against PyTorch's, and against a copy of what it moves.

On a GPU all of the copy counts as a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlpfast import dispatch
from nlpfast.ops.dropout import dropout

from .measure import Settings

OP = "dropout"
OURS = "nlpfast"
EAGER, COPY = "F.dropout", "copy"
# The strongest rival first: the quick run has time for one.
PEERS = CUDA_PEERS = (EAGER, COPY)
CUDA_QUICK_PEERS = 2
DROPOUT = 0.1


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: of the tensor.
        dtype: of its elements.
        goal: how many times faster than the first peer ours must be.
        quick: also part of the quick run.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    goal: float | None = None
    quick: bool = False
    best_goal: None = None

    @property
    def name(self) -> str:
        """The size and the dtype, in one line."""
        return f"{self.shape} {self.dtype}".replace(" ", "").replace("torch.", " ")


CASES = (
    Case((2048, 256), quick=True),
    Case((2048, 256), torch.bfloat16),
    Case((4096, 3072)),
    Case((4096, 3072), torch.bfloat16),
)
CUDA_CASES = (Case((32768, 768), torch.bfloat16), Case((32768, 768)))


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype}


def flops(case: Case) -> float:
    """Return the products, one an element each way; the time goes into moving them and into random bits."""
    return 2.0 * torch.Size(case.shape).numel()


def unavailable(implementation: str) -> str | None:
    """Return None: everything runs everywhere."""
    return None


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass must move at the least: all elements in and out."""
    nbytes = 2 * torch.Size(case.shape).numel() * case.dtype.itemsize
    return nbytes, nbytes


def unserved(case: Case, implementation: str) -> str | None:
    """Return None: every implementation serves every case."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    x = torch.empty(8, dtype=case.dtype, device=settings.device)
    return dispatch.choose(OP, x.device.type, settings.backend, (x,)).__name__.rpartition(".")[2]


class Step:
    """An implementation on an input of its own."""

    def __init__(self, case: Case, implementation: str, settings: Settings) -> None:
        generator = torch.Generator().manual_seed(0)
        x, self.upstream = (
            torch.randn(case.shape, generator=generator).to(settings.device, case.dtype) for _ in range(2)
        )
        self.x, self.implementation, self.backend = x.requires_grad_(), implementation, settings.backend
        self.target = torch.empty_like(x, requires_grad=False)

    def forward(self) -> Tensor:
        """Drop; or copy input and upstream gradient, of which the latter is returned."""
        if self.implementation == OURS:
            return dropout(self.x, DROPOUT, backend=self.backend)
        if self.implementation == EAGER:
            return F.dropout(self.x, DROPOUT)
        self.target.copy_(self.x.detach())
        return self.target.copy_(self.upstream)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient, which for the copy is there."""
        return (out,) if self.implementation == COPY else torch.autograd.grad(out, self.x, self.upstream)

    def step(self) -> tuple[Tensor, ...]:
        """Run once."""
        return self.backward(self.forward())


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Any]:
    """Return an implementation's step, on some copies."""
    return [Step(case, implementation, settings) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of what an implementation kept, against float64.

    Raises:
        RuntimeError: an error of ours is more than a rounding, or the share that was dropped is not 0.1.
    """
    found = {}
    for name in implementations:
        if name == COPY:
            found[name] = {"out": 0.0, "dx": 0.0}
            continue
        step = Step(case, name, settings)
        out = step.forward()
        (grad,) = step.backward(out)
        keep = out != 0
        factor = 65536 / (65536 - round(65536 * DROPOUT)) if name == OURS else 1 / (1 - DROPOUT)
        pairs = {"out": (out.detach(), step.x.detach()), "dx": (grad, step.upstream)}
        found[name] = {
            key: (y.double() - x.double() * factor * keep).abs().max().item() for key, (y, x) in pairs.items()
        }
        largest = max(x.double().abs().max().item() for _, x in pairs.values()) * factor
        dropped, n = 1 - keep.double().mean().item(), out.numel()
        # five standard deviations
        off = abs(dropped - DROPOUT) > 5 * (DROPOUT / n) ** 0.5
        if name == OURS and (max(found[name].values()) > torch.finfo(case.dtype).eps * largest or off):
            said = f"errors {found[name]}, {dropped:.4f} dropped"
            raise RuntimeError(f"{case.name}: {said}: fix the kernel")
    return found
