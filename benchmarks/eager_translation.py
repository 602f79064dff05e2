"""A Transformer's training step as people write it: padded, with all scores and logits, fairseq's criterion.

It computes with the parameters of `nlpfast.models.transformer.Transformer`, so that both start from the same
weights and their gradients have the same names.

Shapes: B sentences, S source tokens and T target tokens of the longest, H heads, C channels, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.models.transformer import Transformer
from nlpfast.models.transformer_layers import DecoderLayer, Embeddings, EncoderLayer, sinusoids
from nlpfast.nn.sequence_attention import CrossAttention, SelfAttention

__all__ = ["Uncached", "aligned_loss", "decode", "encode", "log_probabilities_of", "padded", "smoothed_loss"]


def encode(model: Transformer, source: Tensor) -> Tensor:
    """Return the memory of padded sentences, [B, S, C].

    Args:
        model: with pre-norm layers.
        source: int64 [B, S].
    """
    seen = (source != model.config.pad_id)[:, None, None]
    x = _embedded(model.source, source)
    for layer in model.encoder:
        assert isinstance(layer, EncoderLayer)
        y = _to_itself(layer.self_attention, layer.self_attention_norm(x), seen)
        x = _network(layer, x + _dropped(layer, y))
    memory: Tensor = model.encoder_norm(x)
    return memory


def decode(
    model: Transformer, target_in: Tensor, memory: Tensor, source: Tensor, *, causal: bool = True
) -> tuple[Tensor, Tensor]:
    """Return features [B, T, C], and the cross-attention's probabilities of the aligned layer, [B, H, T, S].

    Args:
        model: with pre-norm layers.
        target_in: int64 [B, T].
        memory: of `encode`.
        source: int64 [B, S].
        causal: a token does not see those after it.
    """
    T = target_in.shape[1]
    seen, aligned = (source != model.config.pad_id)[:, None, None], memory
    visible = (target_in != model.config.pad_id)[:, None, None]
    if causal:
        visible = visible & torch.ones(T, T, dtype=torch.bool).tril()
    x = _embedded(model.target, target_in)
    for number, layer in enumerate(model.decoder):
        assert isinstance(layer, DecoderLayer)
        y = _to_itself(layer.self_attention, layer.self_attention_norm(x), visible)
        x = x + _dropped(layer, y)
        y, probabilities = _to_memory(layer.cross_attention, layer.cross_attention_norm(x), memory, seen)
        x = _network(layer, x + _dropped(layer, y))
        aligned = probabilities if number == model.config.aligned_layer() else aligned
    return model.decoder_norm(x), aligned


def smoothed_loss(logits: Tensor, target_out: Tensor, pad_id: int, label_smoothing: float) -> Tensor:
    """Return fairseq's label_smoothed_cross_entropy, summed.

    Args:
        logits: [B, T, V].
        target_out: int64 [B, T].
        pad_id: the target that does not count.
        label_smoothing: eps.
    """
    log_probs = _at_least_float(logits).log_softmax(-1)
    nll = -log_probs.gather(-1, target_out[..., None]).squeeze(-1)
    smooth = -log_probs.sum(-1)
    padding = target_out == pad_id
    nll, smooth = nll.masked_fill(padding, 0.0).sum(), smooth.masked_fill(padding, 0.0).sum()
    eps = label_smoothing / (logits.shape[-1] - 1)
    return (1.0 - label_smoothing - eps) * nll + eps * smooth


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> Tensor:
    """Return the tokens of sentences one below the other, int64 [B, longest].

    Args:
        rows: tokens of each.
        pad_id: token that fills up.
    """
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])


@torch.no_grad()
def log_probabilities_of(model: Transformer, source: Tensor, tokens: Tensor) -> Tensor:
    """Return the logarithm of the probability of whole translations, in float64, [B].

    Args:
        model: of any dtype; stays as it is.
        source: int64 [B, S].
        tokens: int64 [B, T + 1], from BOS to EOS, all of one length.
    """
    exact = copy.deepcopy(model).double()
    features, _ = decode(exact, tokens[:, :-1], encode(exact, source), source)
    log_probs = F.linear(features, exact.output_weight).log_softmax(-1)
    return log_probs.gather(-1, tokens[:, 1:, None]).sum((1, 2))


def aligned_loss(probabilities: Tensor, pairs: Tensor, heads: int) -> Tensor:
    """Return the alignment loss of fairseq's criterion, summed.

    Args:
        probabilities: [B, H, T, S].
        pairs: int64 [P, 3]: sentence, target row, source column.
        heads: the first so many, whose mean it is.
    """
    mean = probabilities[:, :heads].mean(1)
    sentence, row, column = pairs.T
    links = torch.zeros(mean.shape[:2]).index_put((sentence, row), torch.ones(len(pairs)), accumulate=True)
    weights = 1.0 / links[sentence, row]
    return -(weights * mean[sentence, row, column].log()).sum()


def _embedded(embeddings: Embeddings, tokens: Tensor) -> Tensor:
    x = embeddings.tokens(tokens) * embeddings.scale
    return F.dropout(
        x + sinusoids(tokens.shape[1], x.shape[-1]).to(x), embeddings.dropout.p, embeddings.training
    )


def _dropped(layer: EncoderLayer | DecoderLayer, x: Tensor) -> Tensor:
    return F.dropout(x, layer.dropout.p, layer.training)


def _network(layer: EncoderLayer | DecoderLayer, x: Tensor) -> Tensor:
    network = layer.network
    y = network.fc2(F.relu(network.fc1(layer.network_norm(x)), inplace=True))
    return x + _dropped(layer, y)


def _at_least_float(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, dropout: nn.Dropout) -> tuple[Tensor, Tensor]:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    probabilities = _at_least_float(scores.masked_fill(~seen, -math.inf)).softmax(-1)
    weights = F.dropout(probabilities, dropout.p, dropout.training).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2), probabilities


def _to_itself(attention: SelfAttention, x: Tensor, seen: Tensor) -> Tensor:
    q, k, v = (_heads(part, attention.heads) for part in attention.in_proj(x).chunk(3, dim=-1))
    out: Tensor = attention.out_proj(_attend(q, k, v, seen, attention.dropout)[0])
    return out


def _to_memory(attention: CrossAttention, x: Tensor, memory: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    k, v = (_heads(part, attention.heads) for part in attention.key_value_proj(memory).chunk(2, dim=-1))
    y, probabilities = _attend(
        _heads(attention.query_proj(x), attention.heads), k, v, seen, attention.dropout
    )
    return attention.out_proj(y), probabilities


class Uncached:
    """A model whose steps read all tokens of each hypothesis again, and the memory for each."""

    def __init__(self, model: Transformer) -> None:
        """Take over the model."""
        self.model, self.config = model, model.config

    def begin(self, source: Tensor, lengths: Tensor, beam: int) -> Written:
        """Read the sources; see `Transformer.begin`."""
        return Written(source, encode(self.model, source), beam)

    def advance(self, tokens: Tensor, state: Written) -> Tensor:
        """Return the logits of the next token; see `Transformer.advance`."""
        state.tokens = torch.cat((state.tokens, tokens.reshape(-1, 1)), dim=1)
        features, _ = decode(self.model, state.tokens, state.memory, state.source)
        return F.linear(features[:, -1], self.model.output_weight).view(*tokens.shape, -1)


class Written:
    """What the hypotheses have written."""

    def __init__(self, source: Tensor, memory: Tensor, beam: int) -> None:
        """Begin with no token."""
        self.source, self.memory = (x.repeat_interleave(beam, 0) for x in (source, memory))
        self.tokens, self.beam = source.new_empty(len(source) * beam, 0), beam

    def reorder(self, beams: Tensor) -> None:
        """Have each hypothesis go on from another's tokens."""
        first = torch.arange(len(beams)) * self.beam
        self.tokens = self.tokens[(beams + first[:, None]).flatten()]

    def keep(self, sentences: Tensor) -> None:
        """Forget the other sentences."""
        rows = (sentences[:, None] * self.beam + torch.arange(self.beam)).flatten()
        self.tokens, self.source, self.memory = self.tokens[rows], self.source[rows], self.memory[rows]
