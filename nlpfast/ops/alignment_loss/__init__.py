"""Attention's probabilities at pairs, supervised or read: arguments, backends and the autograd.Function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from nlpfast import dispatch, native
from nlpfast.ops.additions import PairGradients, link_to
from nlpfast.ops.alignment_loss import reference
from nlpfast.ops.attention import autocast
from nlpfast.ops.second_derivative import refuse_second_derivative

_backends: dict[str, ModuleType | str] = {
    "cpu": native.status(),
    "triton": dispatch.triton_status(),
    "cuda": dispatch.cuda_status(),
}
if native.status() == "ok":
    from nlpfast.ops.alignment_loss import cpu

    _backends["cpu"] = cpu
if dispatch.triton_status() == "ok":
    from nlpfast.ops.alignment_loss import triton

    _backends["triton"] = triton
if dispatch.cuda_status() == "ok":
    from nlpfast.ops.alignment_loss import cuda

    _backends["cuda"] = cuda
dispatch.registry["alignment_loss"] = {**_backends, "reference": reference}

NO_SECOND = (
    "alignment_loss has no second derivatives: use the weights of F.softmax, or drop create_graph=True"
)
REDUCTIONS = ("none", "sum", "mean")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def alignment_loss(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    pairs: Tensor,
    weights: Tensor | None = None,
    *,
    heads: int | Sequence[int] | None = None,
    scale: float | None = None,
    reduction: str = "sum",
    backend: str | None = None,
) -> Tensor:
    """Compute ``-sum_p w_p log a_p``, a being attention's probability at a pair, from query, key and lse.

    Equivalent PyTorch, which forms all L x S probabilities::

        probabilities = F.softmax(scale * query @ key.mT, -1)[:, heads].float().mean(1)
        -(weights * probabilities[pairs[:, 0], pairs[:, 1], pairs[:, 2]].log()).sum()

    Time and memory here are of the order of the pairs. `lse` is what ``nlpfast.attention`` returned for the
    same query and key with ``return_lse=True``, before any dropout; the gradient reaches the keys that no
    pair names through it. The logarithm of a probability is finite also where the probability is not
    (gaps of 200 between scores). Pairs must be visible to attention, and an additive mask 0 there: of masks
    only lse knows. A query that sees no key has the probability 0 everywhere.

    Args:
        query: [B, H, L, D], float32, bfloat16, float16 or float64; any strides.
        key: [B, Hk, S, D], in the query's dtype; query head h reads key head ``h // (H // Hk)``.
        lse: [B, H, L], float32 (float64 for float64).
        pairs: [P, 3], int64: batch entry, target row (query), source column (key). Pairs may repeat.
        weights: [P], or None for fairseq's: 1 / the number of pairs with the same batch entry and row.
        heads: the first so many, or their numbers, whose mean probability is supervised; None for all.
        scale: the factor of the scores that attention was given; 1 / sqrt(D) if None.
        reduction: "sum"; "mean", over the sum of the weights; "none", [P].
        backend: a backend's name, which then never falls back on another, or None for the first of the
            device's list that serves the call.

    Returns:
        The loss in nats, float32 (float64 for float64); 0 for no pairs (NaN as their mean).

    Raises:
        ValueError: for shapes, values or names that do not fit; on the CPU and in uncompiled code for pairs
            outside of batch, rows and columns.
        TypeError: for dtypes that do not fit.
        RuntimeError: when the named backend cannot serve the call, or a second derivative is asked for.

    Paper: Garg et al., "Jointly learning to align and translate with Transformer models", 2019.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; it must be one of {REDUCTIONS}: pass one of them")
    log_mean = _log_mean(query, key, lse, pairs, heads, scale, backend)
    if weights is None:
        weights = pair_weights(pairs, query.shape[2], query.shape[0], log_mean.dtype)
    elif weights.shape != pairs.shape[:1]:
        rule = f"it must be [P] = {list(pairs.shape[:1])}"
        raise ValueError(f"weights has the shape {list(weights.shape)}; {rule}: give a pair a weight")
    losses = -weights * log_mean
    if reduction == "none":
        return losses
    return losses.sum() / weights.sum() if reduction == "mean" else losses.sum()


