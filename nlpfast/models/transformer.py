"""A Transformer that translates: an encoder of the source, a decoder that writes the target word by word.

    source tokens -> embeddings and positions -> EncoderLayer x n -> memory
    BOS, target tokens -> embeddings and positions -> DecoderLayer x n, which read the memory -> features
    logits = features @ output_weight.T

The cross-attention of one layer can be supervised to be the word alignment. Sources: Vaswani et al. 2017,
"Attention is all you need"; Garg et al. 2019, "Jointly learning to align and translate with Transformer
models".

In training a batch is packed: its sentences lie one after the other, and no layer computes for padding.

Shapes: B sentences, S tokens of the longest source, T of the longest target, N source rows and M target rows
of a packed batch, K hypotheses of a sentence, C channels, V target vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.models.pretrained import SavedModel, saved_once
from nlpfast.models.transformer_config import TransformerConfig
from nlpfast.models.transformer_layers import DecoderLayer, Embeddings, EncoderLayer
from nlpfast.models.transformer_state import TransformerState
from nlpfast.nn.losses import AlignedLoss, LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing
from nlpfast.nn.residual import Stream
from nlpfast.nn.sequence_attention import Attended

__all__ = ["Decoded", "Transformer", "TransformerConfig"]


class Decoded(NamedTuple):
    """What `Transformer.decode` gives.

    Attributes:
        features: [M, C], of which `output_weight` makes logits.
        attended: what the probabilities of the aligned layer's heads follow from; None if not asked for.
    """

    features: Tensor
    attended: Attended | None


class Transformer(SavedModel):
    """The model."""

    config_class = TransformerConfig

    def __init__(self, config: TransformerConfig) -> None:
        """Build the model with initial weights: Glorot's of linear layers, embeddings N(0, 1 / C).

        Those of queries, keys and values are drawn as one layer's, as in ``torch.nn.MultiheadAttention``.

        Args:
            config: the sizes.
        """
        super().__init__(config)
        self.source = Embeddings(config, config.source_vocab, None)
        shared = self.source.tokens if config.tied == "all" else None
        if config.tied == "all":
            saved_once(self, "source.tokens.weight", "target.tokens.weight")
        self.target = Embeddings(config, config.target_vocab, shared)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        final = nn.LayerNorm if config.norm == "pre" else nn.Identity
        self.encoder_norm, self.decoder_norm = final(config.d_model), final(config.d_model)
        self.output: nn.Linear | None = None
        if config.tied == "none":
            self.output = nn.Linear(config.d_model, config.target_vocab, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=config.d_model**-0.5)
                if module.padding_idx is not None:
                    nn.init.zeros_(module.weight[module.padding_idx].detach())
        bound = (6 / (4 * config.d_model)) ** 0.5
        for layer in self.decoder:
            attention = cast(DecoderLayer, layer).cross_attention
            for projection in (attention.query_proj, attention.key_value_proj):
                nn.init.uniform_(projection.weight, -bound, bound)

    @property
    def output_weight(self) -> Tensor:
        """Return what makes logits of features, [V, C]."""
        return (self.target.tokens if self.output is None else self.output).weight

    def encode(self, source: Tensor, packing: Packing) -> Tensor:
        """Return the memory of sources, [N, C].

        Args:
            source: int64 [N], tokens of the sentences with EOS, one after the other.
            packing: where they begin and end.

        Raises:
            ValueError: a sentence is too long, or (on the CPU) a token is not in the vocabulary.
        """
        stream = Stream(self.source(source, packing.positions(len(source)), packing.longest))
        for layer in self.encoder:
            stream = layer(stream, packing)
        return stream.normed(self.encoder_norm)[0]

    def decode(
        self,
        target_in: Tensor,
        packing: Packing,
        memory: Tensor,
        memory_packing: Packing,
        *,
        aligned: bool = False,
    ) -> Decoded:
        """Return the features of targets: row t of a sentence is for predicting its token t.

        Args:
            target_in: int64 [M], BOS and tokens of each target, one after the other.
            packing: where they begin and end.
            memory: of `encode`.
            memory_packing: where its sentences begin and end, as many.
            aligned: also return what the probabilities of the aligned layer follow from; with `full_context`
                by a second pass without the causal mask, which ends in that layer.

        Raises:
            ValueError: as `encode`.
        """
        places = packing.positions(len(target_in))
        chosen, attended = self.config.aligned_layer(), None
        stream = Stream(self.target(target_in, places, packing.longest))
        for number, layer in enumerate(self.decoder):
            here = aligned and not self.config.full_context and number == chosen
            stream, found = layer(stream, packing, memory, memory_packing, aligned=here)
            attended = found if here else attended
        features, _ = stream.normed(self.decoder_norm)
        if aligned and self.config.full_context:
            stream = Stream(self.target(target_in, places, packing.longest))
            for layer in list(self.decoder)[:chosen]:
                stream, _ = layer(stream, packing, memory, memory_packing, is_causal=False)
            attended = cast(DecoderLayer, self.decoder[chosen]).probe(stream, packing, memory, memory_packing)
        return Decoded(features, attended)

    @overload
    def forward(
        self,
        source: Tensor,
        target_in: Tensor,
        source_packing: Packing,
        target_packing: Packing,
        *,
        aligned: bool = ...,
    ) -> Decoded: ...
    @overload
    def forward(
        self,
        source: Tensor,
        target_in: Tensor,
        source_packing: Packing,
        target_packing: Packing,
        *,
        criterion: LabelSmoothedCrossEntropyWithAlignment,
        target_out: Tensor,
        pairs: Tensor | None = ...,
    ) -> AlignedLoss: ...
    def forward(
        self,
        source: Tensor,
        target_in: Tensor,
        source_packing: Packing,
        target_packing: Packing,
        *,
        aligned: bool = False,
        criterion: LabelSmoothedCrossEntropyWithAlignment | None = None,
        target_out: Tensor | None = None,
        pairs: Tensor | None = None,
    ) -> Decoded | AlignedLoss:
        """Return the features of a packed batch, or its loss, for which there are never all logits at once.

        Args:
            source: int64 [N]; see `encode`.
            target_in: int64 [M]; see `decode`.
            source_packing: of `source`.
            target_packing: of `target_in`.
            aligned: see `decode`.
            criterion: what the loss is.
            target_out: int64 [M], tokens and EOS, or the criterion's `ignore_index`.
            pairs: int64 [P, 3], what the aligned layer is to attend to: 0, row of `target_in`, row of
                `source`; None for no alignment.

        Raises:
            ValueError: as `encode`, and as the criterion.
        """
        memory = self.encode(source, source_packing)
        aligned = aligned or pairs is not None
        decoded = self.decode(target_in, target_packing, memory, source_packing, aligned=aligned)
        if criterion is None:
            return decoded
        if target_out is None:
            raise ValueError("criterion is given without target_out: pass what target_in predicts")
        if pairs is not None and criterion.align_shift != self.config.align_shift:
            both = f"the criterion's is {criterion.align_shift}, the model's {self.config.align_shift}"
            raise ValueError(f"align_shift differs: {both}; give both the same")
        supervision: dict[str, Any] = {}
        if pairs is not None and decoded.attended is not None:
            supervision = {"pairs": pairs, "heads": self.config.alignment_heads, **decoded.attended._asdict()}
        # the packed batch is one entry of a batch
        return criterion(decoded.features[None], target_out[None], self.output_weight, **supervision)

    def logits(
        self, source: Tensor, source_lengths: Tensor, target_in: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Return the logits of padded sentences, [B, T, V]; 0 at padding.

        Args:
            source: int64 [B, S], tokens with EOS, and anything after it.
            source_lengths: int64 [B], tokens with EOS.
            target_in: int64 [B, T], BOS and tokens, and anything after them.
            target_lengths: int64 [B], BOS and tokens.

        Raises:
            ValueError: as `encode`.
        """
        sides = (Packing.of_lengths(source_lengths), Packing.of_lengths(target_lengths))
        rows = (_rows(source, sides[0]), _rows(target_in, sides[1]))
        return sides[1].padded(F.linear(self(*rows, *sides).features, self.output_weight))

    @torch.no_grad()
    def begin(self, source: Tensor, lengths: Tensor, beam: int = 1) -> TransformerState:
        """Read sources, and return the state of a decoder that has written nothing.

        Args:
            source: int64 [B, S], tokens with EOS, and anything after it.
            lengths: int64 [B], tokens with EOS.
            beam: hypotheses of each sentence, K.

        Raises:
            ValueError: as `encode`.
        """
        packing = Packing.of_lengths(lengths)
        memory = self.encode(_rows(source, packing), packing)
        layers = [
            cast(DecoderLayer, layer).cross_attention.memory_of(memory, packing) for layer in self.decoder
        ]
        return TransformerState(layers, lengths, beam)

    @torch.no_grad()
    def advance(self, tokens: Tensor, state: TransformerState) -> Tensor:
        """Read one token more of each hypothesis, and return the logits of the next, [B, K, V].

        Args:
            tokens: int64 [B, K]; BOS at first.
            state: of `begin`; gets what later steps need of the tokens.

        Raises:
            ValueError: as `encode`.
        """
        state.make_room()
        places = torch.full((tokens.numel(),), state.position, device=tokens.device)
        stream = Stream(self.target(tokens.flatten(), places, state.position + 1))
        for number, layer in enumerate(self.decoder):
            stream = cast(DecoderLayer, layer).step(stream, state, number)
        state.position += 1
        logits = F.linear(stream.normed(self.decoder_norm)[0], self.output_weight)
        return logits.view(*tokens.shape, -1)

    @torch.no_grad()
    def soft_alignment(
        self,
        source: Tensor,
        source_lengths: Tensor,
        target_in: Tensor,
        target_lengths: Tensor,
        *,
        layer: int | None = None,
        heads: int | None = None,
    ) -> Tensor:
        """Return how much each target word attends to each source word, float32 [B, T, S]; 0 at padding.

        Row t is of the word that row t predicts: the probabilities of the aligned layer, the mean over the
        heads that can be supervised. The last row of a sentence, that of EOS, is 0 with `align_shift`, as no
        step reads it.

        Args:
            source: as of `logits`.
            source_lengths: likewise.
            target_in: likewise.
            target_lengths: likewise.
            layer: another layer than the aligned one, from 0 or from the last, -1.
            heads: the first so many heads, instead of `alignment_heads`.

        Raises:
            ValueError: as `encode`.
        """
        if layer is not None or heads is not None:
            with self.aligned_by(layer, heads):
                return self.soft_alignment(source, source_lengths, target_in, target_lengths)
        sides = (source, source_lengths, target_in, target_lengths)
        probabilities = self.attention_probabilities(*sides)[:, : self.config.alignment_heads].mean(1)
        if self.config.align_shift:
            probabilities = F.pad(probabilities[:, 1:], (0, 0, 0, 1))
        return probabilities

    @torch.no_grad()
    def attention_probabilities(
        self, source: Tensor, source_lengths: Tensor, target_in: Tensor, target_lengths: Tensor
    ) -> Tensor:
        """Return the cross-attention of the aligned layer, all heads, float32 [B, H, T, S]; 0 at padding.

        Row t is of the step that reads ``target_in[t]``. Arguments and errors are those of `logits`.
        """
        sides = (Packing.of_lengths(source_lengths), Packing.of_lengths(target_lengths))
        rows = (_rows(source, sides[0]), _rows(target_in, sides[1]))
        attended = self(*rows, *sides, aligned=True).attended
        assert attended is not None
        q, k, lse = (part[0].float().transpose(0, 1) for part in attended)
        q, k, lse = sides[1].padded(q), sides[0].padded(k), sides[1].padded(lse)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        within = sides[1].within()[:, None, :, None] & sides[0].within()[:, None, None]
        return (scores - lse.transpose(1, 2)[..., None]).exp().masked_fill(~within, 0.0)

    @contextlib.contextmanager
    def aligned_by(self, layer: int | None = None, heads: int | None = None) -> Iterator[None]:
        """Have another layer or other heads for the alignment, until the `with` block ends.

        Args:
            layer: as of `soft_alignment`.
            heads: likewise.

        Raises:
            ValueError: there is no such layer, or there are not so many heads.
        """
        config, changes = self.config, {"alignment_layer": layer, "alignment_heads": heads}
        given: dict[str, Any] = {name: value for name, value in changes.items() if value is not None}
        self.config = dataclasses.replace(config, **given)
        try:
            yield
        finally:
            self.config = config


def _rows(padded: Tensor, packing: Packing) -> Tensor:
    """Return the tokens of padded sentences [B, T], one after the other."""
    return padded[:, : packing.longest][packing.within()]
