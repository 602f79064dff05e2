"""Corpora of characters: the same as reading the whole text, in a map that is made once."""

import gzip
import hashlib
import os
import pickle
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from nlpfast.data import characters, lines, token_cache
from nlpfast.data.characters import read_characters
from nlpfast.data.lines import DataError
from nlpfast.data.text import CharDataset, CharVocabulary, read_text

MIXED = "a\nb\r\nc\u2028d\x85e\x0bé€\U0001f600\ta\ufeff\n\n\U0010ffff"
EVERY = "".join(map(chr, [*range(1, 0xD800), *range(0xE000, 0x110000)]))
TEXTS = {
    "one": "x",
    "newline": "\n",
    "mixed": MIXED,
    "long line": "abc" * 1000,
    "random": "".join(random.Random(0).choices(MIXED + EVERY[::9999], k=5000)),
}


@pytest.fixture(params=["plain", "gzip"])
def pack(request):
    return gzip.compress if request.param == "gzip" else bytes


def check(corpus, path):
    text = read_text(path)
    vocabulary = CharVocabulary.from_text(text)
    assert corpus.path == str(path) and corpus.vocabulary.chars == vocabulary.chars
    assert np.array_equal(corpus.tokens, vocabulary.encode(text).numpy())
    assert corpus.tokens.dtype == np.min_scalar_type(len(vocabulary) - 1)
    assert not corpus.tokens.flags.writeable
    assert corpus.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    count = text.count("\n") + (not text.endswith("\n"))
    assert (corpus.report.path, corpus.report.read, corpus.report.used) == (str(path), count, count)
    for position in {0, len(text) // 3, len(text) - 1}:
        assert corpus.source(position) == f"{path}:{text.count(chr(10), 0, position) + 1}"


@pytest.mark.parametrize("block", [7, 1 << 18])
@pytest.mark.parametrize("text", [pytest.param(text, id=name) for name, text in TEXTS.items()])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_corpus_is_the_text(tmp_path, monkeypatch, pack, text, mark, block):
    monkeypatch.setattr(lines, "BLOCK", block)
    path, cache = tmp_path / "corpus", tmp_path / "cache"
    path.write_bytes(pack(mark + text.encode()))
    for _ in range(2):
        corpus = read_characters(path, cache_dir=str(cache))
        check(corpus, path)
        assert corpus.report.byte_order_marks == (mark != b"")
    assert len(os.listdir(cache)) == 1


@pytest.mark.parametrize("size", [256, 257, 65536, 65537, len(EVERY)])
def test_numbers_are_as_small_as_the_vocabulary_allows(tmp_path, size):
    path = tmp_path / "corpus"
    path.write_bytes(EVERY[-size:].encode())
    corpus = read_characters(path, cache_dir=tmp_path / "cache")
    check(corpus, path)
    assert corpus.tokens.itemsize == (1 if size <= 256 else 2 if size <= 65536 else 4)


def test_a_second_start_does_not_decode(tmp_path, monkeypatch):
    path = tmp_path / "corpus"
    path.write_text(MIXED)
    read_characters(path, cache_dir=tmp_path / "cache")

    def refuse(*_, **__):
        raise AssertionError("decoded again")

    monkeypatch.setattr(characters, "text_blocks", refuse)
    check(read_characters(path, cache_dir=tmp_path / "cache"), path)
    # the content counts, not the name
    (tmp_path / "other").write_bytes(path.read_bytes())
    check(read_characters(tmp_path / "other", cache_dir=tmp_path / "cache"), tmp_path / "other")


def test_other_content_under_the_same_name_is_another_entry(tmp_path):
    path, cache = tmp_path / "corpus", tmp_path / "cache"
    path.write_text("abc\n")
    first = read_characters(path, cache_dir=cache)
    stamp = path.stat()
    path.write_text("xyz\n")
    # neither time nor size tell
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    check(read_characters(path, cache_dir=cache), path)
    assert first.vocabulary.decode(first.tokens.tolist()) == "abc\n"
    assert len(os.listdir(cache)) == 2


def test_another_format_is_another_entry(tmp_path, monkeypatch):
    path, cache = tmp_path / "corpus", tmp_path / "cache"
    path.write_text("abc\n")
    read_characters(path, cache_dir=cache)
    monkeypatch.setattr(characters, "_FORMAT", 2)
    check(read_characters(path, cache_dir=cache), path)
    assert len(os.listdir(cache)) == 2


def test_a_truncated_entry_is_built_again(tmp_path, caplog):
    path, cache = tmp_path / "corpus", tmp_path / "cache"
    path.write_text(MIXED)
    read_characters(path, cache_dir=cache)
    (entry,) = cache.iterdir()
    entry.write_bytes(entry.read_bytes()[:-1])
    check(read_characters(path, cache_dir=cache), path)
    assert "not a whole cache entry (it has " in caplog.text
    caplog.clear()
    check(read_characters(path, cache_dir=cache), path)
    assert not caplog.records


def test_the_default_cache_and_none_at_all(tmp_path, monkeypatch, caplog):
    path = tmp_path / "corpus"
    path.write_text(MIXED)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    check(read_characters(path), path)
    assert len(os.listdir(tmp_path / "cache" / "nlpfast")) == 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    check(read_characters(path), path)
    assert "the cache cannot be written (Not a directory)" in caplog.text


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", ": the file is empty"),
        (b"a\nb\xff", ":2: byte 0xff is not UTF-8"),
        (b"a\n\nb\0", ":3: NUL byte"),
        (gzip.compress(b"a\nb\n")[:-3], ":3: the gzip data is cut short"),
    ],
)
def test_errors_are_those_of_the_text_and_leave_no_entry(tmp_path, data, message):
    path, cache = tmp_path / "corpus", tmp_path / "cache"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_characters(path, cache_dir=cache)
    assert str(error.value).startswith(f"{path}{message}")
    assert not cache.exists()


