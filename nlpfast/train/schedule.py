"""The learning rate as a function of the tokens seen so far."""

from __future__ import annotations

import math


def learning_rate_multiplier(tokens: int, warmup_tokens: int, final_tokens: int, schedule: str) -> float:
    """Return the factor by which the peak learning rate is multiplied after `tokens` tokens.

    Linear from 0 to 1 over `warmup_tokens`; then, with `progress` running from 0 to 1 between `warmup_tokens`
    and `final_tokens`::

        constant   1
        cosine     max(.1, .5 * (1 + cos(pi * min(progress, 1))))
        mingpt     max(.1, .5 * (1 + cos(pi * progress)))

    "mingpt" is what minGPT of 2020 does: the rate climbs again when a run goes on past `final_tokens`.

    Args:
        tokens: targets that counted in the loss so far, those of the current step included.
        warmup_tokens: length of the warm-up in tokens; 0 for none.
        final_tokens: where the cosine ends.
        schedule: "constant", "cosine" or "mingpt".

    Raises:
        ValueError: an unknown schedule.
    """
    if schedule not in ("constant", "cosine", "mingpt"):
        raise ValueError(f"schedule is {schedule!r}: give one of constant, cosine, mingpt")
    if tokens < warmup_tokens:
        return tokens / max(1, warmup_tokens)
    if schedule == "constant":
        return 1.0
    progress = (tokens - warmup_tokens) / max(1, final_tokens - warmup_tokens)
    if schedule == "cosine":
        progress = min(progress, 1.0)
    return max(0.1, 0.5 * (1.0 + math.cos(math.pi * progress)))
