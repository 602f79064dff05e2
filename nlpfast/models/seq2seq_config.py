"""The sizes and options of a recurrent translation model, and how it can be called."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nlpfast.models.pretrained import SavedConfig

__all__ = ["ATTENTIONS", "Seq2SeqConfig", "check_batch", "check_packed", "check_tokens"]

ATTENTIONS = ("multiplicative", "dot", "additive")


@dataclasses.dataclass(kw_only=True)
class Seq2SeqConfig(SavedConfig):
    """The sizes of a `Seq2Seq`.

    Attributes:
        source_vocab: tokens of the source language.
        target_vocab: tokens of the target language, V.
        embed_size: channels of the embeddings of both, e.
        hidden_size: channels of each direction of the encoder, and of the decoder, h.
        dropout: of the combined outputs.
        attention: how a decoder state s scores an encoder state [f; b], of the forward and the backward
            direction: "multiplicative", ``s . W [f; b]``; "dot", ``s . (f + b)``, as f and b have the size of
            s and [f; b] has not; "additive", ``v . tanh(W1 [f; b] + W2 s)``.
        input_feeding: a step reads the combined output of the step before, beside its token.
        tied: the target embeddings are the output layer too; needs ``embed_size == hidden_size``.
        pad_id: token that fills up, of both languages; its embedding is 0 at first.
        bos_id: token before a translation.
        eos_id: token after a sentence, of both languages.
    """

    model_type = "seq2seq"

    source_vocab: int
    target_vocab: int
    embed_size: int = 256
    hidden_size: int = 256
    dropout: float = 0.3
    attention: str = "multiplicative"
    input_feeding: bool = True
    tied: bool = False
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a model of these sizes."""
        for name in ("source_vocab", "target_vocab", "embed_size", "hidden_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        if not isinstance(self.dropout, (int, float)) or not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout={self.dropout!r} must be a probability in [0, 1]; 0 turns dropout off")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"attention={self.attention!r} must be one of {', '.join(ATTENTIONS)}")
        for name in ("input_feeding", "tied"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}={getattr(self, name)!r} must be True or False")
        if self.tied and self.embed_size != self.hidden_size:
            sizes = f"embed_size={self.embed_size} and hidden_size={self.hidden_size}"
            raise ValueError(f"tied=True needs one size, found {sizes}; make them equal, or tied=False")
        for name in ("pad_id", "bos_id", "eos_id"):
            value = getattr(self, name)
            most = self.target_vocab if name == "bos_id" else min(self.source_vocab, self.target_vocab)
            if not isinstance(value, int) or not 0 <= value < most:
                raise ValueError(f"{name}={value!r} must be a token, 0..{most - 1}")
        if len({self.pad_id, self.bos_id, self.eos_id}) < 3:
            ids = f"pad_id={self.pad_id}, bos_id={self.bos_id}, eos_id={self.eos_id}"
            raise ValueError(f"{ids} must be three tokens; give each its own")


def check_batch(name: str, tokens: Tensor, lengths: Tensor, vocab: int, *, batch: int | None = None) -> None:
    """Raise ValueError unless a padded batch has these lengths and, on the CPU, these tokens.

    Args:
        name: what messages call the batch.
        tokens: [B, S].
        lengths: [B], within 1..S.
        vocab: tokens of the language.
        batch: B, if it is known from another batch.
    """
    if tokens.dim() != 2 or (batch is not None and len(tokens) != batch):
        B = "B" if batch is None else batch
        raise ValueError(f"{name} has shape {list(tokens.shape)}, expected [{B}, tokens]; pad the sentences")
    B, S = tokens.shape
    if lengths.shape != (B,) or bool(((lengths < 1) | (lengths > S)).any()):
        rule = f"must be one number within 1..{S} for each of {B} rows"
        raise ValueError(f"{name} lengths={lengths.tolist()} {rule}; count each row's tokens")
    check_tokens(name, tokens, vocab)


def check_packed(
    config: Seq2SeqConfig, source: Tensor, target: Tensor, sequences: int, translations: int
) -> None:
    """Raise ValueError unless packed sentences and translations go together; tokens are checked on the CPU.

    Args:
        config: of the model.
        source: tokens [N].
        target: tokens [M].
        sequences: how many sentences `source` has.
        translations: how many `target` has.
    """
    for name, tokens in (("source", source), ("target_in", target)):
        if tokens.dim() != 1:
            raise ValueError(f"{name} has shape {list(tokens.shape)}, expected one row of packed tokens")
    if sequences != translations:
        counts = f"has {translations} sequences, source_packing {sequences}"
        raise ValueError(f"target_packing {counts}; give one translation for each sentence")
    check_tokens("source", source, config.source_vocab)
    check_tokens("target_in", target, config.target_vocab)


def check_tokens(name: str, tokens: Tensor, vocab: int) -> None:
    """Raise ValueError unless all tokens are of a vocabulary, or on a GPU, which asserts that itself.

    Args:
        name: what messages call them.
        tokens: of any shape.
        vocab: tokens of the language.
    """
    # nobody is to wait for a GPU
    if tokens.device.type != "cpu":
        return
    outside = (tokens < 0) | (tokens >= vocab)
    if bool(outside.any()):
        place = torch.nonzero(outside)[0].tolist()
        raise ValueError(
            f"{name}{place} is {int(tokens[tuple(place)])}, outside the vocabulary 0..{vocab - 1}; "
            "encode the text with the vocabulary the model was built for"
        )
