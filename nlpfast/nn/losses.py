"""Losses on the kernels of nlpfast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nlpfast.ops.cross_entropy import cross_entropy


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
