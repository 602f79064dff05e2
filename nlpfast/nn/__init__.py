"""Drop-in modules: torch.nn modules with the constructors and state-dict names of the originals."""

from nlpfast.nn.bert_attention import BertSelfAttention
from nlpfast.nn.causal_attention import AttentionConfig, CausalCrossAttention, CausalSelfAttention
from nlpfast.nn.losses import (
    AlignedLoss,
    CrossEntropyLoss,
    LabelSmoothedCrossEntropy,
    LabelSmoothedCrossEntropyWithAlignment,
)
from nlpfast.nn.multihead_attention import MultiheadAttention
from nlpfast.nn.packed_attention import PackedCausalSelfAttention

__all__ = [
    "AlignedLoss",
    "AttentionConfig",
    "BertSelfAttention",
    "CausalCrossAttention",
    "CausalSelfAttention",
    "CrossEntropyLoss",
    "LabelSmoothedCrossEntropy",
    "LabelSmoothedCrossEntropyWithAlignment",
    "MultiheadAttention",
    "PackedCausalSelfAttention",
]
