"""Sentence tasks: rows of every kind, predictions byte by byte, tokens of examples, and batches of them."""

import csv
import dataclasses
import gzip
import io
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from nlpfast.data import sentence_files, sentences
from nlpfast.data.lines import DataError
from nlpfast.data.packed_sentences import pack_sentences
from nlpfast.data.sentences import (
    CFIMDB,
    PARAPHRASE,
    SIMILARITY,
    SST,
    Example,
    SentenceDataset,
    SentenceItem,
    class_weights,
    collate_sentences,
    read_examples,
    split,
    task_of,
    write_predictions,
)

SINGLE = "\tid\tsentence\tsentiment\n0\taaa\t It 's good .\t3\n1\tbbb\tBad .\t0\n"
PAIRS = "\tid\tsentence1\tsentence2\tis_duplicate\n7\taaa\tWhy?\tHow?\t0.0\n9\tbbb\tWho?\tWho is?\t1.0\n"
SCORES = "\tid\tsentence1\tsentence2\tsimilarity\n7\taaa\tA dog.\tA cat.\t1.8\n9\tbbb\tA.\tA.\t5\n"
UNLABELLED = "\tid\tsentence1\tsentence2\n7\taaa\tA dog.\tA cat.\n9\tbbb\t\tA.\n"


@pytest.fixture
def put(tmp_path):
    """Write a file, and return its path."""

    def write(text, name="data.csv"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write


def labels(path, task, **options):
    return [example.label for example in read_examples(path, task, **options)[0]]


def test_rows_are_examples(put):
    examples, report = read_examples(put(SINGLE), SST)
    assert examples == [Example("aaa", ("It 's good .",), 3, 2), Example("bbb", ("Bad .",), 0, 3)]
    assert (report.read, report.used) == (3, 2)
    assert {reason: skips.count for reason, skips in report.skipped.items()} == {"header": 1}
    examples, _ = read_examples(put(PAIRS), PARAPHRASE)
    assert examples[1] == Example("bbb", ("Who?", "Who is?"), 1, 3)
    assert {type(example.label) for example in examples} == {int}
    assert labels(put(SCORES), SIMILARITY) == [1.8, 5.0]
    assert {type(label) for label in labels(put(SCORES), SIMILARITY)} == {float}
    assert (SST.sentences, PARAPHRASE.sentences, SST.classes, CFIMDB.classes) == (1, 2, 5, 2)
    assert CFIMDB.columns == SST.columns and CFIMDB.name != SST.name


def test_the_names_are_those_of_both_modules():
    assert set(sentence_files.__all__) - {"raw_rows"} <= set(sentences.__all__)
    assert all(hasattr(sentences, name) for name in sentences.__all__)


def test_raw_rows_are_as_they_are_in_the_file(put):
    text = 'id\tsentence\n1\t"a ""b""\nc" \n\n2\td\r\n'
    assert list(sentence_files.raw_rows(put(text))) == ["id\tsentence", '1\t"a ""b""\nc" ', "2\td"]
    with pytest.raises(DataError, match=r"data.csv:2: a field in quotes has no end"):
        list(sentence_files.raw_rows(put('id\tsentence\n1\t"a')))


def test_files_without_labels_lose_no_row(put):
    examples, report = read_examples(put(UNLABELLED), SIMILARITY)
    assert [example.sentences for example in examples] == [("A dog.", "A cat."), ("", "A.")]
    assert [example.label for example in examples] == [None, None]
    assert report.used == 2 and report.empty_sentences == 1
    assert "1 used with an empty sentence" in str(report)
    with pytest.raises(DataError, match=r"data.csv:1: the columns '', 'id', .* must have .*similarity, each"):
        read_examples(put(UNLABELLED), SIMILARITY, labelled=True)


def test_labels_need_not_be_looked_at(put):
    text = PAIRS + "1\tccc\t\tWhat?\tx\n"
    assert labels(put(text), PARAPHRASE, labelled=False) == [None, None, None]
    assert labels(put(PAIRS), PARAPHRASE, labelled=True) == [0, 1]


def test_what_cannot_be_learned_from_is_skipped_and_counted(put):
    rows = "3\tc\tX\tY\t\n4\td\t\tY\t1.0\n\n5\te\tX\t \t0.0\n6\tf\tX\t\t  \n7\tg\tX\tZ\t1.0\n"
    examples, report = read_examples(put(PAIRS + rows), PARAPHRASE)
    assert [example.id for example in examples] == ["aaa", "bbb", "g"]
    assert examples[-1].line == 9
    counts = {reason: (skips.count, skips.first) for reason, skips in report.skipped.items()}
    path = report.path
    assert counts == {
        "header": (1, [f"{path}:1"]),
        "without a label": (2, [f"{path}:4", f"{path}:8"]),
        "with an empty sentence": (2, [f"{path}:5", f"{path}:7"]),
        "empty": (1, [f"{path}:6"]),
    }
    assert report.read == 9 and report.used == 3 and report.empty_sentences == 0
    assert report.as_dict()["skipped"]["without a label"]["count"] == 2
    # the place is not that of the header
    assert f"2 with an empty sentence, 1 empty, 1 header; first: {path}:4)" in str(report)


def test_ids_that_occur_again_are_counted(put):
    text = SINGLE + "2\taaa\tX\t1\n3\taaa\tX\t1\n4\tccc\t\t1\n5\tccc\tX\t1\n"
    examples, report = read_examples(put(text), SST)
    assert len(examples) == 5 and report.duplicate_ids == 2
    assert report.as_dict()["duplicate_ids"] == 2 and report.as_dict()["empty_sentences"] == 0
    assert str(report).endswith("; 2 with the id of another")
    assert "another" not in str(read_examples(put(SINGLE), SST)[1])


@pytest.mark.parametrize(
    ("text", "label"),
    [("0", 0), ("4", 4), (" 2 ", 2), ("3.0", 3), ("+1", 1), ("1e0", 1), ("-0", 0), ("04", 4), ("2.", 2)],
)
def test_classes_that_are_numbers(put, text, label):
    assert labels(put(f"id\tsentence\tsentiment\na\tx\t{text}\n"), SST) == [label]


@pytest.mark.parametrize(
    "text",
    ["5", "-1", "2.5", "nan", "inf", "1e999", "good", "1_0", "0x1", "٣", "1 2", "--1", ".", "1e", "4.0001"],
)
def test_classes_that_are_none(put, text):
    path = put(SINGLE + f"2\tccc\tX\t{text}\n")
    rule = re.escape(f"data.csv:4: sentiment {text!r} must be a whole number from 0 to 4; correct it")
    with pytest.raises(DataError, match=rule):
        read_examples(path, SST)


@pytest.mark.parametrize(
    ("text", "task", "rule"),
    [
        (PAIRS + "2\tc\tX\tY\t2\n", PARAPHRASE, "is_duplicate '2' must be 0 or 1;"),
        (PAIRS + "2\tc\tX\tY\t0.5\n", PARAPHRASE, r"is_duplicate '0\.5' must be 0 or 1;"),
        (SCORES + "2\tc\tX\tY\t5.01\n", SIMILARITY, r"similarity '5\.01' must be a number from 0 to 5;"),
        (SCORES + "2\tc\tX\tY\t-0.1\n", SIMILARITY, r"similarity '-0\.1' must be a number from 0 to 5;"),
        (SCORES + f"2\tc\tX\tY\t{'x' * 99}\n", SIMILARITY, f"similarity '{'x' * 40}' must"),
        (SCORES + "2\tc\tX\t5\n", SIMILARITY, "has 4 fields, the header has 5; separate"),
        (SCORES + "2\tc\tX\tY\t5\t\n", SIMILARITY, "has 6 fields, the header has 5; separate"),
        (SCORES + " \n", SIMILARITY, "has 1 field, the header has 5; separate"),
        (SCORES + "2\t\tX\tY\t5\n", SIMILARITY, "id '' must be one word without commas;"),
        (SCORES + "2\ta b\tX\tY\t5\n", SIMILARITY, "id 'a b' must be one word"),
        (SCORES + "2\ta,b\tX\tY\t5\n", SIMILARITY, "id 'a,b' must be one word"),
        (SCORES + '2\tc\tX\t"Y\t5\n', SIMILARITY, "a field in quotes has no end within 100 lines;"),
    ],
)
def test_rows_that_are_wrong_are_named(put, text, task, rule):
    with pytest.raises(DataError, match=rf"data\.csv:4: {rule}") as caught:
        read_examples(put(text), task)
    assert "\n" not in str(caught.value)


def test_scores_have_fractions_to_the_last_digit(put):
    found = labels(
        put(SCORES + "2\tc\tX\tY\t0.000001\n3\td\tX\tY\t4.999\n4\te\tX\tY\t.5\n5\tf\tX\tY\t0\n"), SIMILARITY
    )
    assert found == [1.8, 5.0, 0.000001, 4.999, 0.5, 0.0]


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        ("id,sentence,sentiment", "'id,sentence,sentiment'"),
        ("\tid\ttext\tsentiment", "'', 'id', 'text', 'sentiment'"),
        ("\tid\tsentence\tid\tsentiment", "'', 'id', 'sentence', 'id', 'sentiment'"),
        ("0\taaa\tIt is good.\t3", "'0', 'aaa', 'It is good.', '3'"),
        ("\t".join("abcdefghij"), "'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h', ..."),
        ("x" * 99, f"'{'x' * 40}'"),
        ("\n\n", "''"),
    ],
)
def test_headers_that_are_wrong_are_shown(put, header, shown):
    line = 1
    with pytest.raises(DataError) as caught:
        read_examples(put(header + "\n"), SST)
    needed = "id, sentence" + ", sentiment" * ("sentiment" in header.split("\t"))
    expected = f"data.csv:{line}: the columns {shown} must have {needed}, each once and separated by tabs; "
    assert expected + "correct the first line" in str(caught.value)


