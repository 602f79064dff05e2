"""Attention, forward and backward, against PyTorch's own and against eager and compiled formulas.

Sizes are (B, H, L, S, D): batch, heads, query length, key length, head size.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import nlpfast
from nlpfast import dispatch, testing
from nlpfast.ops.attention import reference

from .measure import Settings, Step, check_errors, distance

OP = "attention"
OURS = "nlpfast"
# The strongest rival first: the quick run has time for one.
PEERS = ("sdpa", "eager", "compile")
SEED = 20_170_612


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: (B, H, L, S, D).
        causal: query i sees keys 0..i.
        dropout: the probability of dropping an attention probability.
        dtype: of inputs and outputs.
        transposed: inputs are views of [B, L, H, D] tensors, as a model's projections give them.
        fill: the share of keys that are real; sequences have 2 * fill - 1 .. 1 of S, and peers get a mask.
        goal: how many times faster than the first peer ours must be, None for sizes that are for information.
        best_goal: how many times faster than the fastest of the peers.
        quick: also part of the quick run.
    """

    shape: tuple[int, int, int, int, int]
    causal: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    transposed: bool = False
    fill: float = 1.0
    goal: float | None = None
    best_goal: float | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        """The size and what is special about it, in one line."""
        words = [str(self.shape).replace(" ", ""), str(self.dtype).removeprefix("torch.")]
        words += ["causal"] * self.causal + [f"dropout {self.dropout}"] * (self.dropout > 0)
        words += [f"{self.fill:.0%} real"] * (self.fill < 1)
        return " ".join(words + ["transposed views"] * self.transposed)


# Shape, causal; goals: float32, float32 with dropout, bfloat16, the same against the best peer, with dropout.
GOALS = (
    ((32, 8, 128, 128, 32), True, 3.0, 6.0, 12.0, 3.0, 10.0),
    ((32, 8, 64, 64, 64), False, 2.0, 3.0, 12.0, 2.0, 10.0),
    ((2, 12, 512, 512, 64), False, 1.3, 3.0, 3.0, 3.0, 10.0),
    ((1, 12, 1024, 1024, 64), True, 1.5, 5.0, 3.0, 3.0, 10.0),
)
BOTH = (torch.float32, torch.bfloat16)
SHORT = GOALS[0][0]
CASES = (
    *(Case(s, causal, goal=goal, quick=s == SHORT) for s, causal, goal, *_ in GOALS),
    *(Case(s, causal, 0.1, goal=goal, quick=s == SHORT) for s, causal, _, goal, *_ in GOALS),
    *(
        Case(s, causal, dtype=torch.bfloat16, goal=goal, best_goal=best, quick=s == SHORT)
        for s, causal, _, _, goal, best, _ in GOALS
    ),
    *(Case(s, causal, 0.1, torch.bfloat16, goal=goal) for s, causal, *_, goal in GOALS),
    # The bottleneck of a Perceiver, down and up, and a batch of BERT with padding.
    *(Case((8, 8, 64, 1024, 64), True, dtype=dtype, goal=10.0) for dtype in BOTH),
    *(Case((8, 8, 1024, 64, 64), dtype=dtype, goal=2.0) for dtype in BOTH),
    *(Case((32, 12, 128, 128, 64), fill=0.75, dtype=dtype, goal=1.3) for dtype in BOTH),
    *(Case(SHORT, True, transposed=True, dtype=dtype) for dtype in BOTH),
    Case(SHORT, True, dtype=torch.float16),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype}


def flops(case: Case) -> float:
    """Return the operations of a step: 2 products forward, 5 backward, 2*D for each visible pair."""
    B, H, L, S, D = case.shape
    pairs = L * S * case.fill
    if case.causal:
        # Query i sees keys 0..i: a triangle, cut off where there are fewer keys, or fewer queries.
        short = min(L, S)
        pairs = short * short / 2 + max(0, L - S) * S
    return 7 * 2 * pairs * D * B * H


def unavailable(implementation: str) -> str | None:
    """Return why an implementation cannot run on this machine, or None."""
    compiler = os.environ.get("CXX", "g++")
    if implementation == "compile" and shutil.which(compiler) is None:
        return f"torch.compile needs a C++ compiler and finds no {compiler}: install g++ or set CXX"
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    inputs, _ = _inputs(case, settings.device)
    request = (*inputs, None, _lengths(case, settings.device), None)
    module = dispatch.choose(OP, torch.device(settings.device).type, settings.backend, request)
    return module.__name__.rpartition(".")[2]


