import gzip
import hashlib
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nlpfast.data import biographies as lists
from nlpfast.data import text as texts
from nlpfast.data.text import (
    CharDataset,
    CharVocabulary,
    DataError,
    biographies,
    biography_text,
    line_of,
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
        (gzip.compress(b"\xef\xbb\xbfa\r\n"), "a\r\n"),
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
        (b"\x1f\x8b\x08\x00", ":1: the gzip data is cut short here, after 0 whole lines; get"),
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
    def refuse(_, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
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


def test_a_vocabulary_is_pickled_as_its_characters():
    vocabulary = CharVocabulary(["b", "a", "\U0010ffff", "\ud800"])
    pickled = pickle.dumps(vocabulary)
    assert len(pickled) < 200
    again = pickle.loads(pickled)
    assert again.chars == vocabulary.chars and again.encode("ab\U0010ffff").tolist() == [1, 0, 2]


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


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u4", "i8"])
def test_windows_of_tokens_at_hand_are_those_of_the_text(dtype):
    text = "hello\nworld\n\nowl"
    whole = CharDataset(text, 4)
    tokens = whole.data.numpy().astype(dtype)
    tokens.flags.writeable = False
    data = CharDataset.from_tokens(tokens, 4, whole.vocabulary)
    assert len(data) == len(whole) and (data.stoi, data.itos) == (whole.stoi, whole.itos)
    assert data.vocab_size == whole.vocab_size and data.block_size == 4
    for i in range(-len(data), len(data)):
        for there, here in zip(whole[i], data[i], strict=True):
            assert here.dtype == torch.int64 and torch.equal(here, there)
    assert torch.equal(data.data, whole.data)
    for start, stop in ((0, 9), (3, 8), (5, None), (11, 16)):
        part = CharDataset.from_tokens(tokens, 4, whole.vocabulary, start=start, stop=stop)
        other = CharDataset(text[start:stop], 4, whole.vocabulary)
        assert len(part) == len(other) and torch.equal(part.data, other.data)
        for i in range(len(part)):
            assert torch.equal(part[i][0], other[i][0]) and torch.equal(part[i][1], other[i][1])
        with pytest.raises(IndexError):
            part[len(part)]


def test_windows_of_tokens_name_their_source():
    text = "ab\n\ncdef\ng"
    vocabulary = CharVocabulary.from_text(text)
    tokens = vocabulary.encode(text).numpy()
    data = CharDataset.from_tokens(tokens, 1, vocabulary, source="some.txt")
    assert [data.source(i) for i in range(len(data))] == [
        f"some.txt:{line}" for line in (1, 1, 1, 2, 3, 3, 3, 3, 3)
    ]
    part = CharDataset.from_tokens(tokens, 2, vocabulary, source="some.txt", start=3)
    assert [part.source(0), part.source(1), part.source(-1)] == ["some.txt:2", "some.txt:3", "some.txt:3"]
    with pytest.raises(IndexError):
        part.source(len(part))
    assert CharDataset("a\nbc", 1).source(2) == "text:2"
    assert CharDataset("abc", 1).source(1) == "text:1"


def test_lines_are_counted_part_by_part(monkeypatch):
    text = "".join(random.Random(0).choices("ab\n", k=500))
    vocabulary = CharVocabulary.from_text(text)
    tokens = vocabulary.encode(text).numpy()
    for part in (1, 7, 499, 500, 1000):
        monkeypatch.setattr(texts, "_COUNTED", part)
        for position in (0, 1, 6, 7, 8, 250, 499):
            assert line_of(tokens, position, vocabulary) == text.count("\n", 0, position) + 1


@pytest.mark.parametrize(("start", "stop"), [(-1, None), (3, 2), (0, 12), (12, None)])
def test_a_part_must_be_of_the_text(start, stop):
    vocabulary = CharVocabulary("a")
    with pytest.raises(ValueError, match=rf"start={start}, stop=.* must be in order and in 0\.\.11"):
        CharDataset.from_tokens(np.zeros(11, np.uint8), 1, vocabulary, start=start, stop=stop)


def test_a_part_may_be_too_short_or_a_block_too_small():
    tokens, vocabulary = np.zeros(11, np.uint8), CharVocabulary("a")
    message = "f.txt has 3 characters, block_size=3 needs at least 4; give a longer text"
    with pytest.raises(DataError, match=message):
        CharDataset.from_tokens(tokens, 3, vocabulary, source="f.txt", start=2, stop=5)
    assert len(CharDataset.from_tokens(tokens, 3, vocabulary, start=2, stop=6)) == 1
    with pytest.raises(ValueError, match="block_size=0 must be >= 1"):
        CharDataset.from_tokens(tokens, 0, vocabulary)


def mapped(folder, size, vocabulary, **options):
    path = folder / "tokens"
    np.random.default_rng(0).integers(0, len(vocabulary), size, np.uint8).tofile(path)
    tokens = np.memmap(path, np.uint8, mode="r", offset=100)
    return tokens, CharDataset.from_tokens(tokens[50:], 8, vocabulary, source="f", **options)


def test_a_pickle_names_the_file_of_a_map(tmp_path):
    vocabulary = CharVocabulary("ab\n")
    tokens, data = mapped(tmp_path, 1_000_000, vocabulary, start=1000, stop=900_000)
    pickled = pickle.dumps(data)
    assert len(pickled) < 10_000
    again = pickle.loads(pickled)
    assert len(again) == len(data) == 900_000 - 1000 - 8
    for i in (0, 1, 77_777, len(data) - 1):
        expected = tokens[1050 + i : 1050 + i + 9].tolist()
        assert [*data[i][0].tolist(), data[i][1][-1].item()] == expected
        assert torch.equal(again[i][0], data[i][0]) and torch.equal(again[i][1], data[i][1])
        assert again.source(i) == data.source(i)
    # what is no map is in the pickle itself
    whole = CharDataset("hello world", 4)
    assert torch.equal(pickle.loads(pickle.dumps(whole)).data, whole.data)


@pytest.mark.long
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_read_the_map(tmp_path, context):
    _, data = mapped(tmp_path, 2000, CharVocabulary("ab\n"))
    loader = DataLoader(data, batch_size=500, num_workers=1, multiprocessing_context=context)
    found = torch.cat([x for x, _ in loader])
    assert torch.equal(found, torch.stack([data[i][0] for i in range(len(data))]))


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