def test_columns_are_found_by_their_names(put):
    text = "sentiment\tmore\tsentence\tid\n3\t\tIt is\taaa\n"
    assert read_examples(put(text), SST)[0] == [Example("aaa", ("It is",), 3, 2)]


def test_a_file_without_examples_is_an_error(put):
    for text in ("\tid\tsentence\tsentiment\n", "\n\tid\tsentence\n"):
        with pytest.raises(DataError, match=r"data\.csv: has no examples to use, its lines are .*1 header;"):
            read_examples(put(text), SST)
    with pytest.raises(DataError, match="its lines are 2 without a label, 1 header; give"):
        read_examples(put("id\tsentence\tsentiment\na\tx\t\nb\ty\t\n"), SST)
    with pytest.raises(DataError, match="the file is empty"):
        read_examples(put(""), SST)


def test_line_policies_hold(put, tmp_path):
    expected = read_examples(put(SINGLE), SST)[0]
    for data in (
        SINGLE.replace("\n", "\r\n").encode(),
        SINGLE[:-1].encode(),
        b"\xef\xbb\xbf" + SINGLE.encode(),
        gzip.compress(SINGLE.encode()),
    ):
        assert read_examples(put(data), SST)[0] == expected
    # no line ends, and no ends of fields
    odd = "a\u2028b\x0bc\u0085d\re"
    (example,) = read_examples(put(f"id\tsentence\nx\t{odd}\n"), SST)[0]
    assert example.sentences == (odd,)
    with pytest.raises(DataError, match=r"data\.csv:3: byte 0xff is not UTF-8"):
        read_examples(put(SINGLE.encode().replace(b"Bad", b"\xff")), SST)
    with pytest.raises(DataError, match=r"data\.csv:3: NUL byte"):
        read_examples(put(SINGLE.replace("Bad", "B\0d")), SST)
    with pytest.raises(DataError, match=r"data\.csv:\d: the gzip data is cut short here"):
        read_examples(put(gzip.compress(SINGLE.encode())[:-12]), SST)
    with pytest.raises(DataError, match="no such file"):
        read_examples(tmp_path / "none.csv", SST)


