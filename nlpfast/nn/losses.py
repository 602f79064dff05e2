"""Losses on the kernels of nlpfast: torch's class, and those of translation toolkits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nlpfast.ops.alignment_loss import alignment_loss
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


class AlignedLoss(NamedTuple):
    """What LabelSmoothedCrossEntropyWithAlignment returns.

    Attributes:
        loss: what is minimised, a sum over the batch; its gradient is divided by `sample_size`.
        sample_size: [], the number of targets that count.
        logged: sums over the batch, detached, in nats: "loss" (smoothed, without alignment), "nll" and
            "alignment"; and "correct", the number of targets that were predicted.
    """

    loss: Tensor
    sample_size: Tensor
    logged: dict[str, Tensor]


class LabelSmoothedCrossEntropyWithAlignment(LabelSmoothedCrossEntropy):
    """Label-smoothed cross entropy, and attention that is to agree with given word alignments.

    fairseq's label_smoothed_cross_entropy_with_alignment: the first plus `alignment_lambda` times the
    second, both sums, to be divided by the number of targets. Here the alignment loss is computed from query,
    key and lse of one attention layer, and the probabilities of all pairs never exist.

    Attributes:
        alignment_lambda: the factor of the alignment loss.
        align_shift: 0 supervises the step that predicts a target word (fairseq), 1 the step that reads it
            (Chen et al., "Accurate word alignment induction from neural machine translation", 2020).
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        alignment_lambda: float = 0.05,
        smoothing: str = "fairseq",
        align_shift: int = 0,
        *,
        ignore_index: int = -100,
        pad_index: int | None = None,
    ) -> None:
        """Take the attributes.

        Raises:
            ValueError: for an `align_shift` other than 0 and 1.
        """
        super().__init__(
            label_smoothing,
            smoothing=smoothing,
            ignore_index=ignore_index,
            pad_index=pad_index,
            reduction="sum",
        )
        if align_shift not in (0, 1):
            raise ValueError(f"align_shift is {align_shift}; it must be 0 or 1: see the docstring")
        self.alignment_lambda, self.align_shift = alignment_lambda, align_shift

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        target: Tensor,
        linear_weight: Tensor | None = None,
        linear_bias: Tensor | None = None,
        *,
        pairs: Tensor | None = None,
        query: Tensor | None = None,
        key: Tensor | None = None,
        lse: Tensor | None = None,
        weights: Tensor | None = None,
        heads: int | Sequence[int] | None = None,
        scale: float | None = None,
    ) -> AlignedLoss:
        """Return the loss, the number of targets, and the parts.

        Args:
            input: logits [B, T, V]; with a weight the features [B, T, D] that it makes logits of.
            target: int64 [B, T], classes or `ignore_index`.
            linear_weight: [V, D], or None.
            linear_bias: [V], or None.
            pairs: int64 [P, 3]: batch entry, target word, source word; None for a batch without alignments.
                Rows are those of the step that predicts the target, as ``nlpfast.data.parallel`` has them;
                `align_shift` is added here.
            query: [B, H, T, D], of the supervised layer.
            key: [B, Hk, S, D].
            lse: [B, H, T], as ``nlpfast.attention`` returned it.
            weights: [P], or None for 1 / the number of pairs of a target word.
            heads: see ``alignment_loss``.
            scale: see ``alignment_loss``.

        Raises:
            ValueError: for arguments that do not fit one another; see the functions.
        """
        found = super().forward(input, target, linear_weight, linear_bias, return_nll=True)
        assert isinstance(found, tuple)
        loss, nll, correct = found
        counted = (target != self.ignore_index) & (
            target != (-1 if self.pad_index is None else self.pad_index)
        )
        logged = {"loss": loss.detach(), "nll": nll, "correct": correct, "alignment": torch.zeros_like(nll)}
        if pairs is not None:
            if query is None or key is None or lse is None:
                raise ValueError(
                    "pairs is given without query, key and lse: pass those of the supervised layer"
                )
            pairs = pairs + pairs.new_tensor((0, self.align_shift, 0))
            options: dict[str, Any] = {"heads": heads, "scale": scale, "backend": self.backend}
            alignment = alignment_loss(query, key, lse, pairs, weights, **options)
            logged["alignment"] = alignment.detach()
            loss = loss + self.alignment_lambda * alignment
        return AlignedLoss(loss, counted.sum(), logged)
