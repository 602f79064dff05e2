"""Hypotheses of a translation: what a model must offer to write them, which tokens may follow, their scores.

Beam search and sampling share this. Nothing here knows a particular model.

Shapes: B sentences, K hypotheses of each, S tokens of the longest source, P of the longest prefix, t tokens
written so far, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "PENALTIES",
    "Constraints",
    "Hypothesis",
    "SpecialTokens",
    "TranslationModel",
    "TranslationState",
    "length_divisor",
    "log_probabilities",
    "longest_lengths",
]

PENALTIES = ("none", "length", "gnmt")


class Hypothesis(NamedTuple):
    """One translation of a sentence.

    Attributes:
        tokens: without BOS and EOS.
        score: `log_probability` after the length penalty; hypotheses are ordered by it.
        log_probability: sum of the log probabilities of `tokens` and EOS, natural logarithm.
        finished: whether the model ended it. False where the longest length did; see there whether
            `log_probability` has EOS nevertheless.
    """

    tokens: list[int]
    score: float
    log_probability: float
    finished: bool


class SpecialTokens(Protocol):
    """Ids of the tokens that are no text."""

    @property
    def pad_id(self) -> int:
        """Return what fills up shorter sentences."""
        ...

    @property
    def bos_id(self) -> int:
        """Return what the decoder reads first."""
        ...

    @property
    def eos_id(self) -> int:
        """Return what ends a sentence."""
        ...


class TranslationState(Protocol):
    """What a model remembers of the sources and of what was written: K hypotheses of each of B sentences."""

    def reorder(self, beams: Tensor, /) -> None:
        """Let hypothesis j of a sentence go on from what hypothesis `beams[:, j]` was, int64 [B, K]."""
        ...

    def keep(self, sentences: Tensor, /) -> None:
        """Go on with these sentences only, int64 [B'], rising."""
        ...


class TranslationModel(Protocol):
    """A model that translates step by step; each step reads one token of every hypothesis."""

    @property
    def config(self) -> SpecialTokens:
        """Return the ids of the special tokens of the target language."""
        ...

    def begin(self, source: Tensor, lengths: Tensor, beam: int, /) -> TranslationState:
        """Read sources int64 [B, S] of lengths int64 [B] for `beam` hypotheses each."""
        ...

    def advance(self, tokens: Tensor, state: Any, /) -> Tensor:
        """Read int64 [B, K], BOS at first, and return the logits of what follows, [B, K, V]."""
        ...


def length_divisor(length: int, penalty: str, alpha: float) -> float:
    """Return what the log probability of a hypothesis is divided by.

    =========  =============================  ========================================
    penalty    divisor                        source
    =========  =============================  ========================================
    none       1
    length     `length ** alpha`              fairseq's `--lenpen`; 1 is the mean
    gnmt       `((5 + length) / 6) ** alpha`  Wu et al. 2016, "Google's Neural Machine
                                              Translation System", equation 14
    =========  =============================  ========================================

    As log probabilities are negative, a larger `alpha` favours longer hypotheses.

    Args:
        length: tokens with EOS, >= 1.
        penalty: one of `PENALTIES`.
        alpha: within 0..10; 0 is no penalty.

    Returns:
        A number >= 1 that does not fall with the length.

    Raises:
        ValueError: no such penalty, or `alpha` outside its range.
    """
    if penalty not in PENALTIES:
        raise ValueError(f"length_penalty={penalty!r} is unknown; give one of {', '.join(PENALTIES)}")
    if not 0 <= alpha <= 10:
        raise ValueError(f"alpha={alpha} must be within 0..10; 1 is usual for 'length' and 0.6 for 'gnmt'")
    if penalty == "none":
        return 1.0
    return float(length if penalty == "length" else (5 + length) / 6) ** alpha


def log_probabilities(logits: Tensor, written: int) -> Tensor:
    """Return the logarithm of the softmax of logits, in float32 or, for float64, in float64.

    Args:
        logits: [..., V].
        written: tokens of each hypothesis so far, for the message.

    Returns:
        [..., V], a new tensor.

    Raises:
        ValueError: the model returned NaN or +inf, or -inf for all tokens.
    """
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    log_probs = logits.log_softmax(dim=-1, dtype=dtype)
    # one NaN makes the whole row NaN
    if bool(log_probs[..., 0].isnan().any()):
        raise ValueError(f"the model returned NaN logits for token {written}; its weights are not usable")
    return log_probs


def longest_lengths(source: Tensor, lengths: Tensor, max_len_a: float, max_len_b: int) -> list[int]:
    """Return how many tokens each translation may have without EOS: `floor(max_len_a * length) + max_len_b`.

    Args:
        source: int64 [B, S], S >= 1; B may be 0.
        lengths: int64 [B], tokens of each sentence, within 1..S. Its own length counts, not that of the
            longest in the batch, so a translation does not depend on its neighbours.
        max_len_a: >= 0, finite.
        max_len_b: >= 1.

    Returns:
        B numbers.

    Raises:
        ValueError: an argument is not as said here.
    """
    if source.dim() != 2 or source.dtype != torch.int64 or source.shape[1] == 0:
        raise ValueError(
            f"source is {source.dtype} of shape {list(source.shape)}, expected int64 of shape [B, S] with "
            "S >= 1; fill up shorter sentences with pad_id"
        )
    B, S = source.shape
    if lengths.dtype != torch.int64 or lengths.shape != (B,) or bool(((lengths < 1) | (lengths > S)).any()):
        raise ValueError(
            f"lengths={lengths.tolist()}, {lengths.dtype}, must be one int64 number within 1..{S} for each "
            f"of {B} sentences"
        )
    if not (max_len_a >= 0 and math.isfinite(max_len_a)):
        raise ValueError(f"max_len_a={max_len_a} must be finite and >= 0; 0 limits all sentences alike")
    if max_len_b < 1:
        raise ValueError(f"max_len_b={max_len_b} must be >= 1; it is what a translation may have at most")
    return [math.floor(max_len_a * length) + max_len_b for length in lengths.tolist()]


class Constraints:
    """Which tokens may follow each hypothesis.

    Attributes:
        limits: tokens that a hypothesis of each sentence has at most, int64 [B].
    """

    def __init__(
        self,
        special: SpecialTokens,
        limits: list[int],
        device: torch.device,
        *,
        min_length: int = 0,
        no_repeat_ngram: int = 0,
        prefix: Tensor | None = None,
    ) -> None:
        """Check and keep what is asked for.

        Args:
            special: ids of PAD and BOS, which never follow, and EOS.
            limits: B numbers; the token after so many is EOS.
            device: of the logits.
            min_length: tokens before which EOS does not follow; the limit of a sentence goes first.
            no_repeat_ngram: a token does not follow if it completed an n-gram of this size that the
                hypothesis has already, prefix included; 0 allows all.
            prefix: int64 [B, P], what each hypothesis begins with, filled up with PAD. It may break the
                other rules.

        Raises:
            ValueError: an argument is outside its range.
        """
        if min_length < 0:
            raise ValueError(f"min_length={min_length} must be >= 0; 0 allows the empty translation")
        if no_repeat_ngram < 0:
            raise ValueError(f"no_repeat_ngram={no_repeat_ngram} must be >= 0; 0 allows all repetitions")
        self.limits = torch.tensor(limits, dtype=torch.int64, device=device)
        self._special, self._min_length, self._ngram = special, min_length, no_repeat_ngram
        self._first_limit = min(limits, default=0)
        self._prefix = torch.empty(len(limits), 0, dtype=torch.int64, device=device)
        if prefix is not None:
            self._prefix = _checked_prefix(prefix, limits, special).to(device)

    def check_vocabulary(self, size: int) -> None:
        """Refuse a prefix with a token that the model does not have.

        Args:
            size: V, which the first logits tell.

        Raises:
            ValueError: there is one.
        """
        if self._prefix.numel() and int(self._prefix.max()) >= size:
            raise ValueError(
                f"prefix has token {int(self._prefix.max())}, but the model's vocabulary has {size}; encode "
                "it with the vocabulary of the target language"
            )

    def ban(self, log_probs: Tensor, history: Tensor) -> None:
        """Give -inf, in place, to all tokens that may not follow.

        Args:
            log_probs: [B, K, V].
            history: int64 [B, K, t], what was written.
        """
        special, n, written = self._special, self._ngram, history.shape[2]
        log_probs[..., special.pad_id] = -math.inf
        log_probs[..., special.bos_id] = -math.inf
        if written < self._min_length:
            log_probs[..., special.eos_id] = -math.inf
        if 0 < n <= written:
            grams = history.unfold(2, n, 1)
            # the last n - 1 tokens, beside the first n - 1 of every n-gram
            repeats = (grams[..., :-1] == history[:, :, None, written - n + 1 :]).all(dim=-1)
            # PAD is banned anyhow
            log_probs.scatter_(2, grams[..., -1].where(repeats, special.pad_id), -math.inf)

    def apply(self, log_probs: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the tokens that may follow, or the one that must: the next of a prefix, or EOS at the limit.

        Args:
            log_probs: [B, K, V], changed in place.
            history: int64 [B, K, t], what was written.

        Returns:
            `log_probs` after `ban`, and [B, K, V] that is the same but in sentences with a token that must
            follow: there -inf for all others.
        """
        written = history.shape[2]
        within_prefix = written < self._prefix.shape[1]
        if not within_prefix and written < self._first_limit:
            self.ban(log_probs, history)
            return log_probs, log_probs
        pad = torch.full_like(self.limits, self._special.pad_id)
        forced = self._prefix[:, written] if within_prefix else pad
        forced = forced.masked_fill(self.limits == written, self._special.eos_id)
        token = forced[:, None, None].expand(-1, log_probs.shape[1], 1)
        only = torch.full_like(log_probs, -math.inf).scatter_(2, token, log_probs.gather(2, token))
        self.ban(log_probs, history)
        return log_probs, only.where((forced != self._special.pad_id)[:, None, None], log_probs)

    def keep(self, sentences: Tensor) -> None:
        """Go on with these sentences only.

        Args:
            sentences: int64 [B'], B' >= 1.
        """
        self.limits, self._prefix = self.limits[sentences], self._prefix[sentences]
        self._first_limit = int(self.limits.min())


def _checked_prefix(prefix: Tensor, limits: list[int], special: SpecialTokens) -> Tensor:
    B = len(limits)
    if prefix.dim() != 2 or prefix.dtype != torch.int64 or prefix.shape[0] != B:
        raise ValueError(
            f"prefix is {prefix.dtype} of shape {list(prefix.shape)}, expected int64 of shape [{B}, P]; fill "
            "up shorter ones with pad_id"
        )
    for row, (tokens, limit) in enumerate(zip(prefix.tolist(), limits, strict=True)):
        length = len(tokens)
        while length and tokens[length - 1] == special.pad_id:
            length -= 1
        wrong = {special.pad_id, special.bos_id, special.eos_id}.intersection(tokens[:length])
        if wrong or min(tokens, default=0) < 0:
            raise ValueError(
                f"prefix of sentence {row} is {tokens}: no id may be negative, PAD, BOS or EOS, but PAD at "
                "the end; leave those out"
            )
        if length > limit:
            raise ValueError(
                f"prefix of sentence {row} has {length} tokens, more than the longest length {limit}; raise "
                "max_len_b"
            )
    return prefix