def test_a_field_may_be_long(put):
    """Longer than the csv module takes."""
    long = "word " * 40_000
    for text in (long, f'"{long}"'):
        assert read_examples(put(f"id\tsentence\nx\t{text}\n"), SST)[0][0].sentences == (long.strip(),)


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ('"""Why?"""', '"Why?"'),
        ('"Do I need """"the"""" here?"', 'Do I need ""the"" here?'),
        ('He said "no"', 'He said "no"'),
        ('"a\tb"', "a\tb"),
        ('""', ""),
        ('"a" b "c"', 'a b "c"'),
        ('"a"b', "ab"),
        ('5" nails', '5" nails'),
        ("`` it ''", "`` it ''"),
        ('"', None),
        ('"a""', None),
    ],
)
def test_quotes(put, field, text):
    path = put(f"\tid\tsentence1\tsentence2\n0\ta\t{field}\tx\n")
    if text is None:
        with pytest.raises(DataError, match=r"data\.csv:2: a field in quotes has no end"):
            read_examples(path, PARAPHRASE)
    else:
        assert read_examples(path, PARAPHRASE)[0][0].sentences == (text, "x")


def test_a_row_may_have_several_lines(put):
    text = '\tid\tsentence\tsentiment\n0\ta\t"one\n\ntwo"\t3\n1\tb\t"x\ny"\t\n2\tc\tz\t1\n'
    examples, report = read_examples(put(text), SST)
    assert [(e.id, e.sentences, e.line) for e in examples] == [("a", ("one\n\ntwo",), 2), ("c", ("z",), 7)]
    assert (report.read, report.used) == (7, 2)
    assert report.skipped["continued in the next line"].count == 3
    assert report.skipped["without a label"].first == [f"{report.path}:6"]


