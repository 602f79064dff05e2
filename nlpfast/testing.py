"""Measures of error, hostile memory and inputs, shared by tests and benchmarks.

Legend: B batch, H query heads, Hk key heads, L query length, S key length, D head size, Dv of value.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def make_inputs(
    B: int,
    H: int,
    L: int,
    S: int,
    D: int,
    *,
    Hk: int | None = None,
    Dv: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    magnitude: float = 1.0,
    requires_grad: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normal query [B, H, L, D], key [B, Hk, S, D] and value [B, Hk, S, Dv], fixed by the seed.

    Args:
        B: batch.
        H: query heads.
        L: query length.
        S: key length.
        D: head size of query and key.
        Hk: key heads; H if None.
        Dv: head size of value; D if None.
        dtype: of all three.
        device: of all three.
        seed: of a generator of its own; the global one is left alone.
        magnitude: standard deviation.
        requires_grad: of all three.
    """
    generator = torch.Generator().manual_seed(seed)
    heads, width = H if Hk is None else Hk, D if Dv is None else Dv
    shapes = ((B, H, L, D), (B, heads, S, D), (B, heads, S, width))
    query, key, value = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude)
        .to(device=device, dtype=dtype)
        .requires_grad_(requires_grad)
        for shape in shapes
    )
    return query, key, value


def allowed_keys(
    shape: tuple[int, int, int, int],
    *,
    attn_mask: Tensor | None = None,
    causal: str = "none",
    key_lengths: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
) -> Tensor:
    """Return which keys each query sees, bool [B, H, L, S], on the CPU, one batch entry after the other.

    Args:
        shape: (B, H, L, S).
        attn_mask: bool, True = attend, or floating, where -inf hides.
        causal: "none", "top_left" or "bottom_right".
        key_lengths: int64 [B].
        prefix_lengths: int64 [B].
    """
    L, S = shape[2:]
    allowed = torch.ones(shape, dtype=torch.bool)
    if causal != "none":
        allowed = allowed.tril(S - L if causal == "bottom_right" else 0)
    for b in range(shape[0]):
        if prefix_lengths is not None:
            allowed[b, :, :, : int(prefix_lengths[b])] = True
        if key_lengths is not None:
            allowed[b, :, :, int(key_lengths[b]) :] = False
    if attn_mask is not None:
        mask = attn_mask.detach().cpu()
        allowed &= mask if mask.dtype == torch.bool else ~torch.isneginf(mask)
    return allowed


