"""Scores of single sentences: tables made by hand, sacreBLEU, and what holds for any two texts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU, CHRF

from nlpfast.sentence_rewards import REWARDS, chrf, gleu, sentence_bleu

WORDS = st.lists(st.sampled_from(["a", "b", "c", "dd"]), max_size=9)
TEXTS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=5).map(" ".join)

# hypothesis, reference, the precisions of 1 to 4 words with one more for 2, 3 and 4, brevity penalty
BLEU_TABLE = [
    ("a b c d", "a b c d", (1, 1, 1, 1), 1),
    ("a", "a", (1, 1, 1, 1), 1),
    ("a", "a b", (1, 1, 1, 1), math.exp(-1)),
    ("a b c d e", "a b c d", (4 / 5, 4 / 5, 3 / 4, 2 / 3), 1),
    ("a a a", "a b", (1 / 3, 1 / 3, 1 / 2, 1), 1),
    ("b a", "a b", (1, 1 / 2, 1, 1), 1),
    ("a x b", "a b c d e f", (2 / 3, 1 / 3, 1 / 2, 1), math.exp(1 - 2)),
]
# hypothesis, reference, n-grams of both that match, all of the one that has more
GLEU_TABLE = [
    ("a b c d", "a b c d", 10, 10),
    ("a", "a b", 1, 3),
    ("a b", "a", 1, 3),
    ("b a", "a b", 2, 3),
    ("a a a", "a a b", 3, 6),
    ("a b c d e", "a b c d", 10, 14),
    ("a b c d e f", "a b c d e f", 18, 18),
]


@pytest.mark.parametrize(("hypothesis", "reference", "precisions", "brevity"), BLEU_TABLE)
def test_bleu_of_a_sentence(hypothesis, reference, precisions, brevity):
    expected = brevity * math.prod(precisions) ** 0.25
    assert sentence_bleu(hypothesis.split(), reference.split()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("hypothesis", "reference", "matches", "most"), GLEU_TABLE)
def test_gleu_of_a_sentence(hypothesis, reference, matches, most):
    assert gleu(hypothesis.split(), reference.split()) == pytest.approx(matches / most, rel=1e-12)


def test_chrf_of_a_sentence():
    # precision 2/3, 1/2 and 0 of 1, 2 and 3 characters, recall 2/4, 1/3 and 0; a text has no 4 characters
    precision, recall = (2 / 3 + 1 / 2) / 3, (2 / 4 + 1 / 3) / 3
    expected = 5 * precision * recall / (4 * precision + recall)
    assert chrf("ab x", "a bcd") == pytest.approx(expected, rel=1e-12)
    assert chrf("abcdefghi", "abcdefghi") == 1


@given(WORDS, WORDS)
def test_bleu_is_that_of_sacrebleu(hypothesis, reference):
    metric = BLEU(smooth_method="add-k", smooth_value=1, tokenize="none", effective_order=True)
    expected = metric.sentence_score(" ".join(hypothesis), [" ".join(reference)]).score / 100
    assert sentence_bleu(hypothesis, reference) == pytest.approx(expected, rel=1e-9)


@given(TEXTS, TEXTS)
def test_chrf_is_that_of_sacrebleu(hypothesis, reference):
    expected = CHRF().sentence_score(hypothesis, [reference]).score / 100
    assert chrf(hypothesis, reference) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", REWARDS)
@given(hypothesis=TEXTS, reference=TEXTS)
def test_rewards_of_any_texts(name, hypothesis, reference):
    reward = REWARDS[name]
    found = reward(hypothesis, reference)
    assert 0 <= found <= 1 + 1e-12
    assert (found == 0) == (not set(pieces(name, hypothesis)) & set(pieces(name, reference)))
    assert reward(f" {hypothesis}  ", reference) == found
    if reference:
        assert reward(reference, reference) == pytest.approx(1) and reward("", reference) == 0
    if name == "gleu":
        assert reward(reference, hypothesis) == found


def pieces(name, text):
    return "".join(text.split()) if name == "chrf" else text.split()


def test_words_are_those_between_spaces():
    assert REWARDS["bleu"]("a b, c", "a b,\tc") == 1 and REWARDS["gleu"]("a b", "a b,") == 1 / 3
    assert set(REWARDS) == {"bleu", "gleu", "chrf"}
