"""From a text to a trained model: split, vocabulary, and the checks that come before anything is written."""

import json
import os

import pytest
import torch

from nlpfast.data.text import CharVocabulary, DataError
from nlpfast.train import checkpoint
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.language_model import split_tokens, train_language_model
from nlpfast.train.language_model_options import LanguageModelOptions
from nlpfast.train.task_run import check_output_dir

TEXT = "".join(chr(97 + i % 7) for i in range(400)) + "z" * 40


def split_text(text, block_size, source):
    vocabulary = CharVocabulary.from_text(text)
    return *split_tokens(vocabulary.encode(text).numpy(), vocabulary, block_size, source), vocabulary


def test_the_split_is_by_position_and_validation_windows_do_not_overlap():
    train, validation, vocabulary = split_text(TEXT, 6, "text")
    assert vocabulary.chars == list("abcdefgz"), "also what only validation has"
    assert train.decode(train.data) == TEXT[:396]
    windows = [vocabulary.decode(x) for x, _ in validation]
    targets = [vocabulary.decode(y) for _, y in validation]
    assert "".join(windows) == TEXT[396 : 396 + 42]
    assert "".join(targets) == TEXT[397 : 397 + 42], "every character but the first is predicted once"


@pytest.mark.parametrize("length", [1, 60])
def test_a_short_text_is_refused_with_the_lengths(length):
    with pytest.raises(DataError, match=f"poem.txt: {length} characters are too few.*= 7, .*about 70"):
        split_text("a" * length, 6, "poem.txt")


def test_the_shortest_text_is_good():
    _, validation, _ = split_text("a" * 61, 6, "text")
    assert len(validation) == 1


def test_a_run_trains_logs_saves_and_can_be_repeated(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    results = []
    for name in ("one", "two"):
        options = LanguageModelOptions(
            text=str(tmp_path / "text"),
            output_dir=str(tmp_path / name),
            n_layer=1,
            n_head=2,
            n_embd=16,
            block_size=8,
            dropout=0.1,
        )
        settings = TrainerConfig(max_steps=30, eval_every=10, learning_rate=1e-2, device="cpu", seed=3)
        results.append(train_language_model(options, settings, quiet=True))
    first, second = results
    assert first.state.step == 30
    assert first.checkpoint == tmp_path / "one" / "best"
    assert first.parameters == sum(p.numel() for p in first.model.parameters())
    for name, weight in first.model.state_dict().items():
        assert torch.equal(weight, second.model.state_dict()[name])
    first, *records = [json.loads(line) for line in (tmp_path / "one" / "log.jsonl").read_text().splitlines()]
    assert first == {"step": 0, "data": checkpoint.load(tmp_path / "one").metadata["data"]}
    losses = [record["loss"] for record in records]
    assert losses[-1] < 0.6 * losses[0]
    assert checkpoint.load(tmp_path / "one").metadata["vocabulary"] == list("abcdefgz")


def test_the_embedded_text_is_the_default_and_is_announced(tmp_path, capsys):
    options = LanguageModelOptions(output_dir=str(tmp_path / "run"), biographies=60, n_layer=1, n_embd=8)
    settings = TrainerConfig(max_steps=1, eval_batches=1, device="cpu")
    train_language_model(options, settings)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("embedded biographies: ")
    assert "1 steps on cpu, float32" in first


def test_overwrite_removes_the_earlier_checkpoints_first(tmp_path):
    (tmp_path / "text").write_text(TEXT)
    values = {"text": str(tmp_path / "text"), "output_dir": str(tmp_path / "run"), "block_size": 8}
    values |= {"n_layer": 1, "n_embd": 8, "n_head": 1}
    settings = TrainerConfig(max_steps=2, device="cpu")
    train_language_model(LanguageModelOptions(**values), settings, quiet=True)
    with pytest.raises(ConfigError, match=r"'best' of an earlier run, .*--overwrite"):
        train_language_model(LanguageModelOptions(**values), settings, quiet=True)
    longer = TrainerConfig(max_steps=3, device="cpu")
    train_language_model(LanguageModelOptions(**values, overwrite=True), longer, quiet=True)
    for name in ("best", "last"):
        assert checkpoint.load(tmp_path / "run" / name).state["step"] == 3


def test_what_overwrite_must_not_touch_is_refused(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="'best' in it is no checkpoint"):
            check_output_dir(tmp_path, overwrite)
    assert os.listdir(tmp_path / "best") == ["thesis.txt"]


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match="file is a file, name a folder"):
            check_output_dir(folder, True)
    check_output_dir(tmp_path / "fresh" / "deep", False)
