"""The layers of a Transformer that translates: embeddings with positions, encoder and decoder layers.

A part of a layer (attention to itself, attention to the memory, a two-layer network) adds to its input; that
is normalised before the part ("pre") or what comes out is ("post"). With "pre" the sum is left to the norm of
the next part, as both are one operation. Source: Vaswani et al. 2017, "Attention is all you need".

Shapes: N source rows and M target rows of a packed batch, R hypotheses, C channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.models.transformer_config import TransformerConfig
from nlpfast.models.transformer_state import TransformerState
from nlpfast.nn.dropout import Dropout
from nlpfast.nn.network import linear_gelu, linear_relu
from nlpfast.nn.packing import Packing
from nlpfast.nn.residual import Stream, add_norm
from nlpfast.nn.sequence_attention import Attended, CrossAttention, SelfAttention

__all__ = ["DecoderLayer", "Embeddings", "EncoderLayer", "sinusoids"]


def sinusoids(positions: int, channels: int) -> Tensor:
    """Return the positions of Vaswani et al., float32 [positions, channels].

    Column 2i is ``sin(p / 10000^(2i / channels))``, and column 2i + 1 the cosine of the same.

    Args:
        positions: how many, from 0.
        channels: an even number.
    """
    rates = 10000.0 ** (-torch.arange(0, channels, 2, dtype=torch.float64) / channels)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), dim=2).flatten(1).float()


class Embeddings(nn.Module):
    """Embeddings times sqrt(C), and positions; then dropout."""

    def __init__(self, config: TransformerConfig, vocabulary: int, tokens: nn.Embedding | None) -> None:
        """Build the embeddings.

        Args:
            config: the sizes.
            vocabulary: tokens.
            tokens: embeddings to be shared; None for new ones.
        """
        super().__init__()
        C = config.d_model
        self.tokens = tokens or nn.Embedding(vocabulary, C, padding_idx=config.pad_id)
        self.scale = math.sqrt(C)
        self.positions: nn.Embedding | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, C)
        self.dropout = Dropout(config.dropout)
        self._most = config.max_positions
        # made at the first call, as long as is needed: no parameter, and in no state dict
        self._table = torch.empty(0, C)

    def forward(self, tokens: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Return what the first layer reads, [..., C].

        Args:
            tokens: int64 [...].
            positions: int64 [...], their places in their sentences.
            longest: more than any place.

        Raises:
            ValueError: a sentence is too long, or (on the CPU) a token is not in the vocabulary.
        """
        if longest > self._most:
            raise ValueError(
                f"a sentence has {longest} tokens, max_positions={self._most} is the most this model reads; "
                "cut it"
            )
        try:
            x = self.tokens(tokens) * self.scale
        except IndexError:
            words = len(self.tokens.weight)
            outside = tokens[(tokens < 0) | (tokens >= words)]
            rule = f"which is not in the vocabulary, 0..{words - 1}; use the vocabulary of this model"
            raise ValueError(f"a sentence has the token {int(outside[0])}, {rule}") from None
        out: Tensor = self.dropout(x + F.embedding(positions, self._places(longest, x)))
        return out

    def _places(self, longest: int, like: Tensor) -> Tensor:
        if self.positions is not None:
            return self.positions.weight
        if len(self._table) < longest or self._table.device != like.device or self._table.dtype != like.dtype:
            rows = min(max(2 * len(self._table), longest, 64), self._most)
            self._table = sinusoids(rows, like.shape[-1]).to(like)
        return self._table


class _Network(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_ff)
        self.fc2 = nn.Linear(config.d_ff, config.d_model)
        self.gelu = config.activation == "gelu"
        self.dropout = Dropout(config.activation_dropout)

    def forward(self, x: Tensor) -> Tensor:
        middle = (linear_gelu if self.gelu else linear_relu)(x, self.fc1)
        out: Tensor = self.fc2(self.dropout(middle))
        return out