def test_a_quote_without_a_partner_does_not_swallow_the_file(put):
    rows = [f"{i}\ta{i}\tword\t1\n" for i in range(200)]
    for end, fits in ((99, True), (100, False)):
        text = "".join(["id\tsentence\n", 'x\t"open\n', *["more\n"] * (end - 1), 'closed"\n'])
        if fits:
            examples, report = read_examples(put(text), SST)
            assert len(examples) == 1 and report.read == 101
        else:
            with pytest.raises(DataError, match=r"data\.csv:2: a field in quotes has no end within 100"):
                read_examples(put(text), SST)
    with pytest.raises(DataError, match=r"data\.csv:4: a field in quotes has no end"):
        read_examples(put(SINGLE + '5\tx\t"word\t1\n' + "".join(rows)), SST)


fields = st.lists(st.text(st.sampled_from('ab"" \n'), max_size=6), min_size=3, max_size=3)


@given(st.lists(fields, min_size=1, max_size=4))
def test_fields_are_those_of_the_csv_module(tmp_path_factory, rows):
    """Whatever quotes are where; as the course reads them."""
    body = "".join("\t".join(row) + "\n" for row in rows)
    compare(tmp_path_factory, body)


@given(st.lists(fields, min_size=1, max_size=4))
def test_what_the_csv_module_writes_is_read(tmp_path_factory, rows):
    out = io.StringIO()
    csv.writer(out, delimiter="\t", lineterminator="\n").writerows(rows)
    found = compare(tmp_path_factory, out.getvalue())
    assert found == [[field.strip() for field in row] for row in rows]


def compare(folders, body):
    expected = [
        [cell.strip() for cell in row] for row in csv.reader(io.StringIO(body), delimiter="\t") if row
    ]
    path = folders.getbasetemp() / "compared.csv"
    path.write_text(body, encoding="utf-8")
    found = []
    try:
        found += [cells for _, _, cells in sentence_files._rows(path, sentences.SentenceReport(path))]
    except DataError:
        # a quote is open at the end, and what follows would be in the last field
        *_, last = csv.reader(io.StringIO(body + "\tend\n"), delimiter="\t")
        assert last[-1].endswith("\tend\n")
        return None
    assert found == expected
    return found


