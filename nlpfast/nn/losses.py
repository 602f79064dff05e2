"""Losses on the kernels of nlpfast: torch's class, and one with the smoothing of translation toolkits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nlpfast.ops.cross_entropy import cross_entropy
from nlpfast.ops.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross entropy of logits and classes: torch's class of that name, its constructor and its shapes.

    Equivalent PyTorch: ``torch.nn.CrossEntropyLoss`` with the same arguments; the loss of 16-bit logits is
    float32. Class weights and targets that are probabilities are computed by PyTorch.

    Attributes:
        backend: name of the cross entropy backend, None to let the device and the dtype decide.
    """

    backend: str | None = None

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the loss.

        Args:
            input: logits, [C], [N, C] or [N, C, d1, ...], of C classes.
            target: int64, [], [N] or [N, d1, ...], classes; or probabilities in the input's shape.

        Returns:
            A scalar, or the target's shape with ``reduction="none"``.

        Raises:
            ValueError: for shapes that do not fit, and on the CPU for targets that are no class.
        """
        if self.weight is not None or target.dtype != torch.int64:
            return super().forward(input, target)
        logits = input if input.dim() < 3 else input.movedim(1, -1)
        return cross_entropy(
            logits,
            target,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            backend=self.backend,
        )


class LabelSmoothedCrossEntropy(nn.Module):
    """Cross entropy with smoothed labels, of logits or of what a projection makes logits of.

    Equivalent: ``nlpfast.cross_entropy`` and ``linear_cross_entropy`` with the attributes for keywords.
    With ``smoothing="fairseq"`` and ``reduction="sum"`` loss and nll are those of fairseq's criterion
    label_smoothed_cross_entropy, with "exclude_pad" the loss is JoeyNMT's plus the entropy of the labels.

    Attributes:
        label_smoothing: eps, 0..1.
        smoothing: "uniform", "fairseq" or "exclude_pad".
        ignore_index: the target of rows that do not count.
        pad_index: the class without mass, for "exclude_pad" and only there.
        reduction: "none", "sum", "mean" or "sequence".
        backend: name of a backend, None to let the device and the dtype decide.
    """

    backend: str | None = None

    def __init__(
        self,
        label_smoothing: float = 0.1,
        *,
        smoothing: str = "fairseq",
        ignore_index: int = -100,
        pad_index: int | None = None,
        reduction: str = "mean",
    ) -> None:
        """Take the attributes; what does not fit is an error of the first call."""
        super().__init__()
        self.label_smoothing, self.smoothing, self.reduction = label_smoothing, smoothing, reduction
        self.ignore_index, self.pad_index = ignore_index, pad_index

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        *,
        return_nll: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Return the loss, or the loss, the nll and the number of correct rows.

        Args:
            input: logits [..., V]; with a weight the features [..., D] that it makes logits of, which then
                never exist all at once.
            target: [...], int64, classes or `ignore_index`.
            linear_weight: [V, D], or None.
            linear_bias: [V], or None; only with a weight.
            return_nll: also return the loss without smoothing and the number of correct rows.

        Raises:
            ValueError: for arguments that do not fit one another; see the functions.
        """
        options: dict[str, Any] = {
            "label_smoothing": self.label_smoothing,
            "smoothing": self.smoothing,
            "ignore_index": self.ignore_index,
            "pad_index": self.pad_index,
            "reduction": self.reduction,
            "return_nll": return_nll,
            "backend": self.backend,
        }
        if linear_weight is not None:
            return linear_cross_entropy(input, linear_weight, target, linear_bias=linear_bias, **options)
        if linear_bias is not None:
            raise ValueError("linear_bias is given without linear_weight: pass both, or logits alone")
        return cross_entropy(input, target, **options)

    def extra_repr(self) -> str:
        """Return the attributes, for print."""
        names = ("label_smoothing", "smoothing", "ignore_index", "pad_index", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
