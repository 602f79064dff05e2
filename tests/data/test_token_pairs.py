"""Tokens of parallel text: how they are stored, and which pairs are left out."""

import numpy as np
import pytest

from nlpfast.data.lines import DataError
from nlpfast.data.parallel_text import ParallelText
from nlpfast.data.token_pairs import TokenLists, TokenPairs, places_of


def text_of(number, path="t"):
    """A text of which line 2 has no source."""
    sentences = [f"s{i}" for i in range(number)]
    return ParallelText.of_sentences([*sentences[:1], "", *sentences[1:]], ["x"] * (number + 1), path)


def test_places():
    found = places_of(np.array([5, 2, 9, 0]), np.array([2, 0, 1, 3]))
    assert found.tolist() == [5, 6, 9, 0, 1, 2]
    assert places_of(np.array([], dtype=np.int64), np.array([], dtype=np.int64)).shape == (0,)


def test_lists_are_stored_one_after_the_other():
    lists = [[7, 8, 9], [], [10], [11, 12]]
    stored = TokenLists.of(lists)
    assert len(stored) == 4 and stored.lists() == lists
    assert stored.flat.dtype == np.int32 and stored.flat.tolist() == [7, 8, 9, 10, 11, 12]
    assert stored.ends.dtype == np.int64 and stored.ends.tolist() == [0, 3, 3, 4, 6]
    assert stored.lengths().tolist() == [3, 0, 1, 2]
    assert stored.take([3, 0, 1, 3]).lists() == [[11, 12], [7, 8, 9], [], [11, 12]]
    assert stored.take([]).lists() == TokenLists.of([]).lists() == []
    with pytest.raises(IndexError):
        stored.take([4])


def test_pairs_are_left_out_with_their_lines_and_reasons():
    text = text_of(9)
    #          line 1  3    4             5            6            7       8    9          10
    source = [[4], [], [5], [1, 2, 3, 4], [1] * 5, [1], [1] * 4, [], [1, 2]]
    target = [[9], [9], [8], [1], [1] * 4, [1] * 6, [1] * 2, [], [1] * 3]
    pairs = TokenPairs(text, source, target, max_length=5, max_ratio=2)
    assert pairs.rows.tolist() == [0, 2, 6, 8] and pairs.lines().tolist() == [1, 4, 8, 10]
    assert len(pairs) == 4 and pairs.max_length == 5 and pairs.text is text
    assert pairs.source.lists() == [[4], [5], [1] * 4, [1, 2]]
    assert pairs.target.lists() == [[9], [8], [1] * 2, [1] * 3]
    assert [pairs.place(i) for i in (0, 1, 3)] == ["t:1", "t:4", "t:10"]
    assert {reason: (skips.count, skips.first) for reason, skips in pairs.report.skipped.items()} == {
        "with an empty source": (1, ["t:2"]),
        "with a side without tokens": (2, ["t:3", "t:9"]),
        "longer than 5 tokens with EOS": (2, ["t:6", "t:7"]),
        "more than 2 times as long on one side": (1, ["t:5"]),
    }
    assert pairs.report.as_dict()["used"] == 4 == pairs.report.read - 6
    assert str(pairs.report).startswith("t: 10 lines read, 4 used, 6 skipped (1 with an empty source, 2 ")
    # the text can be used again
    assert text.report.used == 9
    assert len(TokenPairs(text, source, target)) == 7


def test_reports_name_the_first_three():
    pairs = TokenPairs(text_of(6), [[1]] + [[1, 1]] * 5, [[1]] * 6, max_length=2)
    (_, (reason, skips)) = pairs.report.skipped.items()
    assert reason == "longer than 2 tokens with EOS"
    assert (skips.count, skips.first) == (5, ["t:3", "t:4", "t:5"])


def test_arguments_that_cannot_be():
    text = text_of(2)
    with pytest.raises(ValueError, match="source has tokens of 1 sentences, but t has 2 pairs"):
        TokenPairs(text, [[1]], [[1], [1]])
    with pytest.raises(ValueError, match="target has tokens of 3 sentences"):
        TokenPairs(text, [[1], [1]], [[1]] * 3)
    with pytest.raises(ValueError, match="max_length=1 must be >= 2"):
        TokenPairs(text, [[1], [1]], [[1], [1]], max_length=1)
    for ratio in (0.99, float("nan")):
        with pytest.raises(ValueError, match=r"max_ratio=\S+ must be >= 1"):
            TokenPairs(text, [[1], [1]], [[1], [1]], max_ratio=ratio)
    assert len(TokenPairs(text, [[1], [1]], [[1], [1]], max_length=2, max_ratio=1)) == 2
    with pytest.raises(DataError, match=r"t: no pair is left \(t: 3 lines read, 0 used, 3 skipped"):
        TokenPairs(text, [[], [1]], [[1], []])
