"""BERT: a Transformer that reads a sentence in both directions, with the parameter names of Hugging Face.

    tokens -> word + position + segment embeddings -> LayerNorm -> dropout -> BertLayer x n -> hidden states

A layer adds twice to its input, attention and a two-layer network, and normalises after each (post-norm).
The pooler makes a vector of a sentence from the hidden state of its first token, [CLS]. Source: Devlin et al.
2019, "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding".

A batch is padded, [B, T] with an attention mask, or packed, [N] with a `Packing`: its sentences lie one after
the other, and no layer computes anything for padding.

Shapes: B batch, T tokens of the longest sentence, N tokens of a packed batch, C channels (hidden_size), V
vocabulary, M masked tokens.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.models.bert_config import ACTIVATIONS, BertConfig, check_call
from nlpfast.models.bert_files import BertPretrained
from nlpfast.nn import BertSelfAttention
from nlpfast.nn.dropout import Dropout
from nlpfast.nn.network import linear_gelu, linear_relu
from nlpfast.nn.packing import Packing
from nlpfast.nn.residual import add_norm
from nlpfast.ops.cross_entropy import cross_entropy
from nlpfast.ops.linear_cross_entropy import linear_cross_entropy

__all__ = [
    "BertConfig",
    "BertForPreTraining",
    "BertLayer",
    "BertModel",
    "BertOutput",
    "BertPreTrainingOutput",
    "BertPretrained",
]


class BertOutput(NamedTuple):
    """What BertModel gives.

    Attributes:
        last_hidden_state: [B, T, C], or [N, C] of a packed batch.
        pooler_output: [B, C], the sentences.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor


class BertPreTrainingOutput(NamedTuple):
    """What BertForPreTraining gives; None for what was not asked for.

    Attributes:
        loss: scalar, the sum of the losses of the masked tokens and of the next sentences.
        prediction_logits: [..., V] of all tokens, or [M, V] of those at `rows`.
        seq_relationship_logits: [B, 2]; class 0 is "follows".
    """

    loss: Tensor | None
    prediction_logits: Tensor | None
    seq_relationship_logits: Tensor


def _activated(x: Tensor, linear: nn.Module, name: str) -> Tensor:
    """Return the activation of this name of ``linear(x)``."""
    approximate, layer = ACTIVATIONS[name], cast(nn.Linear, linear)
    return linear_relu(x, layer) if approximate is None else linear_gelu(x, layer, approximate)


class _AddNorm(nn.Module):
    """``LayerNorm(residual + dropout(dense(x)))``."""

    def __init__(self, channels: int, config: BertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(channels, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return add_norm(self.dense(x), residual, self.LayerNorm, self.dropout)[0]


class BertLayer(nn.Module):
    """One layer: ``x = norm(x + attention(x))``, then ``x = norm(x + network(x))``."""

    def __init__(self, config: BertConfig) -> None:
        """Build attention and network."""
        super().__init__()
        C = config.hidden_size
        self.attention = nn.ModuleDict({"self": BertSelfAttention(config), "output": _AddNorm(C, config)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(C, config.intermediate_size)})
        self.output = _AddNorm(config.intermediate_size, config)
        self.activation = config.hidden_act

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, *, packing: Packing | None = None
    ) -> Tensor:
        """Return the next layer's input; [B, T, C] -> [B, T, C], or [N, C] -> [N, C] with `packing`.

        The options are those of `BertSelfAttention`.
        """
        context = self.attention["self"](x, attention_mask, packing=packing)
        x = self.attention["output"](context, x)
        out: Tensor = self.output(_activated(x, self.intermediate["dense"], self.activation), x)
        return out


class _Embeddings(nn.Module):
    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        C = config.hidden_size
        self.word_embeddings = nn.Embedding(config.vocab_size, C, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, C)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, C)
        self.LayerNorm = nn.LayerNorm(C, config.layer_norm_eps)
        self.dropout = Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, types: Tensor | None, packing: Packing | None) -> Tensor:
        if packing is None:
            positions = self.position_embeddings.weight[: input_ids.shape[1]]
        else:
            positions = self.position_embeddings(packing.positions(len(input_ids)))
        # without segments all tokens are of segment 0
        segments = (
            self.token_type_embeddings.weight[0] if types is None else self.token_type_embeddings(types)
        )
        try:
            x = self.word_embeddings(input_ids) + positions + segments
        except IndexError as error:
            raise ValueError(
                f"input_ids or token_type_ids has a number that is too large ({error})"
            ) from None
        out: Tensor = self.dropout(self.LayerNorm(x))
        return out


