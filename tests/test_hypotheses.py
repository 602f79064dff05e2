import math
from types import SimpleNamespace

import pytest
import torch

from nlpfast.hypotheses import PENALTIES, Constraints, length_divisor, log_probabilities, longest_lengths

SPECIAL = SimpleNamespace(pad_id=7, bos_id=0, eos_id=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("length", "penalty", "alpha", "expected"),
    [
        (1, "none", 2.0, 1.0),
        (9, "none", 2.0, 1.0),
        (1, "length", 1.0, 1.0),
        (4, "length", 1.0, 4.0),
        (4, "length", 0.5, 2.0),
        (4, "length", 0.0, 1.0),
        (1, "gnmt", 0.6, 1.0),
        (7, "gnmt", 1.0, 2.0),
        # 2 ** .6
        (7, "gnmt", 0.6, 1.515716566),
        (19, "gnmt", 2.0, 16.0),
    ],
)
def test_divisors(length, penalty, alpha, expected):
    assert length_divisor(length, penalty, alpha) == pytest.approx(expected, rel=1e-9)
    assert isinstance(length_divisor(length, penalty, alpha), float)


def test_no_divisor_falls_with_the_length():
    for penalty in PENALTIES:
        for alpha in (0, 0.3, 1, 10):
            divisors = [length_divisor(n, penalty, alpha) for n in range(1, 30)]
            assert divisors == sorted(divisors) and divisors[0] == 1


def test_log_probabilities_are_a_new_tensor_of_a_type_that_is_exact_enough():
    logits = torch.tensor([[1.0, 2.0, -math.inf]])
    for dtype, expected in [(torch.float64, torch.float64), (torch.float32, torch.float32)]:
        given = logits.to(dtype)
        found = log_probabilities(given, 0)
        assert found.dtype == expected and found.data_ptr() != given.data_ptr()
        assert found[0].tolist() == pytest.approx([-1.3132617, -0.3132617, -math.inf], rel=1e-6)
    half = log_probabilities(logits.bfloat16(), 0)
    assert half.dtype == torch.float32 and half[0, 0] == pytest.approx(-1.3132617, rel=1e-6)


@pytest.mark.parametrize("row", [[1.0, math.nan], [math.inf, 1.0], [-math.inf, -math.inf]], ids=str)
def test_logits_that_are_no_distribution_are_refused(row):
    logits = torch.zeros(2, 3, 2)
    logits[1, 2] = torch.tensor(row)
    with pytest.raises(ValueError, match="NaN logits for token 5; its weights are not usable"):
        log_probabilities(logits, 5)


def test_longest_lengths():
    source, lengths = torch.ones(3, 9).long(), torch.tensor([1, 5, 9])
    assert longest_lengths(source, lengths, 0.0, 7) == [7, 7, 7]
    assert longest_lengths(source, lengths, 1.5, 10) == [11, 17, 23]
    assert longest_lengths(source[:0], lengths[:0], 1.5, 10) == []


def banned(history, *, limits=None, **rules):
    """Which tokens of eight are banned after each hypothesis."""
    history = torch.tensor(history)
    constraints = Constraints(SPECIAL, limits or [20] * len(history), CPU, **rules)
    log_probs = torch.zeros(*history.shape[:2], 8)
    constraints.ban(log_probs, history)
    assert set(log_probs.unique().tolist()) <= {0.0, -math.inf}
    return [[row.isneginf().nonzero()[:, 0].tolist() for row in rows] for rows in log_probs]


def test_pad_and_bos_are_always_banned_and_eos_at_first():
    history = [[[3, 4], [4, 4]]]
    assert banned(history) == [[[0, 7]] * 2]
    assert banned(history, min_length=2) == [[[0, 7]] * 2]
    assert banned(history, min_length=3) == [[[0, 2, 7]] * 2]


