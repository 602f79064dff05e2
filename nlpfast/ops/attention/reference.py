"""Attention written out in PyTorch: the definition that every backend is held to.

    S = scale * Q Kᵀ + mask    P = softmax(S)    lse = log sum exp(S)    Z = keep / (1 - p)    O = (P * Z) V
    dV = (P * Z)ᵀ dO    dP = (dO Vᵀ) * Z    dS = P * (dP - rowsum(P * dP) + dlse)
    dQ = scale * dS K    dK = scale * dSᵀ Q    dmask = dS, summed over the dimensions that the mask broadcasts

rowsum(P * dP) is rowsum(dO * O) without the rounding of a stored O. float64 is computed in float64,
everything else in float32 and rounded once at the end. Backward recomputes P from Q and K. No control flow
depends on the tensors' values, so both directions trace into one graph.

Shapes: B batch, H query heads, Hk key heads, L query length, S key length, D head size of query and key, Dv
of value.

Masked positions are clean. A key that no query of its head sees, and a query that sees no key, contribute
nothing to any result, whatever they hold, NaN included. NaN in a key that only some queries see stays out of
the outputs of the others. NaN in a value that only some queries see does not (0 * NaN in the product with V),
nor does either stay out of the others' gradients.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nlpfast.ops.additions import PairGradients

SERVES = "every device and floating dtype, every mask; needs memory for [B, H, L, S]"

_WORD = 0xFFFFFFFF


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
) -> str | None:
    """Return None: the definition serves every call."""
    return None


def forward(
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, Hk, S, D]
    value: Tensor,  # [B, Hk, S, Dv]
    attn_mask: Tensor | None,  # broadcastable to [B, H, L, S], four dimensions
    key_lengths: Tensor | None,  # [B]
    prefix_lengths: Tensor | None,  # [B]
    seed: Tensor | None,  # [2]: seed, offset
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, None]:
    """Compute attention and the log-sum-exp of its scores.

    Args:
        query: queries, any strides.
        key: keys; query head h reads key head ``h // (H // Hk)``.
        value: values.
        attn_mask: bool (True = attend) or floating (added to the scores; -inf masks).
        key_lengths: int64; keys from this index on are masked.
        prefix_lengths: int64; keys before this index are visible in spite of ``causal``.
        seed: int64, or None when ``dropout_p`` is 0.
        dropout_p: the probability of dropping an element of P.
        causal: "none", "top_left" (j <= i) or "bottom_right" (j <= i + S - L).
        scale: the factor of Q Kᵀ.

    Returns:
        The output [B, H, L, Dv] in the query's dtype, and lse [B, H, L] in float32 (float64 for float64
        inputs). A row without a visible key has output 0 and lse -inf. A third result is for backends whose
        backward wants lse to more than its precision; None here.

    Raises:
        ValueError: if a length lies outside 0..S, on the CPU and in uncompiled code; elsewhere it is clamped.
    """
    check_lengths("key_lengths", key_lengths, key.shape[2])
    check_lengths("prefix_lengths", prefix_lengths, key.shape[2])
    with _without_autocast(query):
        visible = _visible(query, key, attn_mask, key_lengths, prefix_lengths, causal)
        q, k, v = _clean_inputs(query, key, value, visible)
        probs, lse = _probabilities(q, k, attn_mask, visible, scale)
        if seed is not None:
            probs = probs * _dropout_factor(seed, dropout_p, probs)
        return (probs @ v).to(query.dtype), lse, None


def backward(
    grad_out: Tensor,  # [B, H, L, Dv]
    grad_lse: Tensor | None,  # [B, H, L]
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor | None,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
    extra: Sequence[PairGradients] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the gradients of ``forward`` by the formulas at the top of this file.

    Args:
        grad_out: gradient of the output, any strides.
        grad_lse: gradient of lse, or None for zero.
        query: as in ``forward``, and so are the other arguments that it shares.
        key: see ``forward``.
        value: see ``forward``.
        out: the output of ``forward``; not read here, other backends need it.
        lse: the second output of ``forward``; not read here either.
        lse_low: the third.
        attn_mask: see ``forward``.
        key_lengths: see ``forward``.
        prefix_lengths: see ``forward``.
        seed: the seed of the forward call, which regenerates its dropout mask.
        dropout_p: see ``forward``.
        causal: see ``forward``.
        scale: see ``forward``.
        extra: gradients of ``query . key`` at pairs, to be added.

    Returns:
        Gradients of query, key and value in their shapes and dtypes, and of a floating ``attn_mask``, else
        None.
    """
    with _without_autocast(query):
        visible = _visible(query, key, attn_mask, key_lengths, prefix_lengths, causal)
        q, k, v = _clean_inputs(query, key, value, visible)
        probs, _ = _probabilities(q, k, attn_mask, visible, scale)
        do = grad_out.to(q.dtype).contiguous()
        if visible is not None:
            do = do.masked_fill(~visible.any(-1, keepdim=True), 0.0)
        dropped, d_probs = probs, do @ v.mT
        if seed is not None:
            factor = _dropout_factor(seed, dropout_p, probs)
            dropped, d_probs = probs * factor, d_probs * factor
        shift = (probs * d_probs).sum(-1, keepdim=True)
        if grad_lse is not None:
            shift = shift - grad_lse.to(q.dtype).unsqueeze(-1)
        d_scores = probs * (d_probs - shift)
        if visible is not None:
            # 0 * inf: the gradient of lse in a row that sees nothing may be infinite, as that of lse² is.
            d_scores = d_scores.masked_fill(~visible, 0.0)
        dq = (d_scores @ k * scale).to(query.dtype)
        dk = _sum_groups(d_scores.mT @ q * scale, key)
        dv = _sum_groups(dropped.mT @ do, value)
        dmask = None
        if attn_mask is not None and attn_mask.is_floating_point():
            dmask = d_scores.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    for pairs in extra:
        pairs.add_to(dq, dk)
    return dq, dk, dv, dmask


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Return the four output words of Philox4x32-10, a random function of a counter and a key.

    Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Args:
        counter: four int64 tensors with values in 0 .. 2^32 - 1, which broadcast against each other.
        key: two such tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(10):
        if step > 0:
            k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
        high0, low0 = _multiply(c0, 0xD2511F53)
        high1, low1 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
    return c0, c1, c2, c3


