import hashlib
import random
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from nlpfast.data import biographies as lists
from nlpfast.data.text import (
    CharDataset,
    CharVocabulary,
    DataError,
    biographies,
    biography_text,
    people,
    read_text,
)

# every kind of line end and width of character: only \n ends a line
MIXED = "a\nb\r\nc\u2028d\x85e\x0bé€\U0001f600\ta"


def write(tmp_path, data):
    path = tmp_path / "some text.txt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"x", "x"),
        (b"a\nb", "a\nb"),
        (b"a\r\nb\rc\n\n", "a\r\nb\rc\n\n"),
        (b"\xef\xbb\xbfa\n", "a\n"),
        (b"\xef\xbb\xbf\xef\xbb\xbfa", "\ufeffa"),
        (MIXED.encode(), MIXED),
        (b" \n", " \n"),
    ],
)
def test_read_text_is_exact(tmp_path, data, text):
    path = write(tmp_path, data)
    assert read_text(path) == text
    assert read_text(str(path)) == text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ": the file is empty"),
        (b"\xef\xbb\xbf", ": the file is empty"),
        (b"\xff", ":1: byte 0xff is not UTF-8 (invalid start byte); convert"),
        (b"a\nb\nc\xe9d\n", ":3: byte 0xe9 is not UTF-8 (invalid continuation byte)"),
        (b"a\r\xe2\x80\xa8\n\xc3", ":2: byte 0xc3 is not UTF-8 (unexpected end of data)"),
        (b"\xed\xa0\x80", ":1: byte 0xed is not UTF-8"),
        (b"\xef\xbb\xbfa\n\xfe", ":2: byte 0xfe is not UTF-8"),
        (b"a\n\nb\0c", ":3: NUL byte"),
        ("ab".encode("utf-16-le"), ":1: NUL byte"),
        (b"\x1f\x8b\x08\x00", ":1: byte 0x8b is not UTF-8"),
    ],
)
def test_read_text_names_file_and_line(tmp_path, data, message):
    path = write(tmp_path, data)
    with pytest.raises(DataError) as error:
        read_text(path)
    assert str(error.value).startswith(f"{path}{message}") and "\n" not in str(error.value)


def test_read_text_of_no_file(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file; check the path"):
        read_text(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a folder; give a text file"):
        read_text(tmp_path)
    with pytest.raises(DataError, match=r"cannot be read \(Not a directory\)"):
        read_text(write(tmp_path, b"x") / "below")


def test_read_text_of_an_unreadable_file(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"text\.txt: cannot be read \(Permission denied\); check its"):
        read_text(tmp_path / "text.txt")


@pytest.mark.parametrize("text", ["a", "hello world", MIXED, "zyx\n\0", "\ud800\udfff\U0010ffff"])
def test_vocabulary_is_sorted_and_reversible(text):
    vocabulary = CharVocabulary.from_text(text)
    assert vocabulary.chars == sorted(set(text))
    assert len(vocabulary) == len(set(text))
    assert [vocabulary.itos[vocabulary.stoi[char]] for char in text] == list(text)
    numbers = vocabulary.encode(text)
    assert numbers.dtype == torch.int64 and numbers.tolist() == [vocabulary.stoi[char] for char in text]
    assert vocabulary.decode(numbers) == vocabulary.decode(numbers.tolist()) == text
    assert vocabulary.decode(numbers.int()) == vocabulary.decode(iter(numbers.tolist())) == text


def test_empty_texts_have_no_numbers():
    vocabulary = CharVocabulary("ab")
    assert vocabulary.encode("").shape == (0,)
    assert vocabulary.decode([]) == vocabulary.decode(torch.tensor([], dtype=torch.int64)) == ""


def test_the_order_of_a_given_vocabulary_is_kept():
    vocabulary = CharVocabulary(["□", "⁇", "b", "a"])
    assert vocabulary.encode("ab⁇□").tolist() == [3, 2, 1, 0]
    assert vocabulary.decode(torch.tensor([0, 3])) == "□a"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("abc", "'c' (U+0063) at position 2, line 1"),
        ("a\nb\n\U0001f600\n", "'\U0001f600' (U+1F600) at position 4, line 3"),
        ("\x00a", "'\\x00' (U+0000) at position 0, line 1"),
        ("a\u2028b\ud800", "'\\u2028' (U+2028) at position 1, line 1"),
    ],
)
def test_unknown_characters_are_named(text, where):
    with pytest.raises(DataError) as error:
        CharVocabulary("ab\n").encode(text)
    assert f"text has {where}, which is not among the 3 characters" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 2], "ids has 2 at position 1, outside 0..1"),
        ([-1], "ids has -1 at position 0, outside 0..1"),
        (torch.tensor([[0]]), "ids has shape [1, 1], expected one dimension"),
    ],
)
def test_unknown_numbers_are_named(ids, message):
    with pytest.raises(DataError) as error:
        CharVocabulary("ab").decode(ids)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("chars", "message"),
    [
        ([], "vocabulary is empty"),
        (["a", "bc"], "vocabulary entry 1 is 'bc', expected one character"),
        (["a", ""], "vocabulary entry 1 is '', expected one character"),
        ([1], "vocabulary entry 0 is 1, expected one character"),
        ("abca", "vocabulary entry 3 repeats entry 0 ('a')"),
    ],
)
def test_wrong_vocabularies_are_refused(chars, message):
    with pytest.raises(DataError) as error:
        CharVocabulary(chars)
    assert message in str(error.value)


