"""Attention and loss kernels for NLP training with PyTorch. Importing this changes nothing global."""

from nlpfast.ops.attention import attention

__all__ = ["__version__", "attention"]

__version__ = "0.1.0"
