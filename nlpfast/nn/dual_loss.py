"""The loss of dual supervised learning: two translators of opposite directions that have to agree.

A pair (x, y) has one joint probability, p(x) p(y|x) = p(y) p(x|y). With log-probabilities of two translators
and of two language models that stay as they are, what they disagree by is

    Delta = (log p(x) + log p(y|x)) - (log p(y) + log p(x|y))

and lambda Delta² is added to the loss of each. Source: Xia et al. 2017, "Dual supervised learning".

Shapes: B pairs.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["DualLoss", "dual_supervised_loss"]


class DualLoss(NamedTuple):
    """What `dual_supervised_loss` returns, all [B].

    Attributes:
        forward: loss of the translator from x to y.
        backward: of the one from y to x.
        gap: Delta, in nats, detached.
    """

    forward: Tensor
    backward: Tensor
    gap: Tensor


def dual_supervised_loss(
    forward: Tensor,
    backward: Tensor,
    lm_source: Tensor,
    lm_target: Tensor,
    dsl_lambda: float,
    *,
    source_tokens: Tensor | None = None,
    target_tokens: Tensor | None = None,
    detach: bool = True,
) -> DualLoss:
    """Return the losses of both directions, in nats.

    Equivalent, with a for `forward` and b for `backward`::

        L_xy = -a + dsl_lambda * ((lm_source + a) - (lm_target + b.detach())) ** 2
        L_yx = -b + dsl_lambda * ((lm_source + a.detach()) - (lm_target + b)) ** 2

    As each loss trains its own translator alone, the gradient of the sum of both is ``-1 + 2 dsl_lambda
    Delta`` in a and ``-1 - 2 dsl_lambda Delta`` in b: cross entropy with a weight for each sentence. Without
    `detach` each translator is trained by both losses, and 2 becomes 4.

    Args:
        forward: log p(y|x), [B].
        backward: log p(x|y), [B].
        lm_source: log p(x), [B], without a gradient.
        lm_target: log p(y), [B], likewise.
        dsl_lambda: how much agreement counts, >= 0; 1e-3 to 1e-2 where Delta is of whole sentences.
        source_tokens: tokens of x with EOS, [B]; in Delta log-probabilities are then those of a token, the
            mean. None for those of sentences, as in the paper.
        target_tokens: of y, likewise; given with `source_tokens`.
        detach: see above.

    Raises:
        ValueError: the shapes differ, `dsl_lambda` is negative, or one of the two numbers of tokens is
            missing.
    """
    shapes = {tuple(part.shape) for part in (forward, backward, lm_source, lm_target)}
    if len(shapes) > 1 or forward.dim() != 1:
        rule = "all four log-probabilities are [B]; pass one for each pair"
        raise ValueError(f"forward has shape {list(forward.shape)}, others {sorted(shapes)}: {rule}")
    if dsl_lambda < 0:
        raise ValueError(f"dsl_lambda={dsl_lambda} must be >= 0; 0 trains the two apart")
    if (source_tokens is None) != (target_tokens is None):
        raise ValueError("source_tokens and target_tokens go together: pass both or neither")

    def gap(a: Tensor, b: Tensor) -> Tensor:
        if source_tokens is None or target_tokens is None:
            return (lm_source + a) - (lm_target + b)
        return (lm_source / source_tokens + a / target_tokens) - (
            lm_target / target_tokens + b / source_tokens
        )

    stays_a, stays_b = (forward.detach(), backward.detach()) if detach else (forward, backward)
    return DualLoss(
        forward=-forward + dsl_lambda * gap(forward, stays_b) ** 2,
        backward=-backward + dsl_lambda * gap(stays_a, backward) ** 2,
        gap=gap(forward, backward).detach(),
    )
