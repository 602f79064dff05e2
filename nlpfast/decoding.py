"""Decoding: from a model of the next token to text. Nothing here knows a particular model.

Shapes: B batch, T prompt length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

__all__ = ["LanguageModel", "evaluation_mode", "generate", "next_token_probabilities"]


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
    lengths: Tensor | None = None,
    prefix: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    greedy: bool = False,
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Append `max_new_tokens` tokens to each prompt, one at a time.

    Each step reads the last `model.block_size` tokens. The model runs in evaluation mode and without
    gradients; the modes of all its modules are as before afterwards, also after an error. One step is the
    same as::

        logits = model(idx[:, -model.block_size :])[0][:, -1]
        token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1)  # or logits.argmax(-1)

    A model that has ``can_cache`` true, as GPT, reads each token once, by its ``prefill`` and ``decode``,
    until a sequence is longer than `model.block_size`: from there on every step moves all of its positions.

    Args:
        model: callable that returns `(logits, loss)` and has a `block_size`.
        idx: prompts [B, T], int64 or int32, T >= 1; shorter ones are filled up at their ends with anything.
        max_new_tokens: how many tokens to append, >= 0.
        lengths: tokens of each prompt, int64 [B], within 1..T; None where all have T.
        prefix: the prompts are seen in both directions, as a model with `prefix_lengths` was trained.
        temperature: divides the logits, > 0; below 1 sharpens the distribution.
        top_k: sample from the `top_k` most probable tokens only, >= 1; None for all.
        top_p: sample from the smallest set of tokens with probability mass >= `top_p`, in (0, 1]; None for
            all. With `top_k` as well, the mass is that of the distribution after `top_k`.
        greedy: take the most probable token; `temperature`, `top_k`, `top_p` and `generator` have no effect.
        generator: source of the random numbers, on the device of `idx`; None for torch's global one.
        use_cache: False reads all tokens in every step, also where the model has a cache.

    Returns:
        [B, T + max_new_tokens], the dtype and the device of `idx`: each prompt, its new tokens right after
        it, and 0 from there on.

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
    text = _Text(model, idx, lengths, max_new_tokens, prefix, use_cache)
    with evaluation_mode(model):
        for _ in range(max_new_tokens):
            logits = text.next_logits()
            if bool(logits.isnan().any()):
                raise ValueError(
                    f"the model returned NaN logits for token {text.longest}; its weights are not usable"
                )
            if greedy:
                text.append(logits.argmax(dim=-1))
            else:
                probs = next_token_probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
                text.append(torch.multinomial(probs, 1, generator=generator)[:, 0])
    return text.tokens


class _Text:
    """The sequences that are written, and what the model has read of them."""

    def __init__(
        self,
        model: Any,
        idx: Tensor,
        lengths: Tensor | None,
        room: int,
        prefix: bool,
        use_cache: bool,
    ) -> None:
        B, T = idx.shape
        if lengths is None:
            lengths = torch.full((B,), T, device=idx.device)
        elif (
            lengths.is_floating_point()
            or lengths.shape != (B,)
            or bool(((lengths < 1) | (lengths > T)).any())
        ):
            raise ValueError(
                f"lengths={lengths.tolist()} must be one number within 1..{T} for each of {B} rows"
            )
        lengths = lengths.to(torch.int64)
        self.model, self.prompts, self.prefix = model, lengths, prefix
        self.cached, self.cache = use_cache and getattr(model, "can_cache", False), None
        self.rows, self.ends, self.longest = torch.arange(B, device=idx.device), lengths, int(lengths.max())
        self.tokens = idx.new_zeros(B, T + room)
        self.tokens[:, :T] = idx.masked_fill(torch.arange(T, device=idx.device) >= lengths[:, None], 0)

    def next_logits(self) -> Tensor:
        """Return the logits of the token after each sequence, [B, V]."""
        if not self.cached or self.longest > self.model.block_size:
            return self._read_again()
        if self.cache is None:
            prefix = {"prefix_lengths": self.prompts} if self.prefix else {}
            logits, self.cache = self.model.prefill(self.tokens[:, : self.longest], self.ends, **prefix)
            return logits
        return self.model.decode(self.tokens[self.rows, self.ends - 1], self.cache)

    def _read_again(self) -> Tensor:
        """Return the logits after the last block of each sequence; those of one length are read together."""
        found = None
        sizes = self.ends.clamp(max=self.model.block_size)
        for size in sizes.unique().tolist():
            rows = self.rows[sizes == size]
            starts = self.ends[rows] - size
            window = self.tokens[rows[:, None], starts[:, None] + torch.arange(size, device=rows.device)]
            prefix = {"prefix_lengths": (self.prompts[rows] - starts).clamp(min=0)} if self.prefix else {}
            logits = self.model(window, **prefix)[0][:, -1]
            if found is None:
                found = logits.new_empty(len(self.ends), logits.shape[1])
            found[rows] = logits
        assert found is not None
        return found

    def append(self, tokens: Tensor) -> None:
        """Write one token more of each sequence, [B]."""
        self.tokens[self.rows, self.ends] = tokens.to(self.tokens.dtype)
        self.ends = self.ends + 1
        self.longest += 1


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
def evaluation_mode(model: object) -> Iterator[None]:
    """Put all modules of a model in evaluation mode, and back in their own afterwards, also after an error.

    Args:
        model: anything; what is no `nn.Module` has no mode.

    Yields:
        Nothing.
    """
    # each module's own mode is put back: some may have been frozen in evaluation mode on purpose
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
