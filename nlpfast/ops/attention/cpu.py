"""Attention on CPUs: the compiled kernels of csrc/attention, one set per instruction set."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nlpfast.ops.additions import PairGradients

SERVES = "float32, bfloat16 and float16, D and Dv <= 256, every mask, any strides"
MAX_HEAD_SIZE = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# As csrc/library.cpp numbers them.
CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}


def refusal(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if query.device.type != "cpu":
        return f"it computes on the CPU, and the tensors are on {query.device}"
    if query.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and the tensors are {query.dtype}"
    if query.shape[-1] > MAX_HEAD_SIZE or value.shape[-1] > MAX_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_HEAD_SIZE}, and got {max(query.shape[-1], value.shape[-1])}"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    prefix_lengths: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: str,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return out [B, H, L, Dv] and lse [B, H, L], as the reference defines them, and lse_low [B, H, L].

    lse + lse_low is lse to twice its precision: backward recomputes exp(score - lse), where the rounding of
    lse is a relative error of every weight, 0.4 % at scores of 1e5.
    """
    return torch.ops.nlpfast.attention_forward(
        *(query, key, value, attn_mask, _rows(key_lengths), _rows(prefix_lengths), _rows(seed)),
        *(dropout_p, CAUSAL[causal], scale),
    )


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
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
    """Return the gradients of query, key and value, contiguous, and of a mask that requires one.

    The first of `extra` is added while the tiles that it belongs to are in the cache.
    """
    first = (extra[0].pairs.contiguous(), extra[0].of_heads(query.shape[1])) if extra else (None, None)
    mask_gradient = attn_mask is not None and attn_mask.requires_grad
    dq, dk, dv, dmask = torch.ops.nlpfast.attention_backward(
        *(grad_out, grad_lse, query, key, value, out, lse, lse_low),
        *(attn_mask, _rows(key_lengths), _rows(prefix_lengths), _rows(seed)),
        *(dropout_p, CAUSAL[causal], scale, mask_gradient),
        *first,
    )
    for pairs in extra[1:]:
        pairs.add_to(dq, dk)
    return dq, dk, dv, dmask.to(attn_mask.dtype) if mask_gradient and attn_mask is not None else None


def _rows(x: Tensor | None) -> Tensor | None:
    """Return a vector as the operations read it, without strides."""
    return None if x is None else x.contiguous()


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::attention_forward")
    def _(query, key, value, *rest):  # type: ignore[no-untyped-def]
        B, H, L, _ = query.shape
        lse = query.new_empty((B, H, L), dtype=torch.float32)
        return query.new_empty(B, H, L, value.shape[3]), lse, torch.empty_like(lse)

    @torch.library.register_fake("nlpfast::attention_backward")
    def _(grad_out, grad_lse, query, key, value, out, lse, lse_low, attn_mask, *rest):  # type: ignore[no-untyped-def]
        dmask = lse.new_empty(attn_mask.shape if rest[-3] else (0,))
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), dmask


_register_fakes()
