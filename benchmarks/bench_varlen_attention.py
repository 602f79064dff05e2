"""Attention on packed sequences, forward and backward, against attention on the same batch with padding.

That is what people do today: PyTorch's `varlen_attn` has no kernel for the CPU. The other peers are given the
padded batch and its mask; the time to pad and to unpad is not counted. Sizes are (B, H, L, D): sequences,
heads, the longest sequence, head size.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

import nlpfast
from nlpfast import dispatch, testing
from nlpfast.ops.varlen_attention import reference

from .bench_attention import SDPA, sdpa
from .gpu import Pass, Step
from .measure import Settings, check_errors, distance

OP = "varlen_attention"
OURS = "nlpfast"
# The strongest rival of PyTorch's first: the quick run has time for one.
PEERS = ("sdpa", "nlpfast.attention", "eager")
CUDA_PEERS = ("varlen_attn", "sdpa cudnn", "sdpa efficient", "nlpfast.attention", "sdpa math", "eager")
CUDA_QUICK_PEERS = 3
# They take sequences packed, as ours does.
PACKED = (OURS, "varlen_attn")
SEED = 20_170_612


@dataclass(frozen=True)
class Case:
    """One size.

    Attributes:
        shape: (B, H, L, D).
        fill: the share of the padded batch that is real; sequences have 2 * fill - 1 .. 1 of L.
        dtype: of inputs and outputs.
        goal: how many times faster than the first peer ours must be, None for sizes that are for information.
        best_goal: how many times faster than the fastest of the peers.
        quick: also part of the quick run.
    """

    shape: tuple[int, int, int, int]
    fill: float = 0.75
    dtype: torch.dtype = torch.float32
    goal: float | None = None
    best_goal: float | None = None
    quick: bool = False

    @property
    def name(self) -> str:
        """The size and what is special about it, in one line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{str(self.shape).replace(' ', '')} {dtype} {self.fill:.0%} real"


CASES = (
    Case((32, 12, 128, 64), goal=1.3, quick=True),
    Case((32, 12, 128, 64), dtype=torch.bfloat16, goal=1.3),
)
CUDA_CASES = (
    Case((256, 12, 128, 64), dtype=torch.bfloat16, goal=1.3, quick=True),
    Case((64, 12, 512, 64), dtype=torch.bfloat16),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"name": case.name, **asdict(case), "shape": list(case.shape), "dtype": dtype}


def flops(case: Case) -> float:
    """Return the operations of a step: 2 products forward, 5 backward, 2*D for each visible pair."""
    _, H, _, D = case.shape
    return 7 * 2 * sum(length * length for length in lengths_of(case)) * D * H


def traffic(case: Case) -> tuple[int, int]:
    """Return the bytes that a forward and a backward pass must move at the least; see bench_attention.py."""
    _, H, _, D = case.shape
    tensor = sum(lengths_of(case)) * H * D * case.dtype.itemsize
    return 4 * tensor + 4 * sum(lengths_of(case)) * H, 7 * tensor


def unavailable(implementation: str) -> str | None:
    """Return None: every implementation runs wherever PyTorch does."""
    return None


def unserved(case: Case, implementation: str) -> str | None:
    """Return why an implementation does not serve a case, where it is known."""
    if implementation in ("varlen_attn", "sdpa cudnn") and case.dtype == torch.float32:
        return "it computes in bfloat16 and float16"
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves ours."""
    inputs, _ = _inputs(case, settings.device)
    cu_seq = _cumulative(case, settings.device)
    device_type = torch.device(settings.device).type
    module = dispatch.choose(OP, device_type, settings.backend, (*inputs, cu_seq, cu_seq, case.shape[2]))
    return module.__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Pass]:
    """Return an implementation on each of some copies of the inputs."""
    attend = _function(case, implementation, settings)
    return [Pass(attend, *_layout(case, implementation, settings.device)) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Compare outputs and gradients with the float64 definition on the same inputs; ours in poisoned memory.

    Returns:
        Implementation to tensor (out, dq, dk, dv) to the largest absolute error.

    Raises:
        RuntimeError: an error of ours is over four times that of the definition in the case's own dtype.
    """
    if settings.device != "cpu" and OURS in implementations:
        # There is one number of threads there, and memory has other uses.
        _definition.cache_clear()
    exact = _definition(case, settings.device, torch.float64)
    found = {}
    for name in implementations:
        inputs, grad_out = _layout(case, name, settings.device)
        with testing.poison() if name == OURS else contextlib.nullcontext():
            out = _function(case, name, settings)(*inputs)
            results = [out.detach(), *torch.autograd.grad(out, inputs, grad_out)]
        if name not in PACKED:
            results = [_unpad(case, x) for x in results]
        found[name] = distance(results, exact)
        if name == OURS:
            baseline = distance(_definition(case, settings.device, case.dtype), exact)
            check_errors(f"{OP} {case.name}", found[name], baseline)
    return found


