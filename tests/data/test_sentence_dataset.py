"""Sentences from a file to batches: what is skipped and counted, what tokens are, and where they are from."""

import gzip

import numpy as np
import pytest
import torch

from nlpfast.data.lines import DataError
from nlpfast.data.sentence_batches import make_sentence_batch
from nlpfast.data.sentence_dataset import SentenceDataset, count_sentence_targets, read_sentence_text
from nlpfast.data.subwords import Subwords
from nlpfast.data.token_pairs import TokenLists

SPECIAL = {"pad_id": 0, "bos_id": 2, "eos_id": 3}


@pytest.fixture(scope="module")
def letters():
    """Return a vocabulary whose pieces are characters."""
    return Subwords.train(["a b c d e"] * 3, 14, min_frequency=1)


def written(path, text):
    path.write_bytes(text.encode())
    return path


def test_lines_are_sentences_and_empty_ones_are_counted(tmp_path):
    path = written(tmp_path / "text", "\ufeffa b\r\n\n \t\nc  d \ne")
    text = read_sentence_text(path)
    assert text.sentences == ["a b", "c  d ", "e"]
    assert text.lines.tolist() == [1, 4, 5] and text.lines.dtype == np.int64
    assert len(text) == text.report.used == 3 and text.report.read == 5
    assert text.path == str(path)
    assert text.report.as_dict()["skipped"] == {"empty": {"count": 2, "first": [f"{path}:2", f"{path}:3"]}}
    assert text.report.byte_order_marks == 1
    packed = tmp_path / "text.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_sentence_text(packed).sentences == text.sentences


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "the file is empty"), ("\n \n", "has no sentence .*2 empty.*one a line"), ("a\nb\0", ":2: NUL")],
)
def test_a_text_without_sentences_is_refused(content, message, tmp_path):
    with pytest.raises(DataError, match=message):
        read_sentence_text(written(tmp_path / "text", content))


def test_a_part_counts_the_others_and_leaves_the_whole(tmp_path):
    path = written(tmp_path / "text", "a\n\nb\nc\nd\ne\n")
    text = read_sentence_text(path)
    middle = text.part(1, 3, "for training")
    assert middle.sentences == ["b", "c"] and middle.lines.tolist() == [3, 4]
    assert middle.report.used == len(middle) == 2 and middle.report.read == 6
    assert middle.report.skipped["for training"].first == [f"{path}:1", f"{path}:5", f"{path}:6"]
    assert text.report.used == 5
    assert list(text.part(0, 5, "none").report.skipped) == ["empty"]
    skips = text.part(0, 1, "many").report.skipped["many"]
    assert (skips.count, len(skips.first)) == (4, 3)


class Letters:
    """A vocabulary whose pieces are letters; "-" is none, as what a model of SentencePiece leaves out."""

    pad_id, bos_id, eos_id = 0, 2, 3

    def encode_batch(self, lines):
        return [[ord(letter) for letter in line if letter not in " -"] for line in lines]


def test_long_sentences_and_those_without_tokens_are_skipped_and_counted(tmp_path):
    path = written(tmp_path / "text", "a b c\n-\na b c d\n\nb\nddddd\n- -\n")
    text = read_sentence_text(path)
    data = SentenceDataset.of_text(text, Letters(), 4)
    assert [data[i] for i in range(len(data))] == [[97, 98, 99], [98]]
    assert all(type(token) is int for token in data[0])
    assert data.report.as_dict()["skipped"] == {
        "empty": {"count": 1, "first": [f"{path}:4"]},
        "without tokens": {"count": 2, "first": [f"{path}:2", f"{path}:7"]},
        "longer than 4 tokens with EOS": {"count": 2, "first": [f"{path}:3", f"{path}:6"]},
    }
    assert (data.report.read, data.report.used) == (7, 2)
    assert [data.source(i) for i in range(2)] == [f"{path}:1", f"{path}:5"]
    assert text.report.used == 6, "the report of the text stays as it is"
    assert list(SentenceDataset.of_text(text, Letters(), 5).report.skipped) == [
        *("empty", "without tokens", "longer than 5 tokens with EOS")
    ]
    assert len(SentenceDataset.of_text(text, Letters(), 1024)) == 4


def test_nothing_left_and_a_limit_without_room_are_refused(letters, tmp_path):
    text = read_sentence_text(written(tmp_path / "text", "a b c\n"))
    with pytest.raises(DataError, match=r"text: no sentence is left .*1 longer than 2 tokens.*max_length"):
        SentenceDataset.of_text(text, letters, 2)
    with pytest.raises(ValueError, match="max_length=1 must be >= 2"):
        SentenceDataset.of_text(text, letters, 1)


def test_batches_are_of_the_sentences_that_are_given(letters):
    sentences = [[5, 6], [], [7, 8, 9], [4]]
    data = SentenceDataset(TokenLists.of(sentences), **SPECIAL)
    assert [data[i] for i in range(4)] == sentences
    batch = data.collate([data[2], data[0]])
    for found, wanted in zip(batch, make_sentence_batch([[7, 8, 9], [5, 6]], **SPECIAL), strict=True):
        assert torch.equal(found, wanted) if isinstance(found, torch.Tensor) else found == wanted
    assert batch.tokens_in[:7].tolist() == [2, 7, 8, 9, 2, 5, 6]
    assert count_sentence_targets(batch) == 4 + 3
    assert count_sentence_targets(data.collate([[]])) == 1
    assert count_sentence_targets(batch._replace(tokens_in=batch.tokens_in + 1)) == 4 + 3
    assert data.source(2) == "sentences:3" and data.report is None


def test_special_tokens_are_those_of_the_vocabulary(letters, tmp_path):
    text = read_sentence_text(written(tmp_path / "text", "a b\nc\n"))
    data = SentenceDataset.of_text(text, letters, 9)
    batch = data.collate([data[1]])
    [token] = letters.encode("c")
    assert len(SentenceDataset.of_text(text.part(1, 2, "other"), letters, 9)) == 1
    assert batch.tokens_in[:2].tolist() == [letters.bos_id, token]
    assert batch.tokens_out[:2].tolist() == [token, letters.eos_id]
    assert batch.tokens_in[-1] == letters.pad_id
