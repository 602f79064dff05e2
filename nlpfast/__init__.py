"""Attention and loss kernels for NLP training with PyTorch. Importing this changes nothing global."""

from nlpfast.ops.attention import attention
from nlpfast.ops.varlen_attention import varlen_attention

__all__ = ["__version__", "attention", "varlen_attention"]

__version__ = "0.1.0"