def eager_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *,
    allowed: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention and lse as one would write them in PyTorch, in the inputs' dtype, for autograd.

    Args:
        query: [B, H, L, D].
        key: [B, Hk, S, D]; query head h reads key head ``h // (H // Hk)``.
        value: [B, Hk, S, Dv].
        attn_mask: floating, added to the scores.
        allowed: bool [B, H, L, S], such as ``allowed_keys`` returns.
        keep: bool [B, H, L, S], the attention weights that survive dropout.
        dropout_p: the probability by which the survivors are scaled up.
        scale: factor of Q Kᵀ; ``1 / sqrt(D)`` if None.
    """
    if key.shape[1] != query.shape[1]:
        repeats = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.einsum("bhld,bhsd->bhls", query, key) * _scale(scale, query)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        scores = scores + attn_mask.clamp(min=torch.finfo(attn_mask.dtype).min / 4).to(scores.dtype)
    some = torch.ones_like(scores, dtype=torch.bool).any(-1)
    if allowed is not None:
        allowed = allowed.to(scores.device)
        some = allowed.any(-1)
        # A row that sees nothing is computed over all keys and thrown away: no NaN reaches autograd.
        scores = scores.masked_fill(~allowed & some.unsqueeze(-1), -math.inf)
    weights = torch.softmax(scores, -1) * some.unsqueeze(-1)
    lse = torch.logsumexp(scores, -1).masked_fill(~some, -math.inf)
    if keep is not None:
        weights = weights * keep / (1 - dropout_p) if dropout_p < 1 else weights * 0
    return torch.einsum("bhls,bhsd->bhld", weights, value), lse


def block_error(actual: Tensor, reference: Tensor, rows: int = 16) -> Tensor:
    """Return the largest absolute error of each block of ``rows`` rows of the last dimension but one.

    Args:
        actual: [..., N, D].
        reference: the same in float64.
        rows: rows in a block.

    Returns:
        float64 [..., ceil(N / rows)]; infinite where one of the two is not finite and they are not equal.
    """
    same = actual.double() == reference
    error = (actual.double() - reference).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf)
    return _block_max(error, rows)


def rounding_sizes(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    attn_mask: Tensor | None = None,
    *,
    allowed: Tensor,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
) -> dict[str, Tensor]:
    """Return how large the numbers are whose rounding makes up each result's error, in float64, by name.

    Rounding errors of a sum grow with the root of the sum of its squared terms, not with the sum, which may
    cancel: with a single visible key dS = P * (dP - D) is 0, and its error that of dP. Times the machine
    epsilon this is the error to expect of a good implementation of the formulas in
    ``ops/attention/reference.py``.

    Args:
        query: [B, H, L, D].
        key: [B, Hk, S, D].
        value: [B, Hk, S, Dv].
        grad_out: upstream gradient of the output.
        grad_lse: upstream gradient of lse.
        attn_mask: floating or bool mask, or None.
        allowed: bool [B, H, L, S].
        keep: bool [B, H, L, S], the attention weights that survive dropout.
        dropout_p: the probability by which the survivors are scaled up.
        scale: factor of Q Kᵀ; ``1 / sqrt(D)`` if None.

    Returns:
        out, lse, dq, dk, dv in their shapes; scores and dmask in [B, H, L, S].
    """
    q, k, v, do, dlse = (x.detach().double() for x in (query, key, value, grad_out, grad_lse))
    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    factor = _scale(scale, q)
    _, lse = eager_attention(q, k, v, attn_mask, allowed=allowed, scale=scale)
    scores = q @ k.mT * factor
    if attn_mask is not None and attn_mask.is_floating_point():
        scores = scores + attn_mask.detach().double()
    lse = lse.unsqueeze(-1)
    probs = (scores - lse).exp().masked_fill(~allowed, 0.0)
    factor = abs(factor)
    spread = (factor * _root(q, k.mT) + scores.abs()).masked_fill(~allowed, 0.0)
    p_size = probs * (1 + spread + (probs * spread).sum(-1, keepdim=True))
    weight = (
        torch.ones_like(probs) if keep is None else keep * (1 / (1 - dropout_p) if dropout_p < 1 else 0.0)
    )
    d_probs, d_size = (do @ v.mT * weight).masked_fill(~allowed, 0.0), _root(do, v.mT) * weight
    delta = (probs * d_probs).sum(-1, keepdim=True) - dlse.unsqueeze(-1)
    delta_terms = probs * d_size + p_size * d_probs.abs()
    delta_size = delta_terms.square().sum(-1, keepdim=True).sqrt() + dlse.abs().unsqueeze(-1)
    s_size = p_size * (d_probs - delta).abs() + probs * (d_size + delta_size)
    by_head = {"dk": factor * _root(s_size.mT, q), "dv": _root((p_size * weight).mT, do)}
    sizes = {name: x.unflatten(1, (-1, group)).sum(2) if group > 1 else x for name, x in by_head.items()}
    sizes |= {"out": _root(p_size * weight, v), "dq": factor * _root(s_size, k), "dmask": s_size}
    lse_size = p_size.square().sum(-1).sqrt() + lse.squeeze(-1).abs().nan_to_num(posinf=0.0)
    return {**sizes, "lse": lse_size, "scores": spread}


def assert_no_worse(
    name: str,
    actual: Tensor,
    eager: Tensor,
    reference: Tensor,
    *,
    factor: float,
    ulps: float = 2.0,
    size: Tensor | None = None,
) -> None:
    """Assert that the error of ``actual`` is at most ``factor`` times that of eager PyTorch, and a few ulps.

    It is held for the whole tensor and for every block of 16 rows. An ulp is the machine epsilon times the
    largest ``size`` of the tensor, or of the block.

    Args:
        name: of the tensor, for the message.
        actual: [..., N, D], the result under test.
        eager: the result of eager PyTorch in the same dtype.
        reference: the result in float64 from the same inputs.
        factor: 1.0 for outputs and 1.5 for gradients.
        ulps: how many ulps come on top.
        size: what ``rounding_sizes`` returns for this result; the reference's absolute value if None.

    Raises:
        AssertionError: with both errors and the place of the worst block.
    """
    shapes = [list(x.shape) for x in (actual, eager, reference)]
    assert shapes[0] == shapes[1] == shapes[2], f"{name}: the shapes are {shapes}"
    if actual.numel() == 0:
        return
    size = reference.abs().nan_to_num(posinf=0.0) if size is None else size
    ulp = torch.finfo(actual.dtype).eps * _block_max(size, 16)
    error, base = block_error(actual, reference), block_error(eager, reference)
    for what, e, b, u in (("tensor", error.max(), base.max(), ulp.max()), ("block", error, base, ulp)):
        excess = e - (factor * b + ulps * u)
        worst = int(excess.argmax())
        assert excess.max() <= 0, (
            f"{name}, {what} {worst}: error {e.flatten()[worst]:.3e}, eager's {b.flatten()[worst]:.3e}, "
            f"ulp {u.flatten()[worst]:.3e}, allowed {factor} x eager's + {ulps} ulp"
        )


@contextlib.contextmanager
def poison() -> Iterator[None]:
    """Fill memory that ``torch.empty`` returns with NaN, or the largest integer, inside the context."""
    # A module with a property, which type checkers do not know.
    memory: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        memory.fill_uninitialized_memory = before[1]


def between_canaries(x: Tensor, margin: int = 67) -> tuple[Tensor, Callable[[], None]]:
    """Copy a tensor into the middle of a buffer of NaN (of -1 for integers), so that stray accesses show.

    A read outside of the tensor brings NaN into results; a write is found by the check. An odd ``margin``
    also takes the tensor off the alignment that allocators give.

    Args:
        x: any tensor.
        margin: elements before and after it.

    Returns:
        The contiguous copy, and a function that asserts that the margins are untouched.
    """
    canary = math.nan if x.is_floating_point() else -1
    buffer = torch.full((x.numel() + 2 * margin,), canary, dtype=x.dtype, device=x.device)
    inside = buffer[margin : margin + x.numel()].view(x.shape)
    inside.copy_(x.detach())

    def check() -> None:
        for side, part in (("before", buffer[:margin]), ("after", buffer[margin + x.numel() :])):
            intact = part.isnan() if x.is_floating_point() else part == -1
            assert bool(intact.all()), (
                f"a write {side} the tensor, at {intact.logical_not().nonzero().flatten()[0]}"
            )

    return inside, check


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Return copies of ``x`` [B, H, N, D] with equal values in other layouts, by name."""
    B, H, N, D = x.shape
    large = torch.full((B + 1, H + 2, 2 * N + 1, D + 3), math.nan, dtype=x.dtype, device=x.device)
    sliced = large[1:, 1 : H + 1, 1::2, 2 : D + 2]
    sliced.copy_(x)
    return {
        "heads_inside": x.transpose(1, 2).contiguous().transpose(1, 2),
        "columns": x.mT.contiguous().mT,
        "batch_inside": x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        "sliced": sliced,
        "misaligned": between_canaries(x, 1)[0],
    }


def _block_max(x: Tensor, rows: int) -> Tensor:
    """Return the maximum over each block of rows, [..., ceil(N / rows)]."""
    missing = -x.shape[-2] % rows
    padded = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return padded.unflatten(-2, (padded.shape[-2] // rows, rows)).amax((-1, -2))


def _root(x: Tensor, y: Tensor) -> Tensor:
    """Return the root of the sum of the squared terms of the matrix product."""
    return (x.square() @ y.square()).sqrt()


def _scale(scale: float | None, query: Tensor) -> float:
    """Return the factor of Q Kᵀ."""
    return 1 / math.sqrt(query.shape[3]) if scale is None else scale
