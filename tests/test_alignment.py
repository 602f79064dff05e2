"""Two directions made one against the published pseudocode, the error rate by hand, words from subwords."""

import itertools
import math
import random

import pytest

from nlpfast.alignment import METHODS, alignment_error_rate, symmetrize, word_links, words_of

NEIGHBOURING = [(-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1)]


def literal(e2f, f2e, method):
    """The pseudocode of the Moses manual ("Align Words") word for word; points are (e, f)."""
    en = 1 + max((e for e, _ in e2f | f2e), default=-1)
    fn = 1 + max((f for _, f in e2f | f2e), default=-1)
    alignment = set(e2f & f2e)

    def aligned_e(e):
        return any(point[0] == e for point in alignment)

    def aligned_f(f):
        return any(point[1] == f for point in alignment)

    added = True
    while added:
        added = False
        for e, f in itertools.product(range(en), range(fn)):
            if (e, f) not in alignment:
                continue
            for de, df in NEIGHBOURING:
                new = (e + de, f + df)
                if (not aligned_e(new[0]) or not aligned_f(new[1])) and new in e2f | f2e:
                    alignment.add(new)
                    added = True
    if method == "grow-diag":
        return alignment
    for a in (e2f, f2e):
        for e, f in itertools.product(range(en), range(fn)):
            free = [not aligned_e(e), not aligned_f(f)]
            if (all(free) if method.endswith("and") else any(free)) and (e, f) in a:
                alignment.add((e, f))
    return alignment


def transposed(links):
    return {(t, s) for s, t in links}