def prepare(case: Case, implementation: str, settings: Settings) -> Step:
    """Return one forward and backward pass of an implementation as a callable of no arguments."""
    inputs, grad_out = _inputs(case, settings.device)
    attend = _function(case, implementation, settings, case.dropout)

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), inputs, grad_out)

    return step


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Compare outputs and gradients with the float64 definition on the same inputs.

    Ours runs with this case's dropout and poisoned memory. A peer draws its own dropout mask, which cannot
    be repeated, so the peers run without dropout.

    Returns:
        Implementation to tensor (out, dq, dk, dv) to the largest absolute error.

    Raises:
        RuntimeError: an error of ours is over four times that of the definition in the case's own dtype.
    """
    inputs, grad_out = _inputs(case, settings.device)
    baseline = distance(
        _definition(case, settings.device, case.dropout, case.dtype),
        _definition(case, settings.device, case.dropout, torch.float64),
    )
    found = {}
    for name in implementations:
        dropout = case.dropout if name == OURS else 0.0
        attend = _function(case, name, settings, dropout, seed=SEED)
        with testing.poison() if name == OURS else contextlib.nullcontext():
            out = attend(*inputs)
            grads = torch.autograd.grad(out, inputs, grad_out)
        exact = _definition(case, settings.device, dropout, torch.float64)
        found[name] = distance([out.detach(), *grads], exact)
    check_errors(f"{OP} {case.name}", found[OURS], baseline)
    return found


def test_attention(benchmark: Callable[[Step], object], case: Case, implementation: str) -> None:
    """Time one implementation alone, for `pytest benchmarks --benchmark-only`."""
    benchmark(prepare(case, implementation, Settings()))


def _inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return query, key, value, which want gradients, and the upstream gradient; the same at every call."""
    B, H, L, S, D = case.shape
    generator = torch.Generator().manual_seed(SEED)
    tensors = []
    for length in (L, S, S, L):
        shape = (B, length, H, D) if case.transposed else (B, H, length, D)
        x = torch.randn(shape, generator=generator).to(device, case.dtype)
        tensors.append(x.transpose(1, 2) if case.transposed else x)
    return tuple(x.requires_grad_() for x in tensors[:3]), tensors[3]


def _function(
    case: Case, implementation: str, settings: Settings, dropout: float, seed: int | None = None
) -> Callable[..., Tensor]:
    """Return a function of query, key, value; `seed` is for ours, which alone can repeat a dropout mask."""
    if implementation == OURS:
        options = {"dropout_p": dropout, "is_causal": case.causal, "seed": seed, "backend": settings.backend}
        lengths = _lengths(case, settings.device)
        return lambda q, k, v: nlpfast.attention(q, k, v, key_lengths=lengths, **options)
    if implementation == "sdpa":
        mask = _real(case, settings.device)
        return lambda q, k, v: F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=case.causal
        )
    eager = _eager(case, settings.device, dropout)
    if implementation == "eager":
        return eager
    # Otherwise the functions of many cases share one cache, which is limited, and later ones fail to compile.
    torch.compiler.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def _lengths(case: Case, device: str) -> Tensor | None:
    """Return how many keys of each sequence are real, or None where all are."""
    B, S = case.shape[0], case.shape[3]
    if case.fill == 1.0:
        return None
    return torch.linspace((2 * case.fill - 1) * S, S, B, device=device).round().long()


def _real(case: Case, device: str) -> Tensor | None:
    """Return the same as a boolean mask [B, 1, 1, S]."""
    lengths = _lengths(case, device)
    return None if lengths is None else torch.arange(case.shape[3], device=device) < lengths.view(-1, 1, 1, 1)


def _eager(case: Case, device: str, dropout: float) -> Callable[..., Tensor]:
    """Return attention as models write it, with its mask made once."""
    _, _, L, S, D = case.shape
    hidden, real = (
        torch.ones(L, S, dtype=torch.bool, device=device).triu(1 if case.causal else S),
        _real(case, device),
    )
    if real is not None:
        hidden = hidden | ~real

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query @ key.mT * D**-0.5
        if case.causal or real is not None:
            scores = scores.masked_fill(hidden, -math.inf)
        probs = torch.softmax(scores, dim=-1)
        if dropout > 0.0:
            probs = F.dropout(probs, dropout)
        return probs @ value

    return attend


# Kept, because a run with another number of threads asks again.
@functools.cache
def _definition(case: Case, device: str, dropout: float, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv of the definition, computed in `dtype`."""
    inputs, grad_out = _inputs(case, device)
    query, key, value, grad_out = (x.detach().to(dtype) for x in (*inputs, grad_out))
    seed = torch.tensor([SEED, 0], device=device) if dropout > 0.0 else None
    lengths, causal = _lengths(case, device), "top_left" if case.causal else "none"
    rest = (None, lengths, None, seed, dropout, causal, case.shape[-1] ** -0.5)
    saved = reference.forward(query, key, value, *rest)
    dq, dk, dv, _ = reference.backward(grad_out, None, query, key, value, *saved, *rest)
    return saved[0], dq, dk, dv
