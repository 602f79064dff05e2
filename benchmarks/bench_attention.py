"""Attention, forward and backward, against PyTorch's own and against eager and compiled formulas.

On a GPU PyTorch's own is every backend of its `scaled_dot_product_attention`, and FlexAttention.
Sizes are (B, H, L, S, D): batch, heads, query length, key length, head size.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import nlpfast
from nlpfast import dispatch, testing
from nlpfast.ops.attention import reference

from .compiled import unavailable
from .gpu import Pass, Step
from .measure import Settings, check_errors, distance

__all__ = ["unavailable"]

OP = "attention"
OURS = "nlpfast"
# The strongest rival first: the quick run has time for one.
PEERS = ("sdpa", "eager", "compile")
SDPA = {  # PyTorch's attention by name: as it chooses itself, or held to one backend
    "sdpa": None,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
CUDA_PEERS = ("sdpa flash", "sdpa cudnn", "sdpa efficient", "sdpa math", "eager", "compile", "flex")
CUDA_QUICK_PEERS = 3
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
        backward_goal: the same of the backward pass alone, on a GPU.
        quick: also part of the quick run.
        sweep: one of as many tokens in longer and longer sequences, for the picture.
    """

    shape: tuple[int, int, int, int, int]
    causal: bool = False
    dropout: float = 0.0
    dtype: torch.dtype = torch.float32
    transposed: bool = False
    fill: float = 1.0
    goal: float | None = None
    best_goal: float | None = None
    backward_goal: float | None = None
    quick: bool = False
    sweep: bool = False

    @property
    def peers(self) -> tuple[str, ...]:
        """Those of `PEERS` that it has: compiling takes a minute."""
        return tuple(name for name in PEERS if name != "compile") if self.sweep else PEERS

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
SHORT, LENGTHS = GOALS[0][0], (64, 128, 256, 512, 1024, 2048)
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
    *(Case((4096 // T, 8, T, T, 64), True, dtype=d, sweep=True) for T in LENGTHS for d in BOTH),
)

# Shape, causal; goals on an H200: bfloat16, its backward pass, with dropout.
CUDA_GOALS = (
    ((256, 8, 128, 128, 32), True, 1.6, 1.8, 1.6),
    ((256, 12, 128, 128, 64), False, 1.6, 1.8, 1.6),
    ((128, 12, 256, 256, 64), True, 1.6, 1.8, 1.6),
    ((64, 12, 512, 512, 64), False, 1.0, 1.0, 1.6),
    ((64, 12, 1024, 1024, 64), True, 1.0, 1.0, 1.6),
    # The bottleneck of a Perceiver, down and up; attention of a translation's words to the source's.
    ((64, 8, 64, 1024, 64), True, None, 2.0, None),
    ((64, 8, 1024, 64, 64), False, None, 1.6, None),
    ((128, 8, 64, 64, 64), False, 1.6, 1.8, 1.6),
)
CUDA_SHORT = CUDA_GOALS[0][0]
CUDA_CASES = (
    *(
        Case(s, causal, dtype=torch.bfloat16, goal=goal, backward_goal=backward, quick=True)
        for s, causal, goal, backward, _ in CUDA_GOALS
    ),
    *(
        Case(s, causal, 0.1, torch.bfloat16, goal=goal, quick=s == CUDA_SHORT)
        for s, causal, _, _, goal in CUDA_GOALS
    ),
    Case((256, 12, 128, 128, 64), fill=0.75, dtype=torch.bfloat16, goal=1.3, quick=True),
    Case(CUDA_SHORT, True, dtype=torch.float16, quick=True),
    Case(CUDA_SHORT, True, transposed=True, dtype=torch.bfloat16, quick=True),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    plain = {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype}
    if case.backward_goal is None:
        del plain["backward_goal"]
    return plain


def flops(case: Case) -> float:
    """Return the operations of a step: 2 products forward, 5 backward, 2*D for each visible pair."""
    B, H, L, S, D = case.shape
    pairs = L * S * case.fill
    if case.causal:
        # Query i sees keys 0..i: a triangle, cut off where there are fewer keys, or fewer queries.
        short = min(L, S)
        pairs = short * short / 2 + max(0, L - S) * S
    return 7 * 2 * pairs * D * B * H


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass must move at the least.

    Forward: query, key, value, output, and a float32 number a row. Backward: the first three, the upstream
    gradient, and three gradients; 14 bytes for a 16-bit number of each. Keys that no query sees are not read,
    but their gradients are written.
    """
    B, H, L, S, D = case.shape
    lengths = lengths_of(case, "cpu")
    most = min(L, S) if case.causal else S
    seen = B * most if lengths is None else int(lengths.clamp(max=most).sum())
    queries, keys, seen = (rows * H * D * case.dtype.itemsize for rows in (B * L, B * S, seen))
    return 2 * queries + 2 * seen + 4 * B * H * L, 3 * queries + 2 * seen + 2 * keys


def unserved(case: Case, implementation: str) -> str | None:
    """Return why an implementation does not serve a case, where it is known or would not be said."""
    if implementation == "sdpa flash" and case.fill < 1:
        return "it takes no mask"
    if implementation in ("sdpa flash", "sdpa cudnn") and case.dtype == torch.float32:
        return "it computes in bfloat16 and float16"
    if implementation == "flex" and case.dropout > 0:
        return "it has no dropout"
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    inputs, _ = _inputs(case, settings.device)
    request = (*inputs, None, lengths_of(case, settings.device), None)
    module = dispatch.choose(OP, torch.device(settings.device).type, settings.backend, request)
    return module.__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Pass]:
    """Return an implementation on each of some copies of the inputs."""
    attend = _function(case, implementation, settings, case.dropout)
    return [Pass(attend, *_inputs(case, settings.device)) for _ in range(copies)]


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
    if settings.device != "cpu" and OURS in implementations:
        # There is one number of threads there, and memory has other uses.
        _definition.cache_clear()
    found = {}
    for name in implementations:
        dropout = case.dropout if name == OURS else 0.0
        attend = _function(case, name, settings, dropout, seed=SEED)
        with testing.poison() if name == OURS else contextlib.nullcontext():
            out = attend(*inputs)
            grads = torch.autograd.grad(out, inputs, grad_out)
        exact = _definition(case, settings.device, dropout, torch.float64)
        found[name] = distance([out.detach(), *grads], exact)
        if name == OURS:
            baseline = distance(_definition(case, settings.device, dropout, case.dtype), exact)
            check_errors(f"{OP} {case.name}", found[name], baseline)
    return found


def test_attention(benchmark: Callable[[Step], object], case: Case, implementation: str) -> None:
    """Time one implementation alone, for `pytest benchmarks --benchmark-only`."""
    benchmark(passes(case, implementation, Settings(), 1)[0].step)


def _inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return query, key, value, which want gradients, and the upstream gradient; the same at every call."""
    B, H, L, S, D = case.shape
    generator = torch.Generator(device).manual_seed(SEED)
    tensors = []
    for length in (L, S, S, L):
        shape = (B, length, H, D) if case.transposed else (B, H, length, D)
        x = torch.randn(shape, generator=generator, device=device).to(case.dtype)
        tensors.append(x.transpose(1, 2) if case.transposed else x)
    return tuple(x.requires_grad_() for x in tensors[:3]), tensors[3]


def _function(
    case: Case, implementation: str, settings: Settings, dropout: float, seed: int | None = None
) -> Callable[..., Tensor]:
    """Return a function of query, key, value; `seed` is for ours, which alone can repeat a dropout mask."""
    if implementation == OURS:
        options = {"dropout_p": dropout, "is_causal": case.causal, "seed": seed, "backend": settings.backend}
        lengths = lengths_of(case, settings.device)
        return lambda q, k, v: nlpfast.attention(q, k, v, key_lengths=lengths, **options)
    if implementation in SDPA:
        attend, mask = sdpa(implementation), _real(case, settings.device)
        return lambda q, k, v: attend(q, k, v, mask, dropout_p=dropout, is_causal=case.causal)
    if implementation == "flex":
        return _flex(case, settings.device)
    eager = _eager(case, settings.device, dropout)
    if implementation == "eager":
        return eager
    # Otherwise the functions of many cases share one cache, which is limited, and later ones fail to compile.
    torch.compiler.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def sdpa(name: str) -> Callable[..., Tensor]:
    """Return PyTorch's attention by its name in SDPA."""
    backend = SDPA[name]
    if backend is None:
        return F.scaled_dot_product_attention

    def attend(*inputs: Tensor | None, **options: float) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*inputs, **options)

    return attend


def _flex(case: Case, device: str) -> Callable[..., Tensor]:
    """Return FlexAttention, compiled, with its block mask made once."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    B, _, L, S, _ = case.shape
    lengths = lengths_of(case, device)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        real = j < (S if lengths is None else lengths[b])
        return real & (j <= i) if case.causal else real

    mask = None
    if case.causal or lengths is not None:
        mask = create_block_mask(visible, None if lengths is None else B, None, L, S, device=device)
    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    return lambda q, k, v: attend(q, k, v, block_mask=mask)


def lengths_of(case: Case, device: str) -> Tensor | None:
    """Return how many keys of each sequence are real, or None where all are."""
    B, S = case.shape[0], case.shape[3]
    if case.fill == 1.0:
        return None
    return torch.linspace((2 * case.fill - 1) * S, S, B, device=device).round().long()


def _real(case: Case, device: str) -> Tensor | None:
    """Return the same as a boolean mask [B, 1, 1, S]."""
    lengths = lengths_of(case, device)
    return None if lengths is None else torch.arange(case.shape[3], device=device) < lengths.view(-1, 1, 1, 1)


def _eager(case: Case, device: str, dropout: float) -> Callable[..., Tensor]:
    """Return attention as models write it, with its mask made once."""
    _, _, L, S, D = case.shape
    hidden = torch.ones(L, S, dtype=torch.bool, device=device).triu(1 if case.causal else S)
    real = _real(case, device)
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
    lengths, causal = lengths_of(case, device), "top_left" if case.causal else "none"
    rest = (None, lengths, None, seed, dropout, causal, case.shape[-1] ** -0.5)
    saved = reference.forward(query, key, value, *rest)
    dq, dk, dv, _ = reference.backward(grad_out, None, query, key, value, *saved, *rest)
    return saved[0], dq, dk, dv
