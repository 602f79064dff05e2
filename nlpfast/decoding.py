"""Decoding: from a model of the next token to text. Nothing here knows a particular model.

Shapes: B batch, T prompt length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["LanguageModel", "generate", "next_token_probabilities"]


class LanguageModel(Protocol):
    """What `generate` needs: a callable from tokens to `(logits [B, T, V], loss)` that has a block size."""

    @property
    def block_size(self) -> int:
        """Return the longest sequence that the model reads."""
        ...

    def __call__(self, idx: Tensor, /) -> tuple[Tensor, Tensor | None]:
        """Return the logits of every position and the loss, which is not used."""
        ...


@torch.no_grad()
def generate(
    model: LanguageModel,
    idx: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Append `max_new_tokens` tokens to each prompt, one at a time.

    Each step reads the last `model.block_size` tokens. The model runs in evaluation mode and without
    gradients; the modes of all its modules are as before afterwards, also after an error. One step is the
    same as::

        logits = model(idx[:, -model.block_size :])[0][:, -1]
        token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)  # or logits.argmax(-1)

    Args:
        model: callable that returns `(logits, loss)` and has a `block_size`.
        idx: prompts [B, T], int64 or int32, T >= 1; all rows have the same length.
        max_new_tokens: how many tokens to append, >= 0.
        temperature: divides the logits, > 0; below 1 sharpens the distribution.
        top_k: sample from the `top_k` most probable tokens only, >= 1; None for all.
        top_p: sample from the smallest set of tokens with probability mass >= `top_p`, in (0, 1]; None for
            all. With `top_k` as well, the mass is that of the distribution after `top_k`.
        greedy: take the most probable token; `temperature`, `top_k`, `top_p` and `generator` have no effect.
        generator: source of the random numbers, on the device of `idx`; None for torch's global one.

    Returns:
        [B, T + max_new_tokens], the dtype and the device of `idx`; the first T columns are the prompt.

    Raises:
        ValueError: when an argument is outside its range, or the model returns NaN.

    Paper: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration" (`top_p`).
    """
    if idx.dim() != 2 or idx.numel() == 0 or idx.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"idx is {idx.dtype} of shape {list(idx.shape)}, expected int64 or int32 of shape [B, T] with "
            "B, T >= 1; give at least one prompt of at least one token"
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} must be >= 0; 0 returns the prompt")
    _check_sampling(temperature, top_k, top_p)
    B, T = idx.shape
    out = idx.new_empty(B, T + max_new_tokens)
    out[:, :T] = idx
    with _evaluation_mode(model):
        for end in range(T, T + max_new_tokens):
            logits = model(out[:, max(0, end - model.block_size) : end])[0][:, -1]  # [B, V]
            if bool(logits.isnan().any()):
                raise ValueError(f"the model returned NaN logits for token {end}; its weights are not usable")
            if greedy:
                out[:, end] = logits.argmax(dim=-1)
            else:
                probs = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                out[:, end] = torch.multinomial(probs, 1, generator=generator)[:, 0]
    return out


def next_token_probabilities(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the distribution that `generate` samples from.

    Without `top_k` and `top_p` the same as ``F.softmax(logits / temperature, dim=-1)``; with them, the
    probabilities outside the kept set are 0 and the others are divided by their sum. Among equal logits,
    lower indices are kept.

    Args:
        logits: [..., V], floating point.
        temperature: > 0.
        top_k: keep this many of the largest, >= 1; more than V keeps all.
        top_p: keep the smallest set with mass >= `top_p`, in (0, 1]; applied after `top_k`.

    Returns:
        [..., V] that sum to 1 along the last dimension; float32, or float64 for float64 logits.

    Raises:
        ValueError: when an argument is outside its range.
    """
    _check_sampling(temperature, top_k, top_p)
    x = logits if logits.dtype == torch.float64 else logits.float()
    # the largest becomes 0 first, so that a small temperature cannot overflow to inf - inf
    x = (x - x.amax(dim=-1, keepdim=True)) / temperature
    if top_k is None and top_p is None:
        return x.softmax(dim=-1)
    x, order = x.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        x[..., top_k:] = -math.inf
    probs = x.softmax(dim=-1)
    if top_p is not None:
        # a token is kept when those before it do not reach top_p, so the first is always kept
        before = probs.cumsum(dim=-1) - probs
        probs = probs.masked_fill(before >= top_p, 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs).scatter_(-1, order, probs)


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature={temperature} must be finite and > 0; use greedy=True for the limit 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} must be >= 1; use None to keep all tokens")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p={top_p} must be in (0, 1]; use None to keep all tokens")


@contextmanager
def _evaluation_mode(model: object) -> Iterator[None]:
    # each module's own mode is put back: some may have been frozen in evaluation mode on purpose
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
