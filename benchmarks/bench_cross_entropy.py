"""Cross entropy with smoothed labels, forward and backward, against PyTorch's and a copy of the logits.

Sizes are (N, V): rows, classes. The copy, of the logits into memory that is there, is the time that a kernel
takes which reads the logits once and writes a gradient once. In place, a step's logits are the gradient of
the step before it. On a GPU the whole copy counts as a forward pass: ours writes the gradient there,
where its scale is known, and the backward pass only finds that it did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import nlpfast
from nlpfast import dispatch

from .compiled import unavailable
from .measure import Settings, check_errors

__all__ = ["unavailable"]

OP = "cross_entropy"
OURS = "nlpfast"
# The strongest rival first: the quick run has time for one.
PEERS = ("F.cross_entropy", "fairseq", "compile", "copy")
CUDA_PEERS = ("F.cross_entropy", "compile", "copy", "fairseq")
CUDA_QUICK_PEERS = 3
# Logits of so many bytes push each other out of any cache: one copy of them is enough.
LARGE = 2**30
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


CUDA_GOALS = (("F.cross_entropy", 3.0), ("compile", 1.5), ("copy", 0.9))

CASES = (
    Case((2048, 32000), goals=_goals(0.9)),
    Case((2048, 32000), torch.bfloat16, goals=_goals(0.65)),
    Case((2048, 50257), goals=_goals(0.9)),
    Case((2048, 50257), torch.bfloat16, goals=_goals(0.65)),
    Case((2048, 32000), inplace=True),
    Case((2048, 32000), torch.bfloat16, inplace=True),
    Case((4096, 1000), quick=True),
)
CUDA_CASES = tuple(
    Case(shape, dtype, goals=CUDA_GOALS, quick=shape[0] > 2048 and dtype == torch.bfloat16)
    for shape in ((16384, 32000), (16384, 50257), (2048, 32000))
    for dtype in (torch.bfloat16, torch.float32)
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


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass of ours must move at the least.

    Forward: the logits in, their gradient out; of a row the target, loss, nll, whether it is correct, and two
    statistics. Backward: the upstream gradient of a row.
    """
    N, V = case.shape
    return 2 * N * V * case.dtype.itemsize + 25 * N, 4 * N


def unserved(case: Case, implementation: str) -> str | None:
    """Return None: every implementation serves every case."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    device = torch.device(settings.device)
    x = torch.empty(1, 1, case.shape[1], dtype=case.dtype, device=device)
    target = torch.zeros(1, 1, dtype=torch.int64, device=device)
    return dispatch.choose(OP, device.type, settings.backend, (x, target)).__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[_Step]:
    """Return an implementation's step on each of some copies of the inputs."""
    nbytes = case.shape[0] * case.shape[1] * case.dtype.itemsize
    return [_Step(case, implementation, settings) for _ in range(1 if nbytes >= LARGE else copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of loss and gradient of 64 rows against float64; the copy has none."""
    x, target = _inputs(replace(case, shape=(min(case.shape[0], 64), case.shape[1])), settings.device)
    exact = _results(_pytorch, x.detach().double().requires_grad_(), target)
    found, rounding = {}, {}
    for name in {*implementations, "F.cross_entropy"}:
        if name == "copy":
            found[name], rounding[name] = dict.fromkeys(exact, 0.0), 0.0
            continue
        function = _function(case, name, settings)
        # a gradient takes the place of the logits: not of those that the others are given
        spared = functools.partial(_on_a_copy, function) if name == OURS and case.inplace else function
        results = _results(spared, x, target)
        found[name] = {key: (y.double() - exact[key]).abs().max().item() for key, y in results.items()}
        narrow = results["loss"].dtype not in (torch.float32, torch.float64)
        rounding[name] = narrow * torch.finfo(results["loss"].dtype).eps * exact["loss"].abs().item()
    if OURS in found:
        check_errors(case.name, found[OURS], found["F.cross_entropy"])
    if settings.device != "cpu":
        # Peers are held to the errors of ours there: a loss in 16 bits is no other loss.
        for name, each in found.items():
            each["loss"] = max(0.0, each["loss"] - rounding[name])
    return found


class _Step:
    """Forward and backward of one implementation on inputs of its own."""

    def __init__(self, case: Case, implementation: str, settings: Settings) -> None:
        self.x, self.target = _inputs(case, settings.device)
        self.copied = torch.empty_like(self.x) if implementation == "copy" else None
        self.loss = None if implementation == "copy" else _function(case, implementation, settings)

    def forward(self) -> Tensor:
        """Return the loss, or the copy."""
        if self.loss is None:
            assert self.copied is not None
            return self.copied.detach().copy_(self.x.detach())
        return self.loss(self.x, self.target)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradient of the logits, which for the copy is there."""
        return (out,) if self.loss is None else torch.autograd.grad(out, self.x)

    def step(self) -> tuple[Tensor, ...]:
        """Run once."""
        return self.backward(self.forward())


def _inputs(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Return logits, which want a gradient, and targets; the same at every call."""
    generator = torch.Generator(device).manual_seed(0)
    N, V = case.shape
    x = torch.empty(N, V, dtype=case.dtype, device=device)
    for row in x.split(1 if device == "cpu" else 1024):
        row.copy_(2 * torch.randn(row.shape, generator=generator, device=device))
    return x.requires_grad_(), torch.randint(V, (N,), generator=generator, device=device)


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