def test_varlen_attention(benchmark: Callable[[Step], object], case: Case, implementation: str) -> None:
    """Time one implementation alone, for `pytest benchmarks --benchmark-only`."""
    benchmark(passes(case, implementation, Settings(), 1)[0].step)


def lengths_of(case: Case) -> list[int]:
    """Return the lengths of the sequences, in an order without a rule."""
    B, _, L, _ = case.shape
    lengths = torch.linspace((2 * case.fill - 1) * L, L, B).round().long()
    return lengths[torch.randperm(B, generator=torch.Generator().manual_seed(SEED))].tolist()


def _cumulative(case: Case, device: str) -> Tensor:
    # Summed before it is sent: while memory is poisoned, PyTorch refuses some sums on a GPU.
    return torch.tensor([0, *lengths_of(case)]).cumsum(0).to(device)


def _inputs(case: Case, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return packed query, key, value and the upstream gradient, [total, H, D]; the same at every call."""
    _, H, _, D = case.shape
    generator = torch.Generator(device).manual_seed(SEED)
    drawn = torch.randn(4, sum(lengths_of(case)), H, D, generator=generator, device=device)
    query, key, value, grad_out = drawn.to(case.dtype)
    return (query, key, value), grad_out


def _layout(case: Case, implementation: str, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return the inputs, which want gradients, and the upstream gradient as an implementation wants them.

    The padded ones are contiguous [B, H, L, D], which suits the peers best.
    """
    inputs, grad_out = _inputs(case, device)
    if implementation not in PACKED:
        inputs, grad_out = tuple(_pad(case, x) for x in inputs), _pad(case, grad_out)
    return tuple(x.clone().requires_grad_() for x in inputs), grad_out


def _pad(case: Case, x: Tensor) -> Tensor:
    """Return [total, H, D] as [B, H, L, D] with zeros as padding."""
    B, H, L, D = case.shape
    padded = x.new_zeros(B, H, L, D)
    for b, part in enumerate(x.split(lengths_of(case))):
        padded[b, :, : len(part)] = part.transpose(0, 1)
    return padded


def _unpad(case: Case, x: Tensor) -> Tensor:
    """Return [B, H, L, D] as [total, H, D]."""
    return torch.cat([x[b, :, :length].transpose(0, 1) for b, length in enumerate(lengths_of(case))])


def _function(case: Case, implementation: str, settings: Settings) -> Callable[..., Tensor]:
    """Return a function of query, key and value in the implementation's layout."""
    L, device = case.shape[2], settings.device
    if implementation == OURS:
        cu_seq = _cumulative(case, device)
        return lambda q, k, v: nlpfast.varlen_attention(
            q, k, v, cu_seq, cu_seq, L, L, backend=settings.backend
        )
    if implementation == "varlen_attn":
        cu_seq = _cumulative(case, device).to(torch.int32)
        return lambda q, k, v: varlen_attn(q, k, v, cu_seq, cu_seq, L, L)
    lengths = torch.tensor(lengths_of(case), device=device)
    if implementation == "nlpfast.attention":
        return lambda q, k, v: nlpfast.attention(q, k, v, key_lengths=lengths, backend=settings.backend)
    real = torch.arange(L, device=device) < lengths.view(-1, 1, 1, 1)
    if implementation in SDPA:
        attend = sdpa(implementation)
        return lambda q, k, v: attend(q, k, v, real)
    factor, hidden = case.shape[3] ** -0.5, ~real

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query @ key.mT * factor).masked_fill(hidden, -math.inf)
        return torch.softmax(scores, dim=-1) @ value

    return eager


# Kept, because a run with another number of threads asks again.
@functools.cache
def _definition(case: Case, device: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return out, dq, dk, dv of the definition, computed in `dtype`."""
    inputs, grad_out = _inputs(case, device)
    query, key, value, grad_out = (x.to(dtype) for x in (*inputs, grad_out))
    _, _, L, D = case.shape
    cu_seq = _cumulative(case, device)
    rest = (cu_seq, cu_seq, L, L, None, 0.0, "none", D**-0.5)
    saved = reference.forward(query, key, value, *rest)
    return saved[0], *reference.backward(grad_out, None, query, key, value, *saved, *rest)