class BertModel(BertPretrained):
    """The encoder and the pooler."""

    base_prefix = ""

    def __init__(self, config: BertConfig) -> None:
        """Build the model with initial weights.

        Args:
            config: the sizes.
        """
        super().__init__()
        self.config = config
        self.embeddings = _Embeddings(config)
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self._init_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        packing: Packing | None = None,
    ) -> BertOutput:
        """Return the hidden states of all tokens, and a vector of each sentence.

        A packed batch gives the same as a padded one, without its padding. From a padded one::

            packing = Packing.of_lengths(attention_mask.sum(1))
            output = model(input_ids[attention_mask.bool()], packing=packing)
            hidden = packing.padded(output.last_hidden_state)

        Args:
            input_ids: tokens, int64 [B, T], T <= max_position_embeddings; [N] with `packing`.
            attention_mask: [B, T], 0 or False for tokens that nobody is to see; None if all are seen.
            token_type_ids: segments, int64, of the shape of `input_ids`; None for 0 everywhere.
            packing: `input_ids` has several sentences, one after the other.

        Raises:
            ValueError: when the shapes do not fit, or (on the CPU) a token or segment is outside its range.
        """
        check_call(self.config, input_ids, attention_mask, token_type_ids, packing)
        x = self.embeddings(input_ids, token_type_ids, packing)
        seen = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        for layer in cast(nn.ModuleList, self.encoder["layer"]):
            x = layer(x, seen, packing=packing)
        first = x[:, 0] if packing is None else x[packing.cu_seqlens[:-1]]
        return BertOutput(x, torch.tanh(self.pooler["dense"](first)))


class _Predictions(nn.Module):
    """The head of masked tokens, whose last layer has the word embeddings for its weight."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        C = config.hidden_size
        norm = nn.LayerNorm(C, config.layer_norm_eps)
        self.transform = nn.ModuleDict({"dense": nn.Linear(C, C), "LayerNorm": norm})
        self.activation = config.hidden_act
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.transform["LayerNorm"](_activated(x, self.transform["dense"], self.activation))
        return out


class BertForPreTraining(BertPretrained):
    """BERT with the heads of its pretraining: masked tokens, and whether a sentence follows another."""

    def __init__(self, config: BertConfig) -> None:
        """Build the model with initial weights.

        Args:
            config: the sizes.
        """
        super().__init__()
        self.config = config
        self.bert = BertModel(config)
        self.cls = nn.ModuleDict(
            {"predictions": _Predictions(config), "seq_relationship": nn.Linear(config.hidden_size, 2)}
        )
        self._init_weights()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        *,
        packing: Packing | None = None,
        rows: Tensor | None = None,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
        return_logits: bool = True,
    ) -> BertPreTrainingOutput:
        """Return the loss, if there are labels, and the logits of both heads.

        The first four arguments are those of `BertModel.forward`.

        Args:
            input_ids: tokens.
            attention_mask: which of them are seen.
            token_type_ids: segments.
            packing: of a packed batch.
            rows: int64 [M], places of the masked tokens in the flattened batch: the head works on these.
            labels: int64 [M] with `rows`, otherwise of the shape of `input_ids`: the tokens that were there;
                -100 where none counts.
            next_sentence_label: int64, of the first sentences of the batch: 0 follows, 1 does not.
            return_logits: without, and with labels, there are never all logits of tokens at once.

        Raises:
            ValueError: as `BertModel.forward`.
        """
        x, pooled = self.bert(input_ids, attention_mask, token_type_ids, packing=packing)
        if rows is not None:
            x = x.flatten(0, -2)[rows]
        x = self.cls["predictions"](x)
        weight = self.bert.embeddings.word_embeddings.weight
        bias = cast(Tensor, self.cls["predictions"].bias)
        losses: list[Tensor] = []
        logits = F.linear(x, weight, bias) if return_logits or labels is None else None
        if labels is not None and logits is not None:
            losses.append(cross_entropy(logits, labels))
        elif labels is not None:
            losses.append(linear_cross_entropy(x, weight, labels, linear_bias=bias))
        relation = self.cls["seq_relationship"](pooled)
        if next_sentence_label is not None:
            losses.append(cross_entropy(relation[: len(next_sentence_label)], next_sentence_label))
        return BertPreTrainingOutput(sum(losses[1:], losses[0]) if losses else None, logits, relation)
