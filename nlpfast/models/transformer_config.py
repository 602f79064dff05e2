"""The sizes and options of a Transformer that translates."""

from __future__ import annotations

import dataclasses

from nlpfast.models.pretrained import SavedConfig
from nlpfast.nn.heads import check_heads

__all__ = ["TransformerConfig"]

NORMS = ("pre", "post")
POSITIONS = ("sinusoidal", "learned")
TIED = ("all", "decoder", "none")
ACTIVATIONS = ("relu", "gelu")
# Garg et al. 2019 supervise the layer before the last but one
ALIGNMENT_LAYER = -3


@dataclasses.dataclass(kw_only=True)
class TransformerConfig(SavedConfig):
    """The sizes of a Transformer; the defaults are for some ten thousand sentences and a CPU.

    Attributes:
        source_vocab: tokens of the source language.
        target_vocab: tokens of the target language, V.
        encoder_layers: layers that read the source.
        decoder_layers: layers that write the target.
        d_model: channels, C.
        heads: H, a divisor of `d_model`.
        d_ff: channels in the middle of a layer's network.
        activation: of that network, "relu" or "gelu" (with erf).
        norm: "pre" normalises what a part of a layer reads, "post" what it and its input add up to.
        positions: "sinusoidal", or "learned".
        max_positions: longest sequence with EOS, of a side.
        dropout: of embeddings and of what the parts of a layer add.
        attention_dropout: of attention probabilities.
        activation_dropout: in the middle of a layer's network.
        tied: "all": source, target and output have one embedding; "decoder": target and output; "none".
        alignment_layer: decoder layer whose cross-attention is the word alignment, from 0, or from the last,
            -1; None is -3, or the last layer of a shallower decoder.
        alignment_heads: the first so many of its heads.
        align_shift: 0 takes the step that predicts a word, 1 the step that reads it.
        full_context: take the alignment from a second pass, in which a word sees the words after it.
        pad_id: token without an embedding.
        bos_id: begins what the decoder reads.
        eos_id: ends a sentence.
    """

    model_type = "transformer"

    source_vocab: int
    target_vocab: int
    encoder_layers: int = 3
    decoder_layers: int = 3
    d_model: int = 256
    heads: int = 4
    d_ff: int = 1024
    activation: str = "relu"
    norm: str = "pre"
    positions: str = "sinusoidal"
    max_positions: int = 1024
    dropout: float = 0.1
    attention_dropout: float = 0.0
    activation_dropout: float = 0.0
    tied: str = "all"
    alignment_layer: int | None = None
    alignment_heads: int = 1
    align_shift: int = 0
    full_context: bool = False
    pad_id: int = 0
    bos_id: int = 1
    eos_id: int = 2

    def __post_init__(self) -> None:
        """Raise ValueError unless there is a model of these sizes."""
        sizes = ("source_vocab", "target_vocab", "encoder_layers", "decoder_layers", "d_model", "heads")
        for name in (*sizes, "d_ff", "max_positions", "alignment_heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer >= 1")
        check_heads("d_model", self.d_model, "heads", self.heads)
        for name in ("dropout", "attention_dropout", "activation_dropout"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}={value!r} must be a probability in [0, 1]; 0 turns dropout off")
        for name, words in (
            *(("norm", NORMS), ("positions", POSITIONS), ("tied", TIED), ("activation", ACTIVATIONS)),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(words)}")
        if not isinstance(self.full_context, bool):
            raise ValueError(f"full_context={self.full_context!r} must be True or False")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model={self.d_model} must be even, for sines and cosines")
        if self.tied == "all" and self.source_vocab != self.target_vocab:
            rule = f"must be target_vocab={self.target_vocab}; use one vocabulary, or tied='decoder'"
            raise ValueError(f"source_vocab={self.source_vocab} {rule}")
        self._check_tokens()
        self._check_alignment()

    def _check_tokens(self) -> None:
        smallest = min(self.source_vocab, self.target_vocab)
        for name in ("pad_id", "bos_id", "eos_id"):
            value = getattr(self, name)
            if not isinstance(value, int) or not 0 <= value < smallest:
                raise ValueError(f"{name}={value!r} must be a token of both sides, 0..{smallest - 1}")
        if len({self.pad_id, self.bos_id, self.eos_id}) < 3:
            found = f"{self.pad_id}, {self.bos_id} and {self.eos_id}"
            raise ValueError(f"pad_id, bos_id and eos_id are {found}; they must differ")

    def _check_alignment(self) -> None:
        layer, layers = self.alignment_layer, self.decoder_layers
        if layer is not None and (not isinstance(layer, int) or not -layers <= layer < layers):
            rule = f"must be a layer of the decoder, 0..{layers - 1}, or -{layers}..-1 from the last"
            raise ValueError(f"alignment_layer={layer!r} {rule}")
        if self.alignment_heads > self.heads:
            raise ValueError(f"alignment_heads={self.alignment_heads} must be at most heads={self.heads}")
        if self.align_shift not in (0, 1):
            raise ValueError(f"align_shift={self.align_shift!r} must be 0 or 1")

    def aligned_layer(self) -> int:
        """Return the number of the layer whose cross-attention is the word alignment, from 0."""
        if self.alignment_layer is not None:
            return self.alignment_layer % self.decoder_layers
        shallow = self.decoder_layers + ALIGNMENT_LAYER < 0
        return self.decoder_layers + (-1 if shallow else ALIGNMENT_LAYER)