def dropout_keep(seed: Tensor, dropout_p: float, shape: tuple[int, int, int, int]) -> Tensor:
    """Return which attention probabilities survive dropout, as bool [B, H, L, S].

    One Philox call, with key (low half, high half of the seed) and counter (j, i // 8, b*H + h, offset),
    serves key j and eight queries from 8*(i // 8) on: its words hold eight fields of 16 bits, low halves
    first, and query i takes field i % 8. A field below ``round(dropout_p * 65536)`` drops its element.

    Args:
        seed: int64 [2], seed and offset.
        dropout_p: the probability of dropping.
        shape: (B, H, L, S).
    """
    B, H, L, S = shape
    blocks = (L + 7) // 8
    j = torch.arange(S, device=seed.device)
    i8 = torch.arange(blocks, device=seed.device).unsqueeze(-1)
    bh = (torch.arange(B * H, device=seed.device) & _WORD).view(B, H, 1, 1)
    words = philox((j, i8, bh, seed[1] & _WORD), (seed[0] & _WORD, (seed[0] >> 32) & _WORD))
    threshold = math.floor(dropout_p * 65536 + 0.5)
    fields = [half >= threshold for word in words for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(fields, dim=3).reshape(B, H, blocks * 8, S)[:, :, :L]


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low 32 bits of a product of two 32-bit numbers, without overflowing int64."""
    low, high = (word & 0xFFFF) * constant, (word >> 16) * constant
    return (high + (low >> 16)) >> 16, (((high & 0xFFFF) << 16) + low) & _WORD


def _dropout_factor(seed: Tensor, dropout_p: float, probs: Tensor) -> Tensor:
    """Return 1 / (1 - p) where an element is kept and 0 where it is dropped, in the dtype of ``probs``."""
    keep = dropout_keep(seed, dropout_p, (probs.shape[0], probs.shape[1], probs.shape[2], probs.shape[3]))
    return keep.to(probs.dtype) * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)


def _visible(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    causal: str,
) -> Tensor | None:
    """Return which key each query sees, as bool broadcastable to [B, H, L, S], or None when all see all."""
    L, S = query.shape[2], key.shape[2]
    j = torch.arange(S, device=query.device)
    visible: Tensor | None = None
    if causal != "none":
        i = torch.arange(L, device=query.device).unsqueeze(-1)
        visible = (j <= i + (S - L if causal == "bottom_right" else 0)).view(1, 1, L, S)
        if prefix_lengths is not None:
            visible = visible | (j < prefix_lengths.view(-1, 1, 1, 1))
    if key_lengths is not None:
        within = j < key_lengths.view(-1, 1, 1, 1)
        visible = within if visible is None else visible & within
    if attn_mask is not None:
        allowed = attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf
        visible = allowed if visible is None else visible & allowed
    return visible


def _clean_inputs(query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None) -> tuple[Tensor, ...]:
    """Return q, k, v in the accumulation dtype with H heads each, and zeros where nothing may be read."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    # Contiguous, because a matrix product sums in another order when the strides differ.
    q, k, v = (x.to(dtype).contiguous() for x in (query, key, value))
    k, v = _repeat_heads(k, query.shape[1]), _repeat_heads(v, query.shape[1])
    if visible is None:
        return q, k, v
    # 0 * NaN is NaN: zero probabilities alone do not keep masked keys and values out of a matrix product.
    unseen = ~visible.any(-2, keepdim=True).mT
    return (
        q.masked_fill(~visible.any(-1, keepdim=True), 0.0),
        k.masked_fill(unseen, 0.0),
        v.masked_fill(unseen, 0.0),
    )


def _probabilities(
    q: Tensor, k: Tensor, attn_mask: Tensor | None, visible: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return P [B, H, L, S] and lse [B, H, L]."""
    scores = (q * scale) @ k.mT
    if attn_mask is not None and attn_mask.is_floating_point():
        scores = scores + attn_mask.to(scores.dtype)
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    # softmax divides by its own sum; exp(scores - lse) would not sum to 1 once lse has no fractional bits.
    probs = torch.softmax(scores, dim=-1)
    return probs.masked_fill((lse == -math.inf).unsqueeze(-1), 0.0), lse


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    """Repeat each of Hk heads H / Hk times."""
    B, Hk, S, D = x.shape
    return x if Hk == heads else x.unsqueeze(2).expand(B, Hk, heads // Hk, S, D).reshape(B, heads, S, D)


def _sum_groups(grad: Tensor, like: Tensor) -> Tensor:
    """Sum the gradients of the heads that share a key head, and round to the dtype of ``like``."""
    B, Hk, S, D = like.shape
    if grad.shape[1] != Hk:
        grad = grad.view(B, Hk, grad.shape[1] // Hk, S, D).sum(2)
    return grad.to(like.dtype)


def check_lengths(name: str, lengths: Tensor | None, S: int) -> None:
    """Raise if a length lies outside 0..S; only where looking at values costs nothing: not on a GPU."""
    if lengths is None or lengths.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = lengths[(lengths < 0) | (lengths > S)]
    if bad.numel() > 0:
        raise ValueError(
            f"{name} has the value {int(bad[0])}; lengths must lie in 0..{S}, the key length: clamp them"
        )


def _without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[None]:
    """Return a context in which products keep the accumulation dtype also inside a region under autocast."""
    device_type = tensor.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
