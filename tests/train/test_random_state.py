"""The state of every generator: what is drawn after it was put back is what was drawn after it was taken."""

import random

import numpy as np
import pytest
import torch

from nlpfast.train.random_state import random_state, random_state_kept, set_random_state

DRAWS = {
    "python": random.random,
    "python's normal numbers": lambda: random.gauss(0, 1),
    "numpy": np.random.rand,
    "numpy's normal numbers": np.random.randn,
    "torch": lambda: torch.rand(1).item(),
    "torch's normal numbers": lambda: torch.randn(1).item(),
}


@pytest.mark.parametrize("pending", [False, True])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_draws_come_again(draw, pending):
    if pending:
        # the second of a pair waits
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    state = random_state()
    drawn = [draw() for _ in range(3)]
    for other in DRAWS.values():
        other()
    set_random_state(state)
    assert [draw() for _ in range(3)] == drawn
    with random_state_kept():
        set_random_state(state)
        assert [draw() for _ in range(3)] == drawn
        draw()
    set_random_state(state)
    [draw() for _ in range(3)]
    after = draw()
    set_random_state(state)
    [draw() for _ in range(3)]
    with random_state_kept():
        draw()
    assert draw() == after


@pytest.mark.parametrize("name", list(random_state()))
def test_what_is_missing_or_damaged_changes_nothing(name):
    before = random_state()
    for damaged in ({**before, name: before[name][:-1]} if before[name].ndim else {}, {**before}):
        damaged = dict(damaged)
        if len(damaged) == len(before) and damaged[name] is before[name]:
            del damaged[name]
        with pytest.raises(ValueError, match="missing or damaged"):
            set_random_state(damaged)
    after = random_state()
    assert all(torch.equal(before[key], after[key]) for key in before)
