"""Sentences of a batch one after the other, without padding: what BERT is given.

Shapes: S sentences, N tokens of all of them, and of what fills up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ROUNDED", "PackedSentences", "filled", "pack_sentences"]

# Packed batches have a multiple of so many tokens: few enough to cost little in a batch of a few hundred.
ROUNDED = 64


class PackedSentences(NamedTuple):
    """A packed batch, ready for ``Packing(cu_seqlens, longest)``.

    Attributes:
        input_ids: int64 [N].
        token_type_ids: int64 [N], the segment of each token.
        cu_seqlens: int64 [number of sequences + 1], cumulative numbers of tokens. The first S sequences are
            the sentences; those after them fill up.
        longest: tokens of the longest sequence.
        sentences: S.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    cu_seqlens: Tensor
    longest: int
    sentences: int


def filled(lengths: Sequence[int]) -> tuple[Tensor, int]:
    """Return the layout of sequences, and of others that fill the batch up to a multiple of `ROUNDED` tokens.

    PyTorch keeps what it compiles for the shapes of matrix products, in 16 bits, and there would be a new
    number of tokens in every step otherwise: each takes time, and together gigabytes.

    Args:
        lengths: tokens of each sequence, at least one; the others are no longer than the longest.

    Returns:
        Cumulative numbers of tokens, int64 [sequences and others + 1], and how many tokens the others have.
    """
    longest, missing = max(lengths), -sum(lengths) % ROUNDED
    whole, rest = divmod(missing, longest)
    return torch.tensor([0, *lengths, *[longest] * whole, *[rest] * (rest > 0)]).cumsum(0), missing


def pack_sentences(
    sentences: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None, *, pad_id: int = 0
) -> PackedSentences:
    """Make a batch without padding.

    Up to `ROUNDED` - 1 further tokens follow as sequences of their own: see `filled`.

    Args:
        sentences: tokens of each, at least one sentence and at least one token in each.
        types: segments of the tokens, in the same form; None for 0 everywhere.
        pad_id: token that fills up.

    Raises:
        ValueError: there is no sentence, one has no token, or `types` has another form.
    """
    lengths = [len(sentence) for sentence in sentences]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"sentences have the lengths {lengths}; give at least one, each with a token")
    if types is not None and [len(row) for row in types] != lengths:
        raise ValueError("types has another form than sentences; give a segment for every token")
    cu_seqlens, missing = filled(lengths)
    flat = [token for sentence in sentences for token in sentence]
    segments = [segment for row in types or () for segment in row] or [0] * len(flat)
    return PackedSentences(
        input_ids=torch.tensor(flat + [pad_id] * missing),
        token_type_ids=torch.tensor(segments + [0] * missing),
        cu_seqlens=cu_seqlens,
        longest=max(lengths),
        sentences=len(lengths),
    )