def random_links(rng, functional):
    """What aligners make, at most one source word for a target word and the other way round; or anything."""
    sources, targets = rng.randrange(1, 9), rng.randrange(1, 9)
    if functional:
        forward = {(rng.randrange(sources), t) for t in range(targets) if rng.random() < 0.9}
        reverse = {(s, rng.randrange(targets)) for s in range(sources) if rng.random() < 0.9}
        # as two directions agree in part
        return forward, reverse | {link for link in forward if rng.random() < 0.4}
    points = list(itertools.product(range(sources), range(targets)))
    return tuple(set(rng.sample(points, rng.randrange(len(points) // 2 + 1))) for _ in range(2))


@pytest.mark.parametrize("functional", [True, False])
def test_growing_is_that_of_the_published_pseudocode(functional):
    rng = random.Random(11)
    different = 0
    for _ in range(1500):
        forward, reverse = random_links(rng, functional)
        results = []
        for method in METHODS[2:]:
            found = symmetrize(forward, reverse, method)
            assert found == transposed(literal(transposed(forward), transposed(reverse), method))
            results.append(found)
        different += results[0] != results[2] != results[1]
    assert different > 150


def test_every_method_lies_between_intersection_and_union():
    rng = random.Random(12)
    for _ in range(1000):
        forward, reverse = random_links(rng, rng.random() < 0.5)
        kept = set(forward), set(reverse)
        intersection, union, grown, final, final_and = (symmetrize(forward, reverse, m) for m in METHODS)
        assert intersection == forward & reverse and union == forward | reverse
        assert intersection <= grown <= final_and <= union and grown <= final <= union
        # grow-diag-final leaves no word without a link that has one somewhere
        for side in (0, 1):
            assert {link[side] for link in final} == {link[side] for link in union}
        assert (forward, reverse) == kept
        assert all(symmetrize(forward, forward, method) == forward for method in METHODS)


def test_an_example_by_hand():
    """2-1 touches 1-1; 4-3 and 4-4 touch nothing; 2-0 has two words with links when its turn comes."""
    forward = {(0, 0), (1, 1), (4, 3), (2, 0)}
    reverse = {(0, 0), (1, 1), (2, 1), (4, 4)}
    assert symmetrize(forward, reverse, "intersection") == {(0, 0), (1, 1)}
    assert symmetrize(forward, reverse, "grow-diag") == {(0, 0), (1, 1), (2, 1)}
    # forward's 4-3 comes before reverse's 4-4, which then has one free word
    assert symmetrize(forward, reverse) == {(0, 0), (1, 1), (2, 1), (4, 3)}
    assert symmetrize(reverse, forward) == {(0, 0), (1, 1), (2, 1), (4, 4)}
    assert symmetrize(forward, reverse, "grow-diag-final") == {(0, 0), (1, 1), (2, 1), (4, 3), (4, 4)}


def test_the_order_of_growing():
    """Only one of two links can be added, and it is the one that is come to first."""
    both = {(1, 0), (0, 2)}
    # by target: 1-0 comes before 0-2 and takes target word 1
    assert symmetrize(both | {(1, 1)}, both | {(0, 1)}, "grow-diag") == both | {(1, 1)}
    # straight neighbours come before those at a corner
    assert symmetrize({(1, 0), (0, 0)}, {(1, 0), (0, 1)}, "grow-diag") == {(1, 0), (0, 0), (0, 1)}
    assert symmetrize(set(), {(0, 0)}, "grow-diag") == set()


def test_a_method_that_is_unknown():
    with pytest.raises(ValueError, match="method='grow' is unknown; give one of intersection, union"):
        symmetrize(set(), set(), "grow")


def test_error_rate_by_hand():
    score = alignment_error_rate([{(0, 0), (1, 1), (2, 2)}], [{(0, 0)}], [{(0, 0), (1, 1)}])
    assert score.aer == 1 - (1 + 2) / (3 + 1)
    assert score.precision == 2 / 3 and score.recall == 1
    assert (score.links, score.sure, score.possible) == (3, 1, 2)
    # sure links are possible whether they are named or not
    assert alignment_error_rate([{(0, 0), (1, 1), (2, 2)}], [{(0, 0)}], [{(1, 1)}]) == score
    # without possible links it is 1 - F1: 2 of 3 right, 2 of 4 found
    score = alignment_error_rate([{(0, 0), (1, 1), (5, 5)}], [{(0, 0), (1, 1), (2, 2), (3, 3)}])
    assert score.aer == pytest.approx(1 - 2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))


def test_error_rate_counts_over_the_corpus():
    hypothesis, gold = [{(0, 0)}, {(0, 0), (1, 0), (2, 0)}], [{(0, 0)}, {(5, 5)}]
    # the mean of the sentences would be 0.5
    assert alignment_error_rate(hypothesis, gold).aer == 1 - (1 + 1) / (4 + 2)
    assert alignment_error_rate(gold, gold).aer == 0


def test_error_rate_of_nothing():
    score = alignment_error_rate([set()], [{(0, 0)}])
    assert score.aer == 1 and math.isnan(score.precision) and score.recall == 0
    score = alignment_error_rate([{(0, 0)}], [set()], [{(0, 0)}])
    assert score.aer == 0 and score.precision == 1 and math.isnan(score.recall)
    assert math.isnan(alignment_error_rate([set()], [set()]).aer)
    with pytest.raises(ValueError, match="hypothesis, sure and possible have 1, 2 and 2 sentences"):
        alignment_error_rate([set()], [set(), set()])


@pytest.mark.parametrize(
    ("scheme", "tokens", "words"),
    [
        ("sentencepiece", ["▁un", "believ", "able", "▁", "story", "▁!"], [0, 0, 0, 1, 1, 2]),
        ("sentencepiece", ["no", "▁mark", "▁a", "b"], [0, 1, 2, 2]),
        ("bpe", ["un@@", "believ@@", "able", "story", "!"], [0, 0, 0, 1, 2]),
        ("bpe", ["a", "b@@", "c", "d@@"], [0, 1, 1, 2]),
        ("wordpiece", ["un", "##believ", "##able", "story", "!"], [0, 0, 0, 1, 2]),
        ("wordpiece", ["##able", "##s", "x"], [0, 0, 1]),
        *((scheme, [], []) for scheme in ("sentencepiece", "bpe", "wordpiece")),
        *((scheme, ["x@@"], [0]) for scheme in ("sentencepiece", "bpe", "wordpiece")),
    ],
)
def test_words_of_subwords(scheme, tokens, words):
    assert words_of(tokens, scheme) == words


def test_words_are_linked_if_any_of_their_subwords_are():
    source, target = ["▁a", "b", "▁c"], ["▁x", "▁y", "z", "z"]
    assert word_links({(0, 1), (1, 3), (2, 0)}, source, target, "sentencepiece") == {(0, 1), (1, 0)}
    assert word_links(set(), source, target, "sentencepiece") == set()
    for outside in ((3, 0), (0, 4), (-1, 0), (0, -1)):
        with pytest.raises(ValueError, match="is outside the 3 source and 4 target subwords"):
            word_links({outside}, source, target, "sentencepiece")
    with pytest.raises(ValueError, match="scheme='morfessor' is unknown; give one of sentencepiece"):
        words_of(source, "morfessor")
