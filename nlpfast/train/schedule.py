"""The learning rate as a function of the tokens, or of the optimizer steps, so far."""

from __future__ import annotations

import math

from nlpfast.train.config import SCHEDULES

__all__ = ["learning_rate_multiplier"]


def learning_rate_multiplier(
    seen: int, warmup: int, final: int, schedule: str, *, width: int | None = None, halvings: int = 0
) -> float:
    """Return the factor by which the learning rate is multiplied.

    All but "noam" rise linearly from 0 to 1 over the warm-up. After it, with `progress` running from 0 to 1
    between `warmup` and `final`::

        constant       1
        cosine         max(.1, .5 * (1 + cos(pi * min(progress, 1))))
        mingpt         max(.1, .5 * (1 + cos(pi * progress)))
        inverse_sqrt   sqrt(warmup / seen)
        noam           width^-.5 * min(seen^-.5, seen * warmup^-1.5), from the first step on
        plateau        .5^halvings, also within the warm-up

    "cosine" is that of Loshchilov and Hutter 2017, without restarts and not below a tenth. "mingpt" is what
    minGPT of 2020 does: the rate climbs again when a run goes on past `final`. "noam" is formula 3 of Vaswani
    et al. 2017; the learning rate is its factor, 1 in the paper, and its peak is that factor times
    (width * warmup)^-.5. "inverse_sqrt" is the same curve with the learning rate as its peak, as fairseq's
    schedule; fairseq does not count the step at hand, and begins at a rate of 1e-7 or so.
    "plateau" is that of CS224N's assignment 4, which also goes back to the best model each time.

    Args:
        seen: tokens or optimizer steps so far, those of the current step included. A token is a target that
            counts in the loss.
        warmup: length of the warm-up, in the same unit; 0 for none, which for "inverse_sqrt" and "noam" is 1.
        final: where the cosine ends, in the same unit.
        schedule: one of the names above.
        width: channels of the model, for "noam".
        halvings: how often evaluations were not better for too long, for "plateau".

    Raises:
        ValueError: an unknown schedule, or "noam" without a width.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}: give one of {', '.join(SCHEDULES)}")
    if schedule == "noam":
        if width is None:
            raise ValueError("width=None: schedule noam needs the channels of the model, give them")
        return float(width**-0.5 * min(max(1, seen) ** -0.5, seen * max(1, warmup) ** -1.5))
    halved = 0.5**halvings if schedule == "plateau" else 1.0
    if seen < warmup:
        return halved * seen / max(1, warmup)
    if schedule in ("constant", "plateau"):
        return halved
    if schedule == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / max(1, seen))
    progress = (seen - warmup) / max(1, final - warmup)
    if schedule == "cosine":
        progress = min(progress, 1.0)
    return max(0.1, 0.5 * (1.0 + math.cos(math.pi * progress)))
