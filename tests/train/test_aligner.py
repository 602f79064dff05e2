"""The aligners, on a language that is English with other words in another order."""

import random
import sys

import pytest

from nlpfast.alignment import alignment_error_rate
from nlpfast.train.aligner import MODELS, align_words


def toy_text(count):
    rng = random.Random(1)
    words = [f"w{i}" for i in range(30)]
    source = [rng.choices(words, k=rng.randrange(2, 9)) for _ in range(count)]
    # the last word comes first
    target = [[word.upper() for word in [s[-1], *s[:-1]]] for s in source]
    gold = [{(len(s) - 1, 0)} | {(i, i + 1) for i in range(len(s) - 1)} for s in source]
    return source, target, gold


@pytest.mark.parametrize("model", MODELS)
def test_a_made_up_language_is_aligned(model):
    pytest.importorskip("thot")
    source, target, gold = toy_text(200)
    found = align_words(source, target, model=model)
    assert alignment_error_rate(found.links, gold).aer < 0.15
    assert found.empty == found.too_long == []
    assert align_words(source, target, model=model) == found
    # the same words must not be linked by their place alone
    assert alignment_error_rate(found.links, [{(t, t) for _, t in links} for links in gold]).aer > 0.5


@pytest.mark.parametrize("model", MODELS)
def test_sentences_that_cannot_be_aligned_are_named_and_the_others_are_as_without_them(model):
    pytest.importorskip("thot")
    source, target, _ = toy_text(60)
    whole = align_words(source, target, model=model).links
    source[10:10], target[10:10] = [[], ["a"], ["b"] * 1025], [["A"], [], ["B"]]
    found = align_words(source, target, model=model)
    assert found.empty == [11, 12] and found.too_long == [13]
    assert found.links == [*whole[:10], set(), set(), set(), *whole[10:]]
    assert align_words([[]], [[]], model=model) == ([set()], [1], [])


def test_methods_combine_the_directions():
    pytest.importorskip("thot")
    source, target, _ = toy_text(40)
    found = {
        method: align_words(source, target, model="fast_align", method=method).links
        for method in ("intersection", "union", "grow-diag")
    }
    for small, middle, large in zip(found["intersection"], found["grow-diag"], found["union"], strict=True):
        assert small <= middle <= large
    assert found["intersection"] != found["union"]


def test_wrong_arguments():
    with pytest.raises(ValueError, match="model='giza' is unknown; give one of eflomal, fast_align"):
        align_words([], [], model="giza")
    with pytest.raises(ValueError, match="method='grow' is unknown"):
        align_words([], [], method="grow")
    with pytest.raises(ValueError, match="source has 1 sentences, target 0"):
        align_words([["a"]], [])


def test_without_the_aligner_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "thot", None)
    with pytest.raises(RuntimeError, match=r"needs sil-thot .*pip install 'nlpfast\[align\]'"):
        align_words([["a"]], [["b"]])