def test_ngrams_that_would_be_there_twice_are_banned():
    # two sentences of two hypotheses
    history = [[[3, 4, 3, 5, 3], [3, 3, 3, 3, 3]], [[3, 4, 5, 3, 4], [6, 5, 4, 3, 1]]]
    always = [0, 7]
    # each token that is there
    expected = [[[3, 4, 5], [3]], [[3, 4, 5], [1, 3, 4, 5, 6]]]
    assert banned(history, no_repeat_ngram=1) == [[sorted(always + e) for e in row] for row in expected]
    # after 3 came 4 and 5; after 3 came 3; after 4 came 5; after 1 nothing
    expected = [[[4, 5], [3]], [[5], []]]
    assert banned(history, no_repeat_ngram=2) == [[sorted(always + e) for e in row] for row in expected]
    # after 5 3 nothing; after 3 3 came 3; after 3 4 came 5
    expected = [[[], [3]], [[5], []]]
    assert banned(history, no_repeat_ngram=3) == [[sorted(always + e) for e in row] for row in expected]
    expected = [[[], [3]], [[], []]]
    for n in (4, 5):
        assert banned(history, no_repeat_ngram=n) == [[sorted(always + e) for e in row] for row in expected]
    # no n-gram of six is there yet
    for n in (0, 6, 9):
        assert banned(history, no_repeat_ngram=n) == [[always] * 2] * 2


def test_a_token_that_must_follow_is_the_only_one():
    prefix = torch.tensor([[3, 7, 7], [4, 5, 7], [7, 7, 7], [3, 3, 6]])
    constraints = Constraints(SPECIAL, [5, 2, 3, 3], CPU, no_repeat_ngram=1, min_length=5, prefix=prefix)
    history = torch.tensor([[[3, 3]], [[4, 5]], [[5, 6]], [[3, 3]]])
    model = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))
    for written, expected in [
        (0, [[3], [4], [1, 3, 4, 5, 6], [3]]),
        (1, [[1, 4, 5, 6], [5], [1, 3, 4, 6], [3]]),
        # the second may have no more than two, and the last must repeat nothing, but for its prefix
        (2, [[1, 4, 5, 6], [2], [1, 3, 4], [6]]),
    ]:
        allowed, candidates = constraints.apply(model.clone(), history[:, :, :written])
        found = [row[0].isfinite().nonzero()[:, 0].tolist() for row in candidates]
        assert found == expected
        finite = candidates.isfinite()
        assert torch.equal(candidates[finite], model[finite])
        # what may follow but for the prefix and the limit
        assert not allowed[:, :, [0, 2, 7]].isfinite().any()
        assert torch.equal(allowed[[0, 2]][finite[[0, 2]]], model[[0, 2]][finite[[0, 2]]])
    constraints.keep(torch.tensor([1, 3]))
    assert constraints.limits.tolist() == [2, 3]
    candidates = constraints.apply(model[[1, 3]], history[[1, 3]])[1]
    assert [row[0].isfinite().nonzero()[:, 0].tolist() for row in candidates] == [[2], [6]]
    constraints.keep(torch.tensor([1]))
    # its limit is three now, as that of two has left
    history = torch.tensor([[[3, 3, 6]]])
    candidates = constraints.apply(model[3:], history)[1]
    assert candidates[0, 0].isfinite().nonzero()[:, 0].tolist() == [2]


def test_nothing_is_copied_where_nothing_must_follow():
    constraints = Constraints(SPECIAL, [5, 9], CPU, prefix=torch.tensor([[3, 3], [3, 7]]))
    log_probs, history = torch.zeros(2, 1, 8), torch.full((2, 1, 9), 3)
    copied = []
    for written in range(10):
        allowed, candidates = constraints.apply(log_probs, history[:, :, :written])
        assert allowed is log_probs
        copied.append(candidates is not log_probs)
    # within the prefix, and from the first limit on
    assert copied == [True, True, False, False, False, True, True, True, True, True]
    constraints.keep(torch.tensor([1]))
    log_probs, history = log_probs[1:], history[1:]
    found = [constraints.apply(log_probs, history[:, :, :n])[1] is log_probs for n in (5, 8, 9)]
    assert found == [True, True, False]
