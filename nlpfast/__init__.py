"""Attention and loss kernels for NLP training with PyTorch. Importing this changes nothing global."""

from nlpfast import hf, nn
from nlpfast.convert import accelerate, undo
from nlpfast.dispatch import use_backend
from nlpfast.ops.add_layer_norm import add_layer_norm
from nlpfast.ops.alignment_loss import alignment_loss, attention_at, hard_alignment
from nlpfast.ops.attention import attention
from nlpfast.ops.bias_gelu import bias_gelu, bias_relu
from nlpfast.ops.cross_entropy import cross_entropy
from nlpfast.ops.linear_cross_entropy import linear_cross_entropy
from nlpfast.ops.varlen_attention import varlen_attention

__all__ = [
    "__version__",
    "accelerate",
    "add_layer_norm",
    "alignment_loss",
    "attention",
    "attention_at",
    "bias_gelu",
    "bias_relu",
    "cross_entropy",
    "hard_alignment",
    "hf",
    "linear_cross_entropy",
    "nn",
    "undo",
    "use_backend",
    "varlen_attention",
]

__version__ = "0.1.0"
