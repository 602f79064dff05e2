"""The logarithms of the probabilities that models give to whole sentences, with gradients for each.

What dual learning and minimum risk training weigh sentences by: a loss that is a function of these numbers
has the gradient of cross entropy with a weight for each sentence.

Shapes: B sentences, N tokens of a packed batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nlpfast.data.sentence_batches import SentenceBatch
from nlpfast.data.translation_batches import TranslationBatch
from nlpfast.nn.losses import LabelSmoothedCrossEntropy
from nlpfast.nn.packing import Packing

__all__ = ["sentence_log_probabilities", "translation_log_probabilities"]

# of each row, and not smoothed
_NLL = LabelSmoothedCrossEntropy(0.0, reduction="none")


def translation_log_probabilities(model: nn.Module, batch: TranslationBatch) -> Tensor:
    """Return log p(target | source) of the pairs of a batch, in nats, with EOS; [B].

    Float32 (float64 for a model in float64). There are never all logits at once.

    Args:
        model: a `Transformer` or a `Seq2Seq`, or what shares it between processes.
        batch: on the model's device.

    Raises:
        ValueError: as the model.
    """
    nll: Tensor = model(
        *(batch.source, batch.target_in),
        *(Packing(batch.source_cu, batch.source_longest), Packing(batch.target_cu, batch.target_longest)),
        criterion=_NLL,
        target_out=batch.target_out,
    )
    return _sums(-nll[0], batch.target_cu, batch.sentences)


def sentence_log_probabilities(model: nn.Module, batch: SentenceBatch) -> Tensor:
    """Return log p of the sentences of a batch under a language model, in nats, with EOS; [B].

    Float32 (float64 for a model in float64). There are never all logits at once.

    Args:
        model: has `features(idx, packing)`, [N] -> [N, C], and `head`, which makes logits of them: a `GPT`
            or an `RNNLM`.
        batch: on the model's device.

    Raises:
        ValueError: as the model.
    """
    language_model: Any = model
    features = language_model.features(batch.tokens_in, Packing(batch.cu_seqlens, batch.longest))
    head = language_model.head
    nll = _NLL(features, batch.tokens_out, head.weight, head.bias)
    return _sums(-nll, batch.cu_seqlens, batch.sentences)


def _sums(values: Tensor, cu_seqlens: Tensor, sentences: int) -> Tensor:
    return torch.segment_reduce(values, "sum", offsets=cu_seqlens, initial=0)[:sentences]
