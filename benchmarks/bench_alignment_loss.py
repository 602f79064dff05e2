"""Attention supervised at one pair a query, forward and backward, against attention alone and the eager way.

Shapes are (B, H, L, S, D). Ours is attention and alignment loss together; "attention" is the same call
without the loss; "eager" forms the probabilities, as fairseq's criterion wants them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

import nlpfast
from nlpfast import dispatch
from nlpfast.testing import make_inputs

from .gpu import Pass
from .measure import Settings, check_errors

OP = "alignment_loss"
OURS = "nlpfast"
# The strongest rival first: the quick run has time for one.
PEERS = ("eager", "attention")
CUDA_PEERS = PEERS
CUDA_QUICK_PEERS = 2
LAMBDA = 0.05

Total = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: (B, H, L, S, D).
        dtype: of query, key and value.
        heads: how many are supervised, None for all.
        goals: how many times faster than a peer ours must be, by the peer's name.
        quick: also part of the quick run.
    """

    shape: tuple[int, int, int, int, int]
    dtype: torch.dtype = torch.float32
    heads: int | None = None
    goals: tuple[tuple[str, float], ...] = ()
    quick: bool = False
    goal: None = None
    best_goal: None = None

    @property
    def name(self) -> str:
        """The size and what is special about it, in one line."""
        words = [str(self.shape).replace(" ", ""), str(self.dtype).removeprefix("torch.")]
        return " ".join(words + ([] if self.heads is None else [f"{self.heads} head"]))


def _goals(eager: float) -> tuple[tuple[str, float], ...]:
    # attention and loss in at most 1.25 times attention's time
    return (("eager", eager), ("attention", 0.8))


SHAPES = ((32, 8, 64, 64, 64), (128, 8, 64, 64, 64))
CASES = (
    *(Case(shape, goals=_goals(1.6), quick=shape == SHAPES[0]) for shape in SHAPES),
    *(Case(shape, torch.bfloat16, goals=_goals(2.0)) for shape in SHAPES),
    Case(SHAPES[1], heads=1),
)
CUDA_CASES = tuple(
    Case(SHAPES[1], dtype, heads, goals=_goals(4.0), quick=heads is None)
    for dtype in (torch.bfloat16, torch.float32)
    for heads in (None, 1)
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    goals = dict(case.goals)
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype, "goals": goals}


def flops(case: Case) -> float:
    """Return the operations of attention's products; those at the pairs are as good as none."""
    B, H, L, S, D = case.shape
    return 14.0 * B * H * L * S * D


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass must move at the least: attention's."""
    B, H, L, S, D = case.shape
    queries, keys = B * H * L * D * case.dtype.itemsize, B * H * S * D * case.dtype.itemsize
    return 2 * queries + 2 * keys, 4 * queries + 4 * keys


def unavailable(implementation: str) -> str | None:
    """Return None: everything runs everywhere."""
    return None


def unserved(case: Case, implementation: str) -> str | None:
    """Return None: every implementation serves every case."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    device = torch.device(settings.device)
    x, pairs = (
        torch.empty(1, 1, 1, 8, dtype=case.dtype, device=device),
        torch.zeros(1, 3, device=device).long(),
    )
    request = (x, x, x[..., 0].float(), pairs)
    return dispatch.choose(OP, device.type, settings.backend, request).__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Pass]:
    """Return an implementation's step on each of some copies of the inputs."""
    found = []
    for _ in range(copies):
        tensors, pairs, upstream = _inputs(case, settings.device)
        total = _function(case, implementation, settings, pairs, upstream)
        found.append(Pass(total, tensors, torch.ones((), device=settings.device)))
    return found


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the largest errors of loss and gradients of one batch entry against float64."""
    case = replace(case, shape=(1, *case.shape[1:]))
    tensors, pairs, upstream = _inputs(case, settings.device)
    found = {}
    for name in dict.fromkeys(("eager", *implementations)):
        # attention alone has another value, and other gradients
        base = "attention" if name == "attention" else "eager"
        wide = tuple(x.detach().double().requires_grad_() for x in tensors)
        exact = _results(_function(case, base, settings, pairs, upstream.double()), wide)
        results = _results(_function(case, name, settings, pairs, upstream), tensors)
        found[name] = {key: (y.double() - exact[key]).abs().max().item() for key, y in results.items()}
    if OURS in found:
        check_errors(case.name, found[OURS], found["eager"])
    return {name: found[name] for name in found if name in implementations}


def _inputs(case: Case, device: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
    """Return query, key and value, a pair for each query, and the upstream gradient of attention's output."""
    B, _, L, S, _ = case.shape
    tensors = make_inputs(*case.shape, dtype=case.dtype, device=device, requires_grad=True)
    generator = torch.Generator().manual_seed(1)
    entry, row = (x.flatten() for x in torch.meshgrid(torch.arange(B), torch.arange(L), indexing="ij"))
    column = torch.randint(S, (B * L,), generator=generator)
    upstream = torch.randn(tensors[0].shape, generator=generator).to(device, case.dtype)
    return tensors, torch.stack((entry, row, column), 1).to(device), upstream


def _results(total: Total, tensors: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    value = total(*tensors)
    return {
        "total": value.detach(),
        **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(value, tensors), strict=True)),
    }


def _function(case: Case, implementation: str, settings: Settings, pairs: Tensor, upstream: Tensor) -> Total:
    """Return the sum of attention's output times its upstream gradient, and of the loss."""
    heads = case.shape[1] if case.heads is None else case.heads
    b, t, s = pairs.unbind(1)
    attending = _of_attention(case, settings)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        mean = p[:, :heads].to(torch.promote_types(q.dtype, torch.float32)).mean(1)
        loss = -mean[b, t, s].log().sum()
        return _output(p @ v, upstream) + LAMBDA * loss

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = nlpfast.attention(q, k, v, return_lse=True, backend=attending)
        return _output(out, upstream)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = nlpfast.attention(q, k, v, return_lse=True, backend=attending)
        loss = nlpfast.alignment_loss(q, k, lse, pairs, heads=heads, backend=settings.backend)
        return _output(out, upstream) + LAMBDA * loss

    return {OURS: ours, "attention": attention, "eager": eager}[implementation]


def _of_attention(case: Case, settings: Settings) -> str | None:
    """Return the backend that was asked for, if it serves attention of this case too."""
    x = torch.empty(1, 1, case.shape[3], case.shape[4], dtype=case.dtype, device=settings.device)
    module = dispatch.registry["attention"].get(settings.backend or "", "")
    unserved = isinstance(module, str) or module.refusal(x, x, x, None, None, None) is not None
    return None if unserved else settings.backend


def _output(out: Tensor, upstream: Tensor) -> Tensor:
    """Return 0 in whose backward pass the output gets the upstream gradient, and that takes no other time."""
    return _Upstream.apply(out, upstream)


class _Upstream(torch.autograd.Function):
    """Hand an upstream gradient to a tensor."""

    @staticmethod
    def forward(ctx, out: Tensor, upstream: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        """Return 0."""
        ctx.upstream = upstream
        return out.new_zeros((), dtype=torch.promote_types(out.dtype, torch.float32))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        """Return the upstream gradient."""
        return ctx.upstream, None
