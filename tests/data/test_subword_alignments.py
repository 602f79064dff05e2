"""Alignments of parallel text: links between words as links between their tokens, and what is left out."""

import random

import pytest

from nlpfast.data.alignments import Alignments
from nlpfast.data.lines import DataError
from nlpfast.data.parallel_text import ParallelText
from nlpfast.data.subword_alignments import subword_alignments
from nlpfast.data.token_pairs import TokenPairs


def links_of(aligned, number):
    """The links of each sentence, (source, target) in their order."""
    found = [[] for _ in range(number)]
    for sentence, t, s in aligned.batch(range(number)).tolist():
        found[sentence].append((s, t))
    return found


def numbered(lists):
    """Tokens of words with so many tokens each."""
    return [[4] * sum(sizes) for sizes in lists], [
        [word for word, size in enumerate(sizes) for _ in range(size)] for sizes in lists
    ]


def test_links_between_words_become_all_pairs_of_their_tokens():
    text = ParallelText.of_sentences(["ab c", "d", "e"], ["A", "D", "E F"])
    source, source_words = numbered([[2, 1], [1], [3]])
    target, target_words = numbered([[3], [1], [1, 2]])
    alignments = Alignments.from_links([[(1, 0), (0, 0)], [], [(0, 1)]])
    aligned = subword_alignments(alignments, TokenPairs(text, source, target), (source_words, target_words))
    assert links_of(aligned, 3) == [
        [(2, 0), (2, 1), (2, 2), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
        [],
        [(0, 1), (0, 2), (1, 1), (1, 2), (2, 1), (2, 2)],
    ]
    assert str(aligned.report) == "alignments: 3 of 3 alignments used, 1 of them without links"


def test_a_word_may_have_its_tokens_anywhere():
    text = ParallelText.of_sentences(["a b"], ["A"])
    pairs = TokenPairs(text, [[4, 5, 6]], [[7]])
    alignments = Alignments.from_links([[(0, 0)]])
    assert links_of(subword_alignments(alignments, pairs, ([[0, 1, 0]], [[0]])), 1) == [[(0, 0), (2, 0)]]


def test_expansion_agrees_with_its_definition():
    rng = random.Random(0)
    sizes = [[[rng.randint(1, 3) for _ in range(rng.randint(1, 5))] for _ in range(60)] for _ in range(2)]
    (source, source_words), (target, target_words) = map(numbered, sizes)
    texts = [[" ".join(["w"] * len(sentence)) for sentence in side] for side in sizes]
    links = []
    for s, t in zip(*sizes, strict=True):
        every = [(i, j) for i in range(len(s)) for j in range(len(t))]
        links.append(rng.sample(every, rng.randint(0, min(4, len(every)))))
    pairs = TokenPairs(ParallelText.of_sentences(*texts), source, target)
    aligned = subword_alignments(Alignments.from_links(links), pairs, (source_words, target_words))
    for found, words, s, t in zip(links_of(aligned, 60), links, source_words, target_words, strict=True):
        expected = [
            (i, j) for a, b in words for i, x in enumerate(s) if x == a for j, y in enumerate(t) if y == b
        ]
        assert found == expected
    assert sum(map(len, links)) > 60


def test_lines_that_are_not_used_are_passed_over_and_reported():
    # line 2 has no source, line 3 is too long, line 5 has a link to EOS
    text = ParallelText.of_sentences(["a", "", "c", "d", "e", "f"], ["A", "B", "C", "D", "E", "F"], "t")
    pairs = TokenPairs(text, [[1], [1] * 9, [1, 2], [1], [1]], [[1, 2], [1], [1], [1], [1]], max_length=5)
    links = [[(0, 1)], [(3, 3)], [(8, 0)], [(1, 0), (0, 0)], [(0, 0), (1, 0)], []]
    aligned = subword_alignments(Alignments.from_links(links, "a"), pairs)
    assert links_of(aligned, 4) == [[(0, 1)], [(1, 0), (0, 0)], [], []]
    report = aligned.report
    assert (report.path, report.read, report.used, report.empty) == ("a", 6, 3, 1)
    assert [tuple(skipped) for skipped in report.skipped] == [
        (5, "link 1-0 is out of range: source has 1 tokens and EOS, target 1"),
        (2, "its pair of sentences is not used"),
        (3, "its pair of sentences is not used"),
    ]


def test_words_that_do_not_fit_are_reported_and_give_no_links():
    sources = ["a b", "a b", "a\tb", "a\u00a0b", "a  b ", "a b c", "a b"]
    text = ParallelText.of_sentences(sources, ["A B"] * 5 + ["A", "A"], "t")
    source, source_words = numbered([[1, 2]] * 7)
    target, target_words = numbered([[1, 1]] * 7)
    links = [[(0, 0), (2, 0)], [(0, 2), (0, 0)], [(0, 0)], [(0, 0)], [(1, 1)], [(1, 1)], []]
    pairs = TokenPairs(text, source, target)
    aligned = subword_alignments(Alignments.from_links(links), pairs, (source_words, target_words))
    assert links_of(aligned, 7) == [[], [], [(0, 0)], [], [(1, 1), (2, 1)], [], []]
    assert [tuple(skipped) for skipped in aligned.report.skipped] == [
        (1, "link 2-0 is out of range: source has 2 words, target 2"),
        (2, "link 0-2 is out of range: source has 2 words, target 2"),
        (4, "source has 1 words in the text, 2 in the vocabulary"),
        (6, "source has 3 words in the text, 2 in the vocabulary"),
    ]
    assert (aligned.report.read, aligned.report.used, aligned.report.empty) == (7, 3, 1)
    # the text's sentence is that of the pair, not of its number
    text = ParallelText.of_sentences(["a b c", "a b"], ["A", "A"], "t")
    later = TokenPairs(text, [[4] * 9, [4, 4]], [[5], [5]], max_length=5)
    aligned = subword_alignments(Alignments.from_links([[], [(1, 0)]]), later, ([[0, 1]], [[0]]))
    assert links_of(aligned, 1) == [[(1, 0)]]
    # of the target
    swapped = TokenPairs(ParallelText.of_sentences(["A B"], ["a b c"], "t"), [[1, 2]], [[1, 2]])
    aligned = subword_alignments(Alignments.from_links([[(0, 0)]]), swapped, ([[0, 1]], [[0, 1]]))
    assert aligned.report.skipped[0].reason == "target has 3 words in the text, 2 in the vocabulary"


def test_arguments_that_cannot_be():
    text = ParallelText.of_sentences(["a", "", "b"], ["A", "B", "C"], "t")
    pairs = TokenPairs(text, [[1], [1]], [[1], [1]])
    # as many as there are pairs is too few: a line belongs to a line
    with pytest.raises(DataError, match="a has 2 lines, t has 3"):
        subword_alignments(Alignments.from_links([[], []], "a"), pairs)
    alignments = Alignments.from_links([[], [], []])
    for words in (([[0], [0, 1]], [[0], [0]]), ([[0]], [[0], [0]]), ([[0, 1], []], [[0], [0]])):
        with pytest.raises(ValueError, match="words of the source have another form than its tokens"):
            subword_alignments(alignments, pairs, words)
    with pytest.raises(ValueError, match="words of the target have another form than its tokens"):
        subword_alignments(alignments, pairs, ([[0], [0]], [[0], []]))