class _Layer(nn.Module):
    """What adds to its input, in parts."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        C = config.d_model
        self.pre = config.norm == "pre"
        self.self_attention = SelfAttention(C, config.heads, config.attention_dropout)
        self.self_attention_norm = nn.LayerNorm(C)
        self.network = _Network(config)
        self.network_norm = nn.LayerNorm(C)
        self.dropout = Dropout(config.dropout)

    def _before(self, stream: Stream, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """Return what a part reads, and what it adds to."""
        return stream.normed(norm) if self.pre else (stream.x, stream.x)

    def _after(self, x: Tensor, part: Tensor, norm: nn.LayerNorm) -> Stream:
        return Stream(x, part, self.dropout) if self.pre else Stream(add_norm(part, x, norm, self.dropout)[0])

    def _through_network(self, stream: Stream) -> Stream:
        reads, x = self._before(stream, self.network_norm)
        return self._after(x, self.network(reads), self.network_norm)


class EncoderLayer(_Layer):
    """Attention of the source to itself, and a network."""

    def forward(self, stream: Stream, packing: Packing) -> Stream:
        """Return what the next layer gets.

        Args:
            stream: sentences one after the other.
            packing: where they begin and end.
        """
        norm = self.self_attention_norm
        reads, x = self._before(stream, norm)
        return self._through_network(self._after(x, self.self_attention(reads, packing), norm))


class DecoderLayer(_Layer):
    """Attention of the target to itself, to the memory, and a network."""

    def __init__(self, config: TransformerConfig) -> None:
        """Build the parts."""
        super().__init__(config)
        self.cross_attention = CrossAttention(config.d_model, config.heads, config.attention_dropout)
        self.cross_attention_norm = nn.LayerNorm(config.d_model)

    def _attend_to_itself(self, stream: Stream, packing: Packing, is_causal: bool) -> Stream:
        norm = self.self_attention_norm
        reads, x = self._before(stream, norm)
        return self._after(x, self.self_attention(reads, packing, is_causal=is_causal), norm)

    def forward(
        self,
        stream: Stream,
        packing: Packing,
        memory: Tensor,
        memory_packing: Packing,
        *,
        is_causal: bool = True,
        aligned: bool = False,
    ) -> tuple[Stream, Attended | None]:
        """Return what the next layer gets, and what the cross-attention's probabilities follow from.

        Args:
            stream: [M, C], targets one after the other.
            packing: where they begin and end.
            memory: [N, C], the encoder's output.
            memory_packing: where its sentences begin and end.
            is_causal: a token does not see those after it.
            aligned: return the second; None otherwise.
        """
        norm = self.cross_attention_norm
        reads, x = self._before(self._attend_to_itself(stream, packing, is_causal), norm)
        part, attended = self.cross_attention(reads, packing, memory, memory_packing, aligned=aligned)
        return self._through_network(self._after(x, part, norm)), attended

    def probe(self, stream: Stream, packing: Packing, memory: Tensor, memory_packing: Packing) -> Attended:
        """Return what the cross-attention's probabilities follow from where a token sees those after it.

        The arguments are those of `forward`; nothing behind the probabilities is computed.
        """
        stream = self._attend_to_itself(stream, packing, is_causal=False)
        reads, _ = self._before(stream, self.cross_attention_norm)
        return self.cross_attention.probe(reads, packing, memory, memory_packing)

    def step(self, stream: Stream, state: TransformerState, layer: int) -> Stream:
        """Return what the next layer gets of one new token of each hypothesis; [R, C] each.

        Args:
            stream: the tokens, of K hypotheses of each sentence, sentence after sentence.
            state: of the decoder; gets the keys and values of this layer.
            layer: the number of this layer.
        """
        norm = self.self_attention_norm
        reads, x = self._before(stream, norm)
        keys, values = state.own(layer)
        stream = self._after(x, self.self_attention.step(reads, keys, values, state.position), norm)
        norm = self.cross_attention_norm
        reads, x = self._before(stream, norm)
        part = self.cross_attention.step(reads, *state.memory[layer], state.lengths)
        return self._through_network(self._after(x, part, norm))