def attention_at(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    pairs: Tensor,
    *,
    heads: int | Sequence[int] | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return attention's mean probability over heads at each pair, [P], differentiable.

    Args:
        query: see ``alignment_loss``.
        key: see ``alignment_loss``.
        lse: see ``alignment_loss``.
        pairs: see ``alignment_loss``.
        heads: see ``alignment_loss``.
        scale: see ``alignment_loss``.
        backend: see ``alignment_loss``.

    Raises:
        ValueError: see ``alignment_loss``.
        TypeError: see ``alignment_loss``.
        RuntimeError: see ``alignment_loss``.
    """
    return _log_mean(query, key, lse, pairs, heads, scale, backend).exp()


@torch.no_grad()
def hard_alignment(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    *,
    heads: int | Sequence[int] | None = None,
    source_lengths: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return the key of each query with the largest mean probability over heads, the first of equals.

    Keys go by under a running maximum: no more than a block of probabilities is there at a time.

    Args:
        query: see ``alignment_loss``.
        key: see ``alignment_loss``.
        lse: see ``alignment_loss``.
        heads: see ``alignment_loss``.
        source_lengths: int64 [B]: keys from there on are not looked at; None for all.
        scale: see ``alignment_loss``.
        backend: "cuda" or "reference"; None for the latter.

    Returns:
        int64 [B, L]; -1 where there are no keys.

    Raises:
        ValueError: see ``alignment_loss``.
        TypeError: see ``alignment_loss``.
        RuntimeError: when the named backend cannot serve the call.
    """
    numbers = _check(query, key, lse, None, heads)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    if backend in (None, "reference"):
        return reference.hard_alignment(query, key, lse, source_lengths, numbers, scale)
    module = dispatch.choose("alignment_loss", query.device.type, backend, (query, key, lse, None))
    if not hasattr(module, "hard_alignment"):
        raise RuntimeError(f"backend={backend!r} has no hard_alignment: leave the choice to backend=None")
    found: Tensor = module.hard_alignment(query, key, lse, source_lengths, numbers, scale)
    return found


def pair_weights(pairs: Tensor, rows: int, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return 1 / the number of pairs with the same batch entry and row, [P].

    Args:
        pairs: int64 [P, 3]: batch entry, row, column.
        rows: a number that no row reaches.
        batch: a number that no batch entry reaches.
        dtype: of the result.
    """
    # a GPU does not look whether pairs are there before: the kernels find out
    place = (pairs[:, 0] * rows + pairs[:, 1]).clamp(0, max(batch * rows - 1, 0))
    ones = torch.ones(len(pairs), dtype=dtype, device=pairs.device)
    return 1.0 / ones.new_zeros(batch * rows).index_add_(0, place, ones)[place]


def _log_mean(
    query: Tensor,
    key: Tensor,
    lse: Tensor,
    pairs: Tensor,
    heads: int | Sequence[int] | None,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """Return the logarithm of the mean probability at each pair."""
    device_type = query.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        query, key = autocast(query, key)
    numbers = _check(query, key, lse, pairs, heads)
    if device_type == "cpu" and not torch.compiler.is_compiling():
        native.join_no_lost_threads()
        _check_pairs(pairs, (query.shape[0], query.shape[2], key.shape[2]))
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else scale
    module = dispatch.choose("alignment_loss", device_type, backend, (query, key, lse, pairs))
    if not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or lse.requires_grad)):
        return _joined(module.forward(query, key, lse, pairs, numbers, scale))
    terms = _Terms.apply(query, key, lse, pairs, numbers, scale, module, link_to(lse, query, key))
    return _joined(terms)


def _joined(terms: Tensor) -> Tensor:
    """Return log mean exp over the heads, [P] from [P, n]."""
    if terms.shape[1] == 1:
        return terms.squeeze(1)
    return terms.logsumexp(1) - math.log(terms.shape[1])


class _Terms(torch.autograd.Function):
    """Join a backend's forward and backward: the logarithms of single heads' probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        lse: Tensor,
        pairs: Tensor,
        heads: tuple[int, ...],
        scale: float,
        module: ModuleType,
        attention: list[PairGradients] | None,
    ) -> Tensor:
        """Run the backend and save what its backward reads."""
        ctx.save_for_backward(query, key, lse, pairs)
        ctx.heads, ctx.scale, ctx.module, ctx.attention = heads, scale, module, attention
        return module.forward(query, key, lse, pairs, heads, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients; those of query and key are left to attention where it takes them.

        Two dense tensors of zeros, with a row here and there, take longer to write and to add than all else.
        """
        query, key, lse, pairs = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[:3])
        arguments = (grad, query, key, pairs, ctx.heads, ctx.scale)
        if ctx.attention is not None and wanted[2]:
            ctx.attention.append(PairGradients(*arguments, ctx.module.backward))
            wanted[:2] = [False, False]
        made = [torch.zeros_like(x) if want else None for x, want in zip((query, key), wanted, strict=False)]
        d_lse = torch.zeros(lse.shape, dtype=lse.dtype, device=lse.device) if wanted[2] else None
        if any(wanted):
            ctx.module.backward(*arguments, *made, d_lse)
        grads = refuse_second_derivative(NO_SECOND, (*made, d_lse), grad, query, key, lse)
        return (*grads, None, None, None, None, None)


def _check(
    query: Tensor, key: Tensor, lse: Tensor, pairs: Tensor | None, heads: int | Sequence[int] | None
) -> tuple[int, ...]:
    """Raise for arguments that do not fit, and return the numbers of the heads."""
    for name, x in (("query", query), ("key", key)):
        if x.ndim != 4:
            raise ValueError(
                f"{name} has the shape {list(x.shape)}; it must be [B, heads, length, D]: view it so"
            )
        if x.dtype != query.dtype or x.dtype not in _FLOATING:
            rule = "query and key must share float32, bfloat16, float16 or float64"
            raise TypeError(f"{name} has the dtype {x.dtype}; {rule}: convert it")
    B, H, L, D = query.shape
    Hk = key.shape[1]
    if key.shape[0] != B or key.shape[3] != D or D == 0 or Hk == 0 or H % Hk:
        rule = (
            f"it must be [B, Hk, S, D], B and D as in query, {list(query.shape)}, and Hk a divisor of its H"
        )
        raise ValueError(f"key has the shape {list(key.shape)}; {rule}: pass what attention was given")
    if lse.shape != (B, H, L):
        rule = f"it must be {[B, H, L]}, what attention returned with return_lse=True"
        raise ValueError(f"lse has the shape {list(lse.shape)}; {rule}: pass that")
    expected = torch.float64 if query.dtype == torch.float64 else torch.float32
    if lse.dtype != expected:
        raise TypeError(
            f"lse has the dtype {lse.dtype}; it must be {expected}, as attention returned it: keep it so"
        )
    if pairs is not None and (pairs.ndim != 2 or pairs.shape[1] != 3):
        rule = "it must be [P, 3]: batch entry, row, column"
        raise ValueError(f"pairs has the shape {list(pairs.shape)}; {rule}: stack them so")
    if pairs is not None and pairs.dtype != torch.int64:
        raise TypeError(f"pairs has the dtype {pairs.dtype}; it must be torch.int64: call .long() on it")
    for name, y in (("key", key), ("lse", lse), ("pairs", pairs)):
        if y is not None and y.device != query.device:
            raise ValueError(f"{name} is on {y.device} and query on {query.device}: move one of the two")
    numbers = (
        tuple(range(H if heads is None else heads))
        if heads is None or isinstance(heads, int)
        else tuple(heads)
    )
    if not numbers or len(set(numbers)) < len(numbers) or not all(0 <= h < H for h in numbers):
        rule = f"it must be a number of heads, 1..{H}, or distinct numbers in 0..{H - 1}"
        raise ValueError(f"heads is {heads}; {rule}: name heads of query")
    return numbers


def _check_pairs(pairs: Tensor, sizes: tuple[int, int, int]) -> None:
    """Raise for a pair outside of batch, rows and columns; only where looking at values costs nothing."""
    outside = (pairs < 0) | (pairs >= torch.tensor(sizes))
    if outside.any():
        p, i = outside.nonzero()[0].tolist()
        what = ("batch entry", "row", "column")[i]
        raise ValueError(
            f"pairs[{p}] is {pairs[p].tolist()}; its {what} must lie in 0..{sizes[i] - 1}: "
            "skip the sentence, or check the padding"
        )
