"""Parallel text: every policy of its two forms, and sentences that stay as they are."""

import gzip

import numpy as np
import pytest

from nlpfast.data.lines import DataError
from nlpfast.data.parallel_text import ParallelText, read_parallel_text


@pytest.fixture
def put(tmp_path):
    """Write a file, and return its path."""

    def write(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write


def pairs(text):
    return list(zip(text.source, text.target, text.lines.tolist(), strict=True))


def test_sentences_stay_as_they_are(put):
    source = put("a", "\ufeffEin Hund .\r\n  zwei  \u00a0Hunde\u2028 \nd\u00a0rei\tHunde")
    target = put("b", gzip.compress("A dog.\n\u3000two dogs \n three\tdogs\n".encode()))
    text = read_parallel_text(source, target)
    assert pairs(text) == [
        ("Ein Hund .", "A dog.", 1),
        ("  zwei  \u00a0Hunde\u2028 ", "\u3000two dogs ", 2),
        ("d\u00a0rei\tHunde", " three\tdogs", 3),
    ]
    assert text.path == str(source) and len(text) == 3 and text.lines.dtype == np.int64
    assert text.report.as_dict() == {
        "path": str(source),
        "read": 3,
        "used": 3,
        "skipped": {},
        "byte_order_marks": 1,
    }


def test_pairs_with_an_empty_side_are_skipped_and_counted(put):
    source = put("a", "one\n\ntwo\n \t\nthree\n\u00a0\nfour\n")
    target = put("b", "eins\nx\n\n\u2028\ndrei\ny\nvier\n")
    text = read_parallel_text(source, target)
    assert pairs(text) == [("one", "eins", 1), ("three", "drei", 5), ("four", "vier", 7)]
    report = text.report.as_dict()
    assert (report["read"], report["used"]) == (7, 3)
    assert report["skipped"] == {
        "with an empty source": {"count": 2, "first": [f"{source}:2", f"{source}:6"]},
        "with an empty target": {"count": 1, "first": [f"{source}:3"]},
        "with two empty sides": {"count": 1, "first": [f"{source}:4"]},
    }


def test_files_of_other_lengths_are_named(put):
    source, target = put("a", "one\ntwo\n"), put("b", "eins\nzwei\ndrei\n")
    with pytest.raises(DataError, match="has 2 lines") as error:
        read_parallel_text(source, target)
    assert str(error.value).startswith(f"{source} has 2 lines, {target} has 3: ")


def test_columns_of_one_file(put):
    path = put("a.tsv", "en\tde\tby\n one \teins \tme\n\n\tzwei\tme\nthree\t\tme\n\t\t\nsix\tsechs\t\tme\n")
    text = read_parallel_text(path)
    assert pairs(text) == [("en", "de", 1), (" one ", "eins ", 2), ("six", "sechs", 7)]
    skipped = {reason: skips.first for reason, skips in text.report.skipped.items()}
    assert skipped == {
        "with two empty sides": [f"{path}:3", f"{path}:6"],
        "with an empty source": [f"{path}:4"],
        "with an empty target": [f"{path}:5"],
    }
    assert text.report.read == 7 and text.report.used == 3
    assert pairs(read_parallel_text(put("b.tsv", "x\ty\tz\n"), columns=(3, 1))) == [("z", "x", 1)]


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ("alone", (1, 2), "has 1 column, the pair is in columns 1 and 2;"),
        ("a\tb", (3, 1), "has 2 columns, the pair is in columns 3 and 1;"),
        ("a\tb", (1, 3), "has 2 columns, the pair is in columns 1 and 3;"),
    ],
)
def test_a_row_with_too_few_columns_is_named(put, row, columns, message):
    path = put("a.tsv", f"a\tb\tc\n\n{row}\n")
    with pytest.raises(DataError) as error:
        read_parallel_text(path, columns=columns)
    assert str(error.value).startswith(f"{path}:3: {message}")


@pytest.mark.parametrize("columns", [(0, 1), (1, 0), (2, 2), (-1, 1)])
def test_columns_that_cannot_be(put, columns):
    with pytest.raises(ValueError, match="must be two different numbers from 1 on"):
        read_parallel_text(put("a.tsv", "a\tb\n"), columns=columns)


def test_a_text_without_pairs_is_an_error(put):
    source, target = put("a", "\none\n"), put("b", "eins\n\n")
    with pytest.raises(DataError, match="no pair with two sides") as error:
        read_parallel_text(source, target)
    assert "1 with an empty source, 1 with an empty target" in str(error.value)
    with pytest.raises(DataError, match="the file is empty"):
        read_parallel_text(put("c", ""))


def test_sentences_at_hand():
    text = ParallelText.of_sentences(["a", " ", "c", "d"], ["A", "B", "C", ""], "invented")
    assert pairs(text) == [("a", "A", 1), ("c", "C", 3)]
    assert str(text.report).startswith("invented: 4 lines read, 2 used, 2 skipped")
    assert text.report.skipped["with an empty source"].first == ["invented:2"]
    with pytest.raises(ValueError, match="target has 1 sentences for the 2 of source"):
        ParallelText.of_sentences(["a", "b"], ["A"])
    with pytest.raises(DataError, match="sentences: has no pair"):
        ParallelText.of_sentences([""], ["A"])