@pytest.mark.parametrize("block_size", [1, 3, 10])
def test_dataset_is_all_windows(block_size):
    text = "hello world"
    data = CharDataset(text, block_size)
    assert data.vocab_size == 8 and len(data) == len(text) - block_size
    for i in range(len(data)):
        x, y = data[i]
        assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (block_size,)
        assert data.decode(x) == text[i : i + block_size]
        assert data.decode(y) == text[i + 1 : i + 1 + block_size]
        assert [data.itos[int(n)] for n in x] == list(text[i : i + block_size])
    assert len(list(data)) == len(data)
    assert torch.equal(data[-1][1], data[len(data) - 1][1])
    for outside in (len(data), -len(data) - 1):
        with pytest.raises(IndexError, match=f"index {outside} is outside the {len(data)} windows"):
            data[outside]


def test_items_are_views_and_batches_are_not():
    data = CharDataset("hello world", 4)
    assert data[2][0].data_ptr() == data.data.data_ptr() + 2 * 8
    x, y = next(iter(DataLoader(data, batch_size=3)))
    assert x.shape == y.shape == (3, 4)
    assert data.decode(x[2]) == "llo " and data.decode(y[2]) == "lo w"


def test_datasets_share_a_vocabulary():
    train = CharDataset("hello world", 4)
    for vocabulary in (train.vocabulary, train.vocabulary.chars, "".join(train.vocabulary.chars)):
        other = CharDataset("owl hello", 4, vocabulary)
        assert other.stoi == train.stoi and other.vocab_size == 8
        assert train.decode(other.data) == "owl hello"
    with pytest.raises(DataError, match=r"'x' \(U\+0078\) at position 2, line 1"):
        CharDataset("hexed", 4, train.vocabulary)
    assert train.encode("who").tolist() == [train.stoi[char] for char in "who"]


@pytest.mark.parametrize("text", ["", "a", "abcd"])
def test_a_text_shorter_than_a_block_is_refused(text):
    message = (
        f"text has {len(text)} characters, block_size=4 needs at least 5; give a longer text or a smaller"
    )
    with pytest.raises(DataError, match=message):
        CharDataset(text, 4)
    assert len(CharDataset("abcde", 4)) == 1


@pytest.mark.parametrize("block_size", [0, -1])
def test_block_size_must_be_positive(block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size} must be >= 1"):
        CharDataset("abc", block_size)


def test_a_large_text_comes_back():
    text = biography_text(200) * 200
    assert len(text) > 5_000_000
    data = CharDataset(text, 64)
    assert data.decode(data.data) == text
    assert len(data) == len(text) - 64


def test_biographies_never_change():
    digest = hashlib.sha256(biography_text(1000, seed=0).encode()).hexdigest()
    assert digest == "8e72d3eea1ae07068c5a24f1fa6ee160ed91dce80898cb17b5025e48b773042d"


def test_biographies_depend_on_the_seed_and_nothing_else():
    state = random.getstate()
    first = people(300, seed=1)
    random.seed(5)
    assert people(300, seed=1) == first
    random.setstate(state)
    assert people(300, seed=2) != first
    assert people(100, seed=1) == first[:100]
    assert biographies(300, seed=1) == [person.biography for person in first]
    assert biography_text(300, seed=1) == "".join(person.biography + "\n" for person in first)
    assert random.getstate() == state
    assert people(0) == [] and biography_text(0) == ""


def test_names_are_unique_and_facts_are_in_the_text():
    found = people(6000, seed=3)
    assert len({person.name for person in found}) == 6000
    for person in found:
        text = person.biography
        assert text.isascii() and "{" not in text and "\n" not in text and "  " not in text
        assert 40 < len(text) < 300
        first_sentence = re.split(r"(?<=\.) ", text)[0]
        for fact in (person.name, person.birthplace, person.profession, str(person.year)):
            assert first_sentence.count(fact) >= 1, text
        assert text.count(person.birthplace) == 1, text
        assert 1 <= len(re.findall(r"\.(?: |$)", text)) <= 3, text
        assert not re.search(r"\ba [aeiou]", first_sentence), text
        assert (
            bool(re.search(r"\b([Ss]he|[Hh]er)\b", text)) + bool(re.search(r"\b([Hh]e|[Hh]is)\b", text)) <= 1
        )
    assert {person.birthplace for person in found} == set(lists._PLACES)
    assert {person.profession for person in found} == set(lists._WORKS)
    assert {person.year for person in found} == set(range(1870, 1960))


def test_word_lists_have_no_doubles():
    assert not set(lists._WOMEN) & set(lists._MEN)
    for words in (lists._WOMEN, lists._MEN, lists._LAST, lists._PLACES):
        assert len(words) == len(set(words)) and all(word == word.strip() for word in words)


def test_there_is_an_end_of_names():
    limit = (len(lists._WOMEN) + len(lists._MEN)) * len(lists._LAST)
    assert limit > 30_000
    assert len({person.name for person in people(limit)}) == limit
    for n in (limit + 1, -1):
        with pytest.raises(ValueError, match=rf"n={n} must be in 0\.\.{limit}"):
            people(n)
