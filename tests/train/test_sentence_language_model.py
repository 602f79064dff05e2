"""Language models of sentences: what a run learns and leaves, perplexity, exact resumption, what is wrong."""

import collections
import dataclasses
import json
import math
import random
import signal
from pathlib import Path

import pytest
import torch

from nlpfast.cli import main
from nlpfast.data.lines import DataError
from nlpfast.data.subwords import Subwords
from nlpfast.models.gpt import GPT
from nlpfast.models.language_model_files import load_language_model, load_vocabulary
from nlpfast.models.rnnlm import RNNLM
from nlpfast.stop import Terminated
from nlpfast.train import checkpoint, sentence_language_model
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.language_model import train_language_model
from nlpfast.train.language_model_options import LanguageModelOptions
from nlpfast.train.sentence_language_model import perplexity, train_sentence_language_model

SIZES = {"n_layer": 1, "n_head": 2, "n_embd": 16, "embed_size": 8, "hidden_size": 24, "max_length": 20}
KINDS = {"gpt": GPT, "rnn": RNNLM}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write sentences of which a word says what the next one is, and their vocabulary."""
    folder = tmp_path_factory.mktemp("sentences")
    after = {"": "kilo", "ka": "me", "me": "so", "so": "ti", "ti": "", "ki": "lo", "lo": "ka", "kilo": "ka"}
    draw = random.Random(0)
    lines = []
    for _ in range(120):
        words = [draw.choice(["ka", "me", "so", "ki"])]
        while after[words[-1]]:
            words.append(after[words[-1]])
        lines.append(" ".join(words))
    (folder / "text").write_text("\n".join([*lines[:100], "", "ka " * 30]) + "\n")
    (folder / "valid").write_text("\n".join(lines[100:]) + "\n")
    Subwords.train(lines, 40).save(folder / "vocab")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def options(files, **given):
    paths = {name: str(files / name) for name in ("text", "vocab", "valid")}
    return LanguageModelOptions(**{**SIZES, **paths, "output_dir": "run", **given})


def settings(**given):
    values = {"max_steps": 4, "eval_every": 2, "batch_size": 16, "device": "cpu", "learning_rate": 1e-2}
    return TrainerConfig(**{**values, **given})


def train(given, config=None, **more):
    return train_sentence_language_model(given, config or settings(), quiet=True, **more)


def records(folder="run"):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(one, other):
    a, b = (load_language_model(folder).state_dict() for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def perplexity_by_hand(folder, path):
    """Return exp of the mean nll of tokens and EOS, each sentence alone."""
    model, vocabulary = load_language_model(folder), load_vocabulary("run/model")
    nll, count = 0.0, 0
    for line in path.read_text().splitlines():
        ids = vocabulary.encode(line)
        logits, _ = model(torch.tensor([[vocabulary.bos_id, *ids]]))
        targets = torch.tensor([*ids, vocabulary.eos_id])
        nll -= logits[0].log_softmax(-1).gather(1, targets[:, None]).double().sum().item()
        count += len(targets)
    return math.exp(nll / count)


@pytest.mark.parametrize("kind", ["gpt", "rnn"])
def test_a_run_learns_and_leaves_the_best_model_with_its_vocabulary(kind, files, capsys):
    given = options(files, model=kind)
    run = train_sentence_language_model(given, settings(max_steps=60, eval_every=20, learning_rate=3e-2))
    assert sorted(p.name for p in Path("run").iterdir()) == [
        "best",
        "last",
        "last.previous",
        "log.jsonl",
        "model",
    ]
    assert sorted(p.name for p in Path("run/model").iterdir()) == [
        "config.json",
        "model.safetensors",
        "vocab",
    ]
    assert run.folder == Path("run/model") and run.state.step == 60
    vocabulary = load_vocabulary("run/model")
    assert vocabulary.digest() == Subwords.from_folder(files / "vocab").digest()
    model = load_language_model("run/model")
    assert type(model) is KINDS[kind] and run.parameters == sum(p.numel() for p in model.parameters())
    assert same("run/model", "run/best")
    first, *log = records()
    assert first["data"]["train"]["skipped"] == {
        "empty": {"count": 1, "first": [f"{files / 'text'}:101"]},
        "longer than 20 tokens with EOS": {"count": 1, "first": [f"{files / 'text'}:102"]},
    }
    assert first["data"]["validation"]["used"] == 20
    evaluated = [record for record in log if "val_loss" in record]
    assert [record["step"] for record in evaluated] == [20, 40, 60]
    for record in evaluated:
        assert record["perplexity"] == pytest.approx(math.exp(record["val_loss"]))
    assert not any("perplexity" in record for record in log if "val_loss" not in record)
    assert evaluated[-1]["perplexity"] == pytest.approx(perplexity_by_hand("run/last", files / "valid"), 1e-4)
    assert run.state.best_loss == min(record["val_loss"] for record in evaluated)
    assert perplexity(run.state.best_loss) == pytest.approx(
        perplexity_by_hand("run/model", files / "valid"), 1e-4
    )
    # what the frequencies of the training text alone would give
    texts = [
        [
            token
            for line in (files / name).read_text().splitlines()[:100]
            for token in (*vocabulary.encode(line), 2)
        ]
        for name in ("text", "valid")
    ]
    counts = collections.Counter(texts[0])
    nll = [-math.log(counts[token] / len(texts[0])) for token in texts[1]]
    assert perplexity(run.state.best_loss) < 0.6 * math.exp(sum(nll) / len(nll))
    err = capsys.readouterr().err.splitlines()
    assert err[0].startswith(f"{files / 'text'}: 102 lines read, 100 used, 2 skipped (1 empty, 1 longer than")
    assert err[1] == f"{files / 'valid'}: 20 lines read, 20 used"
    assert err[2].startswith(
        f"{len(vocabulary)} subwords in the vocabulary; {len(texts[0]) - 100} of text and "
    )
    assert err[3] == f"{kind.upper()} of {run.parameters:,} parameters; 60 steps on cpu, float32"


def test_the_model_is_the_best_and_not_the_last_one(files):
    steep = {"learning_rate": 1.0, "schedule": "constant", "warmup_tokens": 0, "optimizer": "adam"}
    run = train(options(files, model="rnn"), settings(max_steps=12, eval_every=1, **steep))
    losses = [record["val_loss"] for record in records()[1:]]
    assert min(losses) < losses[-1] - 0.1
    assert perplexity_by_hand(run.folder, files / "valid") == pytest.approx(math.exp(min(losses)), 1e-3)


def test_sizes_reach_the_models(files):
    train(options(files, model="rnn", dropout=0.3, n_layer=2), settings(max_steps=1))
    config = load_language_model("run/model").config
    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2}
    sizes = {"embed_size": 8, "hidden_size": 24, "layers": 2, "dropout": 0.3}
    found = {**dataclasses.asdict(config)}
    assert {**sizes, **special}.items() <= found.items()
    train(options(files, dropout=0.3, output_dir="two", n_layer=None), settings(max_steps=1))
    found = load_language_model("two/model").config
    assert (found.n_layer, found.n_embd, found.block_size, found.embd_pdrop) == (4, 16, 20, 0.3)
    assert LanguageModelOptions(model="rnn", n_embd=30).n_layer == 1


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gpt", {"accumulation_steps": 2, "average": 2}),
        ("rnn", {"dtype": "bfloat16", "optimizer": "adam", "schedule": "noam", "learning_rate": 2.0}),
    ],
)
def test_runs_can_be_repeated_and_resumed_to_the_bit(kind, config, files, monkeypatch):
    given = {"model": kind, "dropout": 0.2, "n_layer": 2}
    whole = train(options(files, output_dir="whole", **given), settings(**config))
    train(options(files, output_dir="again", **given), settings(**config))
    calls, loss = [], sentence_language_model.sentence_loss

    def stop(model, batch):
        calls.append(batch)
        # within an epoch, of 7 batches, and with accumulation within a step
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(model, batch)

    monkeypatch.setattr(sentence_language_model, "sentence_loss", stop)
    with pytest.raises(Terminated):
        train(options(files, output_dir="parts", **given), settings(**config))
    assert checkpoint.load("parts").state["step"] < 4 and not Path("parts/model").exists()
    parts = train(options(files, output_dir="parts", **given), settings(**config), resume="parts")
    assert (parts.state.step, parts.state.val_loss) == (4, whole.state.val_loss)
    for other in ("again", "parts"):
        assert same(f"{other}/last", "whole/last") and same(f"{other}/model", "whole/model")
    assert same("whole/model", "whole/averaged" if "average" in config else "whole/best")
    if kind == "rnn":
        assert records("whole")[-1]["lr"] == pytest.approx(2.0 * 24**-0.5 * 4 * 4000**-1.5)


def test_another_text_or_vocabulary_is_not_that_of_the_run(files, tmp_path):
    for name in ("text", "valid"):
        (tmp_path / name).write_text((files / name).read_text())
    Subwords.from_folder(files / "vocab").save(tmp_path / "vocab")
    train(options(tmp_path), settings(max_steps=1))
    for name in ("text", "valid"):
        kept = (tmp_path / name).read_text()
        (tmp_path / name).write_text(kept.replace("ka", "ki", 1))
        with pytest.raises(DataError, match="not the text that the run was trained on"):
            train(options(tmp_path), settings(max_steps=2), resume="run")
        (tmp_path / name).write_text(kept)
    # the same subwords, but another text of the same sentences: a sentence has moved to the other one
    Subwords.train(["ka me so ti ki lo"] * 9, 40).save(tmp_path / "vocab")
    with pytest.raises(DataError, match="not the text that the run was trained on"):
        train(options(tmp_path), settings(max_steps=2), resume="run")
    Subwords.from_folder(files / "vocab").save(tmp_path / "vocab")
    (tmp_path / "valid").rename(tmp_path / "other")
    moved = options(tmp_path, valid=str(tmp_path / "other"))
    assert train(moved, settings(max_steps=2), resume="run").state.step == 2


@pytest.mark.parametrize(("count", "held"), [(2, 1), (20, 1), (21, 2), (20_100, 1000)])
def test_the_last_sentences_are_kept_to_evaluate_on(count, held, files, tmp_path, monkeypatch):
    (tmp_path / "text").write_text("ka\n" * count)
    parts = []
    digest = sentence_language_model._digest
    monkeypatch.setattr(
        sentence_language_model, "_digest", lambda *given: parts.extend(given[1:]) or digest(*given)
    )
    config = settings(max_steps=1, eval_batches=1)
    train(options(files, text=str(tmp_path / "text"), valid=None), config)
    assert [len(part) for part in parts] == [count - held, held]
    assert parts[1].lines[0] == count - held + 1
    assert list(parts[0].report.skipped) == ["kept to evaluate on"]
    assert list(parts[1].report.skipped) == ["for training"]


def test_a_moved_sentence_makes_another_digest(files):
    vocabulary = Subwords.from_folder(files / "vocab")
    text = sentence_language_model.read_sentence_text(files / "text")
    digests = {
        sentence_language_model._digest(vocabulary, text.part(0, cut, "a"), text.part(cut, 101, "b"))
        for cut in (98, 99, 100)
    }
    assert len(digests) == 3


def test_what_cannot_be_is_refused(files, tmp_path):
    (tmp_path / "one").write_text("ka me\n")
    with pytest.raises(DataError, match=r"one: has 1 sentence, and another is needed .* --valid"):
        train(options(files, text=str(tmp_path / "one"), valid=None))
    with pytest.raises(DataError, match=r"no sentence is left .*max_length"):
        train(options(files, max_length=2, valid=str(tmp_path / "one")))
    with pytest.raises(ConfigError, match=r"fsdp.*use ddp"):
        train(options(files, model="rnn"), settings(strategy="fsdp"))
    with pytest.raises(ConfigError, match="vocab=None: sentences need a vocabulary"):
        train(LanguageModelOptions(output_dir="run"))
    with pytest.raises(ConfigError, match="sentences are for train_sentence_language_model"):
        train_language_model(options(files), settings(), quiet=True)
    for values, seen in (
        ({"vocab": "v"}, "vocab='v': is of sentences"),
        ({"valid": "v"}, "valid='v': sentences need a vocabulary"),
        ({"vocab": "", "text": "t"}, "vocab='': give a name"),
        ({"model": "cnn"}, "model='cnn'"),
    ):
        with pytest.raises(ConfigError, match=f"^{seen}"):
            LanguageModelOptions(**values)
    assert not Path("run").exists()


def test_the_command_prints_the_perplexity_and_goes_on(files, capsys):
    paths = [word for name in ("text", "vocab", "valid") for word in (f"--{name}", str(files / name))]
    small = ["--model", "rnn", "--embed-size", "8", "--hidden-size", "16", "--device", "cpu"]
    assert main(["train", "lm", *paths, *small, "--output-dir", "run", "--max-steps", "2"]) == 0
    out = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    last = records()[-1]
    assert out["perplexity"] == f"{last['perplexity']:.4f} (best {last['perplexity']:.4f})"
    assert out["model"] == "run/model" and int(out["parameters"]) > 0
    assert main(["train", "lm", "--resume", "run", "--max-steps", "3"]) == 0
    assert "steps            3" in capsys.readouterr().out
    assert main(["train", "lm", "--resume", "run", "--model", "gpt"]) == 2
    assert "--model gpt: a run that is resumed keeps its own, rnn" in capsys.readouterr().err


def test_an_rnn_of_characters(tmp_path, capsys):
    Path("text").write_text("".join(chr(97 + i % 7) for i in range(600)))
    small = ["--model", "rnn", "--embed-size", "8", "--hidden-size", "16", "--block-size", "8"]
    argv = ["train", "lm", "--text", "text", *small, "--output-dir", "run", "--device", "cpu"]
    assert main([*argv, "--max-steps", "60", "--eval-every", "30", "--learning-rate", "0.02"]) == 0
    assert "RNN of " in capsys.readouterr().err
    log = [record for record in records() if "val_loss" in record]
    assert log[-1]["val_loss"] < 0.3 < math.log(7)
    model = load_language_model("run/best")
    assert type(model) is RNNLM and model.config.bos_id is None and model.config.vocab_size == 7
    with pytest.raises(ConfigError, match="fsdp"):
        given = LanguageModelOptions(text="text", model="rnn", block_size=8, output_dir="two")
        train_language_model(given, settings(strategy="fsdp"), quiet=True)
