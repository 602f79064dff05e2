"""Learning-rate multipliers at points computed by hand."""

import math

import pytest

from nlpfast.train.schedule import learning_rate_multiplier

HALF_ROOT = 0.5 * (1 + math.sqrt(0.5))


@pytest.mark.parametrize(
    ("schedule", "tokens", "expected"),
    [
        # warm-up over 100 tokens, the end at 1100
        *[(schedule, 0, 0.0) for schedule in ("cosine", "constant", "mingpt")],
        *[(schedule, 25, 0.25) for schedule in ("cosine", "constant", "mingpt")],
        *[(schedule, 99, 0.99) for schedule in ("cosine", "constant", "mingpt")],
        *[(schedule, 100, 1.0) for schedule in ("cosine", "constant", "mingpt")],
        ("constant", 600, 1.0),
        ("constant", 10_000, 1.0),
        ("cosine", 350, HALF_ROOT),
        ("mingpt", 350, HALF_ROOT),
        ("cosine", 600, 0.5),
        ("mingpt", 600, 0.5),
        ("cosine", 850, 1 - HALF_ROOT),
        ("mingpt", 1000, 0.1),
        ("cosine", 1100, 0.1),
        ("mingpt", 1100, 0.1),
        # past the end: clamped, or climbing again as published
        ("cosine", 1600, 0.1),
        ("mingpt", 1600, 0.5),
        ("cosine", 2100, 0.1),
        ("mingpt", 2100, 1.0),
    ],
)
def test_multiplier(schedule, tokens, expected):
    assert learning_rate_multiplier(tokens, 100, 1100, schedule) == pytest.approx(expected, abs=1e-12)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate_multiplier(0, 0, 10, "cosine") == 1.0


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is 'linear'"):
        learning_rate_multiplier(0, 0, 1, "linear")