def test_no_file_a_folder_and_a_pipe(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file; check the path"):
        read_characters(tmp_path / "nowhere", cache_dir=tmp_path)
    with pytest.raises(DataError, match="is a folder; give a text file"):
        read_characters(tmp_path, cache_dir=tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: is not a regular file, and is read more than once; write it"):
        read_characters(tmp_path / "pipe", cache_dir=tmp_path)


@pytest.mark.parametrize("change", ["before the scan", "before encoding", "back for encoding"])
def test_a_file_that_changes_meanwhile_is_an_error(tmp_path, monkeypatch, change):
    path, cache = tmp_path / "corpus", tmp_path / "cache"
    path.write_text("abc\n")
    if change == "before the scan":
        changes = iter(["abd\n", "abd\n"])
    else:
        changes = iter(["abc\n", "abd\n"] if change == "before encoding" else ["abd\n", "abc\n"])
    real = lines.text_blocks

    def text_blocks(*arguments, **options):
        path.write_text(next(changes))
        return real(*arguments, **options)

    monkeypatch.setattr(characters, "text_blocks", text_blocks)
    with pytest.raises(DataError, match="corpus: changed while it was read; start again when it is complete"):
        read_characters(path, cache_dir=cache)
    assert not cache.exists() or os.listdir(cache) == []


def test_windows_of_a_corpus(tmp_path):
    path = tmp_path / "corpus"
    path.write_text(MIXED * 50)
    corpus = read_characters(path, cache_dir=tmp_path / "cache")
    text = read_text(path)
    cut = 900
    train = CharDataset.from_tokens(corpus.tokens, 16, corpus.vocabulary, source=corpus.path, stop=cut)
    held = CharDataset.from_tokens(corpus.tokens, 16, corpus.vocabulary, source=corpus.path, start=cut)
    for part, expected in ((train, text[:cut]), (held, text[cut:])):
        other = CharDataset(expected, 16, corpus.vocabulary)
        assert len(part) == len(other)
        for i in range(len(other)):
            assert torch.equal(part[i][0], other[i][0]) and torch.equal(part[i][1], other[i][1])
    assert train.source(100) == corpus.source(100)
    assert held.source(3) == corpus.source(cut + 3)
    assert token_cache.MappedTokens.of(corpus.tokens) is not None
    assert len(pickle.dumps(train)) < 10_000
    batches = [torch.cat([x for x, _ in DataLoader(data, batch_size=64)]) for data in (train, held)]
    assert [len(batch) for batch in batches] == [len(train), len(held)]
