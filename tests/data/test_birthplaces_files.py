"""Files of the birthplaces task: what is read, what is counted, what is refused with file and line."""

import re
from pathlib import Path

import pytest

from nlpfast.data.biographies import people
from nlpfast.data.birthplaces import MASK, PAD, NameDataset, corpus_vocabulary
from nlpfast.data.birthplaces_files import invented, read_documents, read_questions
from nlpfast.data.lines import DataError


@pytest.fixture(autouse=True)
def box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(text, name="file"):
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return name


@pytest.mark.parametrize("keep_empty", [False, True])
def test_documents_are_lines(keep_empty):
    found, vocabulary, report = read_documents(write("Ada\n\nBéa\r\n\nC"), keep_empty=keep_empty)
    assert found == (["Ada", "", "Béa", "", "C"] if keep_empty else ["Ada", "Béa", "C"])
    assert vocabulary.chars == [PAD, MASK, "\n", "A", "B", "C", "a", "d", "é"]
    assert report.read == 5 and report.used == len(found)
    if not keep_empty:
        assert report.skipped["empty"].first == ["file:2", "file:4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "file: the file is empty"),
        ("\n\n", "file: has no documents; give a corpus with one a line"),
        (f"a\nb{MASK}\n", f"file:2: has '{MASK}', which marks what is no text"),
        (f"a\n\nb{PAD}\n", f"file:3: has '{PAD}'"),
        (b"a\n\xff\n", "file:2: byte 0xff is not UTF-8"),
        (b"a\n\0\n", "file:2: NUL byte"),
    ],
)
def test_a_damaged_corpus_is_named(text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_documents(write(text))


def test_questions_with_answers_and_without():
    found = read_questions(write("Where?\tRome\r\nWho?\t\n"))
    assert found.questions == ["Where?", "Who?"] and found.answers == ["Rome", ""]
    found = read_questions(write("Where?\nWho?"))
    assert found.questions == ["Where?", "Who?"] and found.answers is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Where?\tRome\tBern\n", "file:1: has 2 answers; write question, tab, answer"),
        ("Where?\tRome\nWho?\n", "file:2: has no answer after a tab, unlike the lines before"),
        ("Where?\nWho?\tAda\n", "file:2: has an answer, unlike the lines before"),
        ("Where?\n\n", "file:2: the question is empty; write one"),
        ("\tRome\n", "file:1: the question is empty"),
        (f"Where{MASK}?\n", f"file:1: the question has {MASK} or {PAD}, which mark what is no text"),
        (f"a\n{PAD}\n", "file:2: the question has"),
        ("Where?\nWho is Zoë?\n", "file:2: text has 'Z'"),
    ],
)
def test_damaged_questions_are_named(text, message):
    with pytest.raises(DataError, match=re.escape(message)):
        read_questions(write(text), corpus_vocabulary(["Where? Who is? Rome Ada"]))


def test_any_character_will_do_without_a_vocabulary():
    assert read_questions(write("Who is Zoë?\tΩ\n")).answers == ["Ω"]


def test_invented_questions_are_about_the_people_of_the_corpus():
    corpus, training, asked = invented(25, seed=3)
    assert (len(corpus), len(training), len(asked)) == (100, 12, 13)
    assert len(invented(2)[1]) == len(invented(2)[2]) == 1
    rows = [*training, *asked]
    for row, person in zip(rows, people(25, 3), strict=True):
        assert row == f"Where was {person.name} born?\t{person.birthplace}"
        told = [line for line in corpus if person.name in line and person.birthplace in line]
        assert len(told) == 4
    # the characters of the questions are in the corpus, and the longest fits
    for n in (2, 25):
        corpus, training, asked = invented(n)
        assert len(NameDataset([*training, *asked], corpus_vocabulary(corpus), 128)) == n
