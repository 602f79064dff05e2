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
    for schedule in ("cosine", "inverse_sqrt", "plateau"):
        assert learning_rate_multiplier(0, 0, 10, schedule) == 1.0


@pytest.mark.parametrize(
    ("seen", "expected"),
    [(0, 0.0), (1, 0.01), (50, 0.5), (99, 0.99), (100, 1.0), (400, 0.5), (10_000, 0.1), (1_000_000, 0.01)],
)
def test_the_inverse_square_root_has_no_end(seen, expected):
    """Whatever `final` is; the peak is where the warm-up ends."""
    for final in (0, 1100):
        assert learning_rate_multiplier(seen, 100, final, "inverse_sqrt") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        # 512^-.5 * 4000^-1.5 = 1.746929e-7 a step, up to (512 * 4000)^-.5; then (512 * step)^-.5
        *((0, 0.0), (1, 1.7469281e-7), (1000, 1.7469281e-4), (3999, 6.9859655e-4), (4000, 6.9877124e-4)),
        *((4001, 6.9868391e-4), (16_000, 3.4938562e-4), (100_000, 1.3975425e-4)),
    ],
)
def test_noam_of_the_paper(seen, expected):
    value = learning_rate_multiplier(seen, 4000, 1, "noam", width=512)
    assert value == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize(("width", "warmup"), [(4, 1), (16, 10), (512, 400)])
def test_noam_is_highest_at_the_end_of_its_warmup(width, warmup):
    values = [learning_rate_multiplier(step, warmup, 0, "noam", width=width) for step in range(1, 1000)]
    assert max(values) == values[warmup - 1] == pytest.approx((width * warmup) ** -0.5, rel=1e-12)
    # the other one is the same curve, with its peak at 1
    other = [learning_rate_multiplier(step, warmup, 0, "inverse_sqrt") for step in range(1, 1000)]
    assert [value / max(values) for value in values] == pytest.approx(other, rel=1e-12)


def test_noam_without_warmup_begins_at_its_peak():
    values = [learning_rate_multiplier(step, 0, 0, "noam", width=4) for step in (0, 1, 4)]
    assert values == pytest.approx([0.0, 0.5, 0.25])


@pytest.mark.parametrize(
    ("seen", "halvings", "expected"),
    [(25, 0, 0.25), (25, 1, 0.125), (100, 0, 1), (100, 1, 0.5), (9999, 3, 0.125)],
)
def test_a_plateau_is_halved(seen, halvings, expected):
    assert learning_rate_multiplier(seen, 100, 1100, "plateau", halvings=halvings) == expected
    assert learning_rate_multiplier(seen, 100, 1100, "constant", halvings=halvings) == min(1, seen / 100)


def test_noam_needs_a_width():
    with pytest.raises(ValueError, match="width=None: schedule noam needs the channels of the model"):
        learning_rate_multiplier(1, 1, 1, "noam")


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule is 'linear': give one of cosine, constant, mingpt"):
        learning_rate_multiplier(0, 0, 1, "linear")