def test_the_task_of_a_file(put):
    task = task_of(put("\tid\ttext\tstars\n0\ta\tx\t0\n1\tb\ty\t2\n2\tc\tz\t1\n3\td\tw\t\n"))
    assert (task.name, task.kind, task.classes, task.columns) == ("stars", "classes", 3, ("text",))
    assert (task.label, task.prediction, task.sentences) == ("stars", "Predicted_Stars", 1)
    assert labels(put("id\ttext\tstars\na\tx\t2\n"), task) == [2]
    with pytest.raises(DataError, match="must be a whole number from 0 to 2"):
        labels(put("id\ttext\tstars\na\tx\t3\n"), task)
    task = task_of(put(PAIRS), "binary")
    assert dataclasses.replace(task, name="paraphrase", prediction=PARAPHRASE.prediction) == PARAPHRASE
    assert task.prediction == "Predicted_Is_Duplicate"
    assert task_of(put(SCORES), "score").classes is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id\ttext\tstars\na\tx\t1\nb\ty\t2\n", "no stars is 0, the highest is 2; number at least two"),
        ("id\ttext\tstars\na\tx\t0\nb\ty\t2\n", "no stars is 1, the highest is 2; number"),
        ("id\ttext\tstars\na\tx\t0\nb\ty\t0\n", "no stars is 1, the highest is 0; number"),
        ("id\ttext\tstars\na\tx\t0\nb\ty\t99999999999999\n", "no stars is 1, the highest is 99999999999999;"),
        ("id\ttext\tstars\na\tx\t-1\n", "stars '-1' must be a whole number from 0; correct"),
        ("\tid\tstars\n0\ta\t1\n", ":1: the columns '', 'id', 'stars' must be id, one or two sentences"),
        ("id\ta\tb\tc\tstars\n", "the columns 'id', 'a', 'b', 'c', 'stars' must be id, one or two"),
        ("text\tstars\n", "the columns 'text', 'stars' must be id"),
        ("text\tid\n", "the columns 'text', 'id' must be id"),
    ],
)
def test_files_that_have_no_task(put, text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        task_of(put(text))


EXAMPLES = [Example("aaa", ("one",), 3, 2), Example("bbb", ("two three",), 0, 3), Example("ccc", ("",), 1, 5)]


def test_predictions_are_written_as_the_course_does(tmp_path):
    path = tmp_path / "out.csv"
    write_predictions(path, EXAMPLES, [3, 0, 2], SST.prediction)
    assert path.read_bytes() == b"id \t Predicted_Sentiment \naaa , 3 \nbbb , 0 \nccc , 2 \n"
    write_predictions(path, EXAMPLES[:2], torch.tensor([1.0, 0.0]), PARAPHRASE.prediction)
    assert path.read_bytes() == b"id \t Predicted_Is_Paraphrase \naaa , 1.0 \nbbb , 0.0 \n"
    write_predictions(
        path, EXAMPLES[:2], torch.tensor([0.25, 4.5], dtype=torch.bfloat16), SIMILARITY.prediction
    )
    assert path.read_bytes() == b"id \t Predicted_Similiary \naaa , 0.25 \nbbb , 4.5 \n"
    write_predictions(path, EXAMPLES[:2], torch.tensor([True, False]), "x")
    assert path.read_bytes() == b"id \t x \naaa , 1 \nbbb , 0 \n"


def test_predictions_are_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.csv"
    path.write_text("before")
    for values, message in (
        ([1, 2], "predictions has 2 for 3 examples; give one for each"),
        ([1, 2, 3, 4], "predictions has 4 for 3 examples"),
        ([1.0, float("nan"), 2.0], r"predictions\[1\]=nan of bbb must be finite"),
        ([1.0, 2.0, float("inf")], r"predictions\[2\]=inf of ccc must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            write_predictions(path, EXAMPLES, values, "x")
        assert [entry.name for entry in tmp_path.iterdir()] == ["out.csv"] and path.read_text() == "before"
    with pytest.raises(OSError, match="cannot be written"):
        write_predictions(tmp_path / "none" / "out.csv", EXAMPLES, [1, 2, 3], "x")


def test_parts_have_no_example_twice():
    items = [str(i) for i in range(100)]
    parts = split(items, [60, 30], seed=1)
    assert [len(part) for part in parts] == [60, 30, 10]
    assert sorted((item for part in parts for item in part), key=int) == items
    # in the order of the list, but no piece of it
    assert all(part == sorted(part, key=int) for part in parts)
    assert parts[0] != items[:60]
    assert split(items, [60, 30], seed=1) == parts != split(items, [60, 30], seed=2)
    assert split(items, [], seed=1) == [items] and split(items, [100, 0], 1) == [items, [], []]
    assert split([], [0], 3) == [[], []]


def test_parts_are_the_same_everywhere_and_fair():
    assert split(range(10), [4, 3], seed=0) == [[4, 5, 7, 8], [1, 3, 9], [0, 2, 6]]
    counts = [0] * 10
    for seed in range(2000):
        for item in split(range(10), [3], seed)[0]:
            counts[item] += 1
    # 600 each, with a deviation of 20
    assert min(counts) > 520 and max(counts) < 680


@pytest.mark.parametrize("parts", [[8, 3], [-1, 3], [11]])
def test_parts_that_cannot_be_are_refused(parts):
    with pytest.raises(ValueError, match=re.escape(f"parts={parts} must be 0 or more, together at most 10")):
        split(range(10), parts, 0)


class Words:
    """A token for each word: its length and 10."""

    cls_id, sep_id, pad_id = 1, 2, 0

    def __init__(self):
        self.calls = 0

    def encode_batch(self, texts):
        self.calls += 1
        return [[10 + len(word) for word in text.split()] for text in texts]


PAIR_EXAMPLES = [
    Example("p", ("a bb ccc", "dddd"), 0.5, 2),
    Example("q", ("a", "bb ccc dddd eeeee"), 5.0, 4),
    Example("r", ("", "a"), 0.0, 9),
]


def test_a_sentence_is_a_sequence():
    tokenizer = Words()
    data = SentenceDataset(EXAMPLES, tokenizer, source="train.csv")
    assert len(data) == 3 and data.truncated == 0
    assert data[1] == SentenceItem(([1, 13, 15, 2],), ([0, 0, 0, 0],), 0)
    assert data[2] == SentenceItem(([1, 2],), ([0, 0],), 1)
    assert [data.source(i) for i in range(3)] == ["train.csv:2", "train.csv:3", "train.csv:5"]
    list(data), data[0], data[0]
    assert tokenizer.calls == 1
    with pytest.raises(IndexError):
        data[3]
    assert SentenceDataset(EXAMPLES, tokenizer).source(0) == "examples:2"


def test_a_pair_is_two_sequences_or_one():
    data = SentenceDataset(PAIR_EXAMPLES, Words())
    assert data[0] == SentenceItem(([1, 11, 12, 13, 2], [1, 14, 2]), ([0] * 5, [0] * 3), 0.5)
    joint = SentenceDataset(PAIR_EXAMPLES, Words(), joint=True)
    assert joint[0] == SentenceItem(([1, 11, 12, 13, 2, 14, 2],), ([0, 0, 0, 0, 0, 1, 1],), 0.5)
    assert joint[2] == SentenceItem(([1, 2, 11, 2],), ([0, 0, 1, 1],), 0.0)
    assert data.truncated == joint.truncated == 0


def test_what_is_too_long_is_cut_and_counted():
    data = SentenceDataset(PAIR_EXAMPLES, Words(), max_length=5)
    assert data.truncated == 1
    assert data[0].tokens == ([1, 11, 12, 13, 2], [1, 14, 2])
    assert data[1].tokens == ([1, 11, 2], [1, 12, 13, 14, 2])
    # both sentences of one pair are one example
    assert SentenceDataset([Example("x", ("a b", "c d"), 1, 1)], Words(), max_length=3).truncated == 1
    joint = SentenceDataset(PAIR_EXAMPLES, Words(), max_length=6, joint=True)
    assert joint.truncated == 2
    assert joint[0].tokens == ([1, 11, 12, 2, 14, 2],) and joint[0].types == ([0, 0, 0, 0, 1, 1],)
    assert joint[1].tokens == ([1, 11, 2, 12, 13, 2],)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(2, 12))
def test_the_longer_sentence_of_a_joint_pair_gives_first(first, second, room):
    a, b = ["a"] * first, ["bb"] * second
    # one token at a time
    left = [first, second]
    while sum(left) > room:
        left[0 if left[0] > left[1] else 1] -= 1
    example = Example("x", (" ".join(a), " ".join(b)), 1, 1)
    data = SentenceDataset([example], Words(), max_length=room + 3, joint=True)
    assert data[0].tokens == ([1, *[11] * left[0], 2, *[12] * left[1], 2],)
    assert data[0].types == ([0] * (left[0] + 2) + [1] * (left[1] + 1),)
    assert data.truncated == (first + second > room)


@pytest.mark.parametrize(
    ("examples", "options", "message"),
    [
        ([], {}, "examples with no sentences: they must be some, and all have as many"),
        ([*EXAMPLES, *PAIR_EXAMPLES], {}, r"examples with \[1, 2\] sentences: they must be some"),
        (EXAMPLES, {"joint": True}, r"examples with \[1\] sentences: they must all have 2, as joint=True"),
        (EXAMPLES, {"max_length": 2}, "max_length=2 must leave a token to each sentence, beside 2 marks"),
        (PAIR_EXAMPLES, {"max_length": 4, "joint": True}, "max_length=4 must .* beside 3 marks"),
    ],
)
def test_data_sets_that_cannot_be_are_refused(examples, options, message):
    with pytest.raises(ValueError, match=message):
        SentenceDataset(examples, Words(), **options)
    assert SentenceDataset(EXAMPLES, Words(), max_length=3).truncated == 1
    assert SentenceDataset(PAIR_EXAMPLES, Words(), max_length=5, joint=True).truncated == 2


def test_a_batch_has_the_first_sentences_first():
    data = SentenceDataset(PAIR_EXAMPLES, Words())
    batch = collate_sentences([data[i] for i in (0, 1, 2)])
    rows = [data[i].tokens[side] for side in (0, 1) for i in (0, 1, 2)]
    expected = pack_sentences(rows)
    assert batch.packed.sentences == 6 and batch.packed.longest == 6 and batch.count == 3
    assert torch.equal(batch.packed.input_ids, expected.input_ids)
    assert torch.equal(batch.packed.cu_seqlens, expected.cu_seqlens)
    assert batch.packed.cu_seqlens[:7].tolist() == [0, 5, 8, 10, 13, 19, 22]
    assert not batch.packed.token_type_ids.any()
    assert batch.labels.dtype == torch.float32 and batch.labels.tolist() == [0.5, 5.0, 0.0]


def test_a_joint_batch_has_segments():
    data = SentenceDataset(PAIR_EXAMPLES, Words(), joint=True)
    batch = collate_sentences([data[0], data[2]])
    assert batch.packed.sentences == batch.count == 2
    assert batch.packed.input_ids[:11].tolist() == [1, 11, 12, 13, 2, 14, 2, 1, 2, 11, 2]
    assert batch.packed.token_type_ids[:11].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 1]


def test_labels_of_a_batch():
    data = SentenceDataset(EXAMPLES, Words())
    batch = collate_sentences([data[0], data[1]])
    assert batch.labels.dtype == torch.int64 and batch.labels.tolist() == [3, 0]
    assert batch.packed.sentences == batch.count == 2
    unknown = data[0]._replace(label=None)
    assert collate_sentences([unknown]).labels is None
    with pytest.raises(ValueError, match="items have 1 labels for 2 examples; give all or none"):
        collate_sentences([unknown, data[1]])
    # whole scores are scores
    assert collate_sentences([data[0]._replace(label=2.0)]).labels.dtype == torch.float32
    with pytest.raises(ValueError, match="sentences have the lengths"):
        collate_sentences([])


def test_a_loader_makes_batches_in_its_workers():
    data = SentenceDataset(PAIR_EXAMPLES, Words())
    assert pickle.loads(pickle.dumps(data))[1] == data[1]
    (batch,) = DataLoader(data, batch_size=3, collate_fn=collate_sentences)
    assert batch.labels.tolist() == [0.5, 5.0, 0.0] and batch.count == 3


def examples_of(*labels):
    return [Example(str(i), ("x",), label, i + 2) for i, label in enumerate(labels)]


def test_weights_make_up_for_rare_classes():
    weights = class_weights(examples_of(0, 0, 0, 2, 2, 4), 5)
    assert weights.dtype == torch.float32
    # inverse to 3, 0, 2, 0, 1
    assert weights.tolist() == pytest.approx([6 / 9, 0, 1, 0, 2])
    assert class_weights(examples_of(1, 0, 1, 0), 2).tolist() == [1.0, 1.0]
    assert class_weights(examples_of(1), 2).tolist() == [0.0, 1.0]


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60))
def test_the_mean_weight_is_one_and_classes_weigh_the_same(found):
    weights = class_weights(examples_of(*found), 6)
    assert weights[found].mean().item() == pytest.approx(1.0, rel=1e-5)
    total = [weights[label].item() * found.count(label) for label in set(found)]
    assert total == pytest.approx([len(found) / len(set(found))] * len(total), rel=1e-5)


@pytest.mark.parametrize(("label", "shown"), [(5, "5"), (-1, "-1"), (None, "None"), (1.5, "1.5")])
def test_weights_need_classes(label, shown):
    with pytest.raises(ValueError, match=rf"label={re.escape(shown)} of line 3 must be in 0\.\.4; pass"):
        class_weights(examples_of(1, label), 5)
    with pytest.raises(ValueError, match="examples is empty"):
        class_weights([], 5)
