"""Pharaoh files: the grammar, what errors say, sure and possible links, and the same links written back."""

import functools
import gzip
import io
import random
import time
from pathlib import Path

import numpy as np
import pytest

from nlpfast.data.alignments import Alignments, check_same_length, format_links, read_alignments
from nlpfast.data.text import DataError


def write(tmp_path, data, name="a.talp"):
    path = tmp_path / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("data", "links"),
    [
        ("0-0 1-2 2-1\n", [{(0, 0), (1, 2), (2, 1)}]),
        ("0-0\n1-1", [{(0, 0)}, {(1, 1)}]),
        ("0-0\n\n1-1\n", [{(0, 0)}, set(), {(1, 1)}]),
        ("\n", [set()]),
        ("\n\n", [set(), set()]),
        ("\r\n", [set()]),
        ("0-0 1-1 \n2-2 ", [{(0, 0), (1, 1)}, {(2, 2)}]),
        ("0-0 1-1\r\n2-2 \r\n", [{(0, 0), (1, 1)}, {(2, 2)}]),
        ("\ufeff3-4\n", [{(3, 4)}]),
        ("0-0\n1-1\r", [{(0, 0)}, {(1, 1)}]),
        (gzip.compress(b"0-0\r\n\n1-1"), [{(0, 0)}, set(), {(1, 1)}]),
        ("007-000010 999999-0\n", [{(7, 10), (999999, 0)}]),
    ],
)
def test_links_of_a_file(tmp_path, data, links):
    read = read_alignments(write(tmp_path, data))
    assert read.links() == read.sure_links() == links
    assert len(read) == len(links) and read.duplicates == 0
    assert read.pairs.dtype == np.int32 and read.sure.dtype == np.bool_ and read.ends.dtype == np.int64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("0-0\n5-\n", ":2:1: '5-' is not a link; write source-target"),
        ("-1-3", ":1:1: '-1-3' is not a link"),
        ("0-0 0-99999999999", ":1:5: '0-99999999999' has a number of more than 6 digits"),
        ("0-0 1000000-0", ":1:5: '1000000-0' has a number of more than 6 digits"),
        ("9" * 9000 + "-1", f":1:1: '{'9' * 40}...' has a number of more than 6 digits"),
        ("0-0  1-1", ":1:5: a space too many"),
        (" 0-0", ":1:1: a space too many"),
        (" ", ":1:1: a space too many"),
        ("0-0 \n0-0  \n", ":2:5: a space too many"),
        ("0-0\t1-1", r":1:1: '0-0\t1-1' is not a link"),
        ("+0-0", ":1:1: '+0-0' is not a link"),
        ("0-+0", ":1:1: '0-+0' is not a link"),
        ("0-0 1_0-1", ":1:5: '1_0-1' is not a link"),
        ("0-0 1-2-3", ":1:5: '1-2-3' is not a link"),
        ("0.0-1", ":1:1: '0.0-1' is not a link"),
        ("٣-1", ":1:1: '٣-1' is not a link"),
        ("0\u22120", ":1:1: '0\u22120' is not a link"),
        ("0-0 1p1", ":1:5: '1p1' is a possible link, which only a gold standard has"),
        ("0-0\r1-1\n", r":1:1: '0-0\r1-1' is not a link"),
        ("0-0\u20281-1\n", r":1:1: '0-0\u20281-1' is not a link"),
        ("0-0\r\r\n", r":1:1: '0-0\r' is not a link"),
        ("\ufeff\ufeff0-0\n", r":1:1: '\ufeff0-0' is not a link"),
        ("a b c\n", ":1:1: 'a' is not a link"),
        (b"0-0\n1-\xff\n", ":2: byte 0xff is not UTF-8"),
        (b"0-0\n1-\x00\n", ":2: NUL byte"),
        (b"\x1f\x8b\x08\x00", ":1: the gzip data is cut short here, after 0 whole lines"),
        (b"", ": the file is empty"),
    ],
)
def test_faults_are_named_by_line_and_column(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(DataError) as error:
        read_alignments(path)
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_words_counted_from_one(tmp_path):
    path = write(tmp_path, "1-1 3-2\n\n2p1\n")
    read = read_alignments(path, one_based=True, possible=True)
    assert read.links() == [{(0, 0), (2, 1)}, set(), {(1, 0)}]
    for data, message in (
        ("1-1\n2-1 10-3 3-0 0-1\n", ":2:10: 3-0 has word 0"),
        ("0-1", ":1:1: 0-1 has word"),
    ):
        path = write(tmp_path, data)
        with pytest.raises(DataError) as error:
            read_alignments(path, one_based=True)
        assert str(error.value).startswith(f"{path}{message}")


def test_sure_and_possible_links(tmp_path):
    read = read_alignments(write(tmp_path, "0-0 1p1 2?2\n\n3p3\n4-4 \n"), possible=True)
    assert read.links() == [{(0, 0), (1, 1), (2, 2)}, set(), {(3, 3)}, {(4, 4)}]
    assert read.sure_links() == [{(0, 0)}, set(), set(), {(4, 4)}]


def test_a_link_that_comes_twice_counts_once_and_is_sure_if_one_is(tmp_path):
    path = write(tmp_path, "5-5 1p1 0-0 1-1 0p0 2p2 2?2 02-2\n0-0\n0-0 0-0\n")
    read = read_alignments(path, possible=True)
    assert read.links() == [{(5, 5), (1, 1), (0, 0), (2, 2)}, {(0, 0)}, {(0, 0)}]
    assert read.sure_links() == read.links()
    assert read.duplicates == 5
    assert read.pairs.tolist() == [[5, 5], [0, 0], [1, 1], [2, 2], [0, 0], [0, 0]]
    assert read.ends.tolist() == [0, 4, 5, 6]


def test_swapped_and_made_alignments(tmp_path):
    links = [{(0, 1), (2, 0)}, set(), {(7, 7)}]
    made = Alignments.from_links([sorted(links[0]) * 2, [], [(7, 7)]])
    assert made.links() == made.sure_links() == links and len(made) == 3
    assert made.swapped().links() == [{(1, 0), (0, 2)}, set(), {(7, 7)}]
    assert Alignments.from_links([]).links() == [] and Alignments.from_links([[]]).links() == [set()]
    for bad in ((-1, 0), (0, 10**6)):
        with pytest.raises(DataError, match=f"alignments:2: link {bad[0]}-{bad[1]}: positions are"):
            Alignments.from_links([[], [bad]])


def test_files_of_other_lengths_are_named():
    check_same_length("a", [1], "b", [2])
    with pytest.raises(DataError, match=r"x\.en has 1 lines, x\.de has 2: line i"):
        check_same_length("x.en", [1], "x.de", [1, 2])
    with pytest.raises(DataError, match=r"x\.en has 3 lines, x\.de has 2: line i"):
        check_same_length("x.en", [1, 2, 3], "x.de", [1, 2])


DIGITS = "0123456789"


@functools.cache
def shapes(marks):
    """Every shape of a link, with d for a digit."""
    return {"d" * a + mark + "d" * b for mark in marks for a in range(1, 7) for b in range(1, 7)}


def first_fault(line, marks):
    """The grammar once more, without regular expressions: the links, or the column of the first fault."""
    line = line[:-1] if line[-1:] == "\r" else line
    if line == "":
        return set()
    line = line[:-1] if line[-1] == " " else line
    links, column = set(), 1
    for field in line.split(" "):
        if "".join("d" if char in DIGITS else char for char in field) not in shapes(marks):
            return column
        source, target = field.split(field.strip(DIGITS))
        links.add((int(source), int(target)))
        column += len(field) + 1
    return links


ALPHABET = [*"0123456789", *"--- ", "p", "?", "\r", "\t", "+", "\u2212", "٣", "²", "\u2028", "\x0b", ".", "e"]
PIECES = [*ALPHABET, "  ", "1-1", " 2-2", "-1", "99999999999", "000001", "\ufeff", "\u00a0", "0x1", "_"]


def fuzzed_line(rng, marks):
    links = [f"{rng.randrange(60)}{rng.choice(marks)}{rng.randrange(60)}" for _ in range(rng.randrange(9))]
    line = " ".join(links) + rng.choice(["", "", "", " ", "\r", " \r"] if links else ["", "", "\r"])
    for _ in range(rng.choice([0, 0, 1, 1, 2, 3])):
        where = rng.randrange(len(line) + 1)
        line = line[:where] + rng.choice(["", rng.choice(PIECES)]) + line[where + rng.randrange(2) :]
    return line


@pytest.mark.parametrize("possible", [False, True])
def test_accepted_lines_are_those_of_the_grammar(possible, monkeypatch):
    rng = random.Random(3)
    marks = "-p?" if possible else "-"
    good, bad = [], []
    for _ in range(50_000):
        line = fuzzed_line(rng, marks)
        expected = first_fault(line, marks)
        (bad if isinstance(expected, int) else good).append((line, expected))
    assert min(len(good), len(bad)) > 15_000
    # a line that is empty would be no line at the end of a file
    text = "".join(f"{line}\n" for line, _ in good)
    # files on a disk would take most of the time
    monkeypatch.setattr(Path, "open", lambda path, mode: io.BytesIO(text.encode()))
    assert read_alignments("f", possible=possible).links() == [links for _, links in good]
    for number, (line, column) in enumerate(bad):
        # at the start of the file U+FEFF would be a mark
        before = 1 + number % 2
        text = "0-0\n" * before + line + "\n1-\n" * (number % 2)
        with pytest.raises(DataError) as error:
            read_alignments("f", possible=possible)
        assert str(error.value).startswith(f"f:{before + 1}:{column}: "), repr(line)


def test_written_lines_are_read_again(tmp_path):
    rng = random.Random(5)
    links = [{(rng.randrange(99), rng.randrange(99)) for _ in range(rng.randrange(40))} for _ in range(300)]
    path = write(tmp_path, "".join(format_links(sentence) + "\n" for sentence in links))
    assert read_alignments(path).links() == links
    assert format_links({(10, 0), (2, 1), (2, 0)}) == "2-0 2-1 10-0"
    assert format_links(set()) == ""


def test_a_large_file_is_read_in_seconds(tmp_path):
    """100,000 lines take about a second; the limit is for a machine that is busy with other things."""
    line = " ".join(f"{i}-{i + 1}" for i in range(22)) + "\n"
    path = write(tmp_path, line * 100_000)
    begin = time.process_time()
    read = read_alignments(path)
    assert time.process_time() - begin < 10
    assert len(read) == 100_000 and len(read.pairs) == 2_200_000
