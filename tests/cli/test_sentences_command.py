"""`nlpfast sentences` and `nlpfast train bert`, end to end on embedded and invented data."""

import json
import shlex
from pathlib import Path

import pytest

from nlpfast.cli import main
from nlpfast.data.invented_sentences import write_invented
from nlpfast.data.sentences import SST, read_examples
from nlpfast.models.bert import BertForPreTraining
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.train import sentences
from nlpfast.train.bert_options import SIZES


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setitem(SIZES, "tiny", (1, 64))
    monkeypatch.setattr(
        sentences, "write_invented", lambda folder, seed: write_invented(folder, seed, (40, 12, 6))
    )
    monkeypatch.chdir(tmp_path)


def say(capsys, command: str) -> tuple[list[str], list[str]]:
    assert main(shlex.split(command)) == 0
    out, err = capsys.readouterr()
    return out.splitlines(), err.splitlines()


def test_a_text_is_pretrained_on_and_a_task_finetuned(capsys):
    """The whole way: examples, their text, a vocabulary, pretraining, one task, several."""
    write_invented("data", 1, (60, 20, 10))
    out, err = say(capsys, "sentences text data/sst-train.csv data/para-train.csv data/sst-test.csv")
    assert len(out) == 60 + 2 * 60 + 10 and len(err) == 3
    examples, _ = read_examples("data/sst-train.csv", SST)
    assert out[:60] == [" ".join(example.sentences[0].split()) for example in examples]
    Path("text").write_text("\n".join(out) + "\n")
    say(capsys, "vocab wordpiece text --size 200 --output-dir vocab")
    out, err = say(
        capsys,
        "train bert text --vocab vocab --no-nsp --output-dir bert --max-steps 4 --eval-every 2 --device cpu",
    )
    results = dict(line.rsplit(maxsplit=1) for line in out)
    assert results["steps"] == "4" and results["model"] == "bert/model"
    assert {"unigram entropy", "mlm loss", "mlm accuracy", "seconds", "parameters"} < results.keys()
    assert err[0].startswith("text: ") and len(err) == 1 + 3
    out, _ = say(
        capsys,
        "sentences classify --model bert/model --train data/sst-train.csv --dev data/sst-dev.csv "
        "--test data/sst-test.csv --output_dir sst --epochs 1 --device cpu --hidden_dropout_prob 0.2",
    )
    results = dict(line.rsplit(maxsplit=1) for line in out)
    assert {"sst accuracy", "sst f1", "score", "seconds"} < results.keys()
    assert results["predictions"] == "sst/sst-test-out.csv"
    model = BertForSentences.from_pretrained("sst/model")
    assert model.config.hidden_dropout_prob == 0.2
    pretrained = BertForPreTraining.from_pretrained("bert/model")
    assert model.config.vocab_size == pretrained.config.vocab_size


def test_embedded_data_needs_no_files(capsys):
    out, err = say(capsys, "sentences multitask --epochs 1 --device cpu --vocab_size 200 --strategy annealed")
    names = [line.rsplit(maxsplit=1)[0] for line in out]
    assert names == [
        *("steps", "sst accuracy", "sst f1", "para accuracy", "para f1", "sts pearson", "score", "seconds"),
        *["predictions"] * 6,
        "model",
    ]
    assert any(line.startswith("para: 40 train, 12 dev, 6 test") for line in err)
    out, _ = say(
        capsys, "train bert --biographies 20 --vocab-size 200 --max-steps 2 --device cpu --masking words"
    )
    assert any(line.startswith("nsp accuracy") for line in out)


def test_runs_go_on(capsys):
    first = "sentences classify --epochs 1 --device cpu --vocab_size 200 --output_dir run"
    say(capsys, first)
    out, err = say(capsys, "sentences classify --resume run --log_every 1")
    assert out[0].split() == ["steps", "3"]
    assert "changed: log_every: 50 -> 1" in err
    say(capsys, "train bert --biographies 20 --vocab-size 200 --max-steps 2 --device cpu --output-dir bert")
    out, err = say(capsys, "train bert --resume bert --max-steps 4")
    assert out[0].split() == ["steps", "4"]
    records = [json.loads(line) for line in Path("bert/log.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 4


def test_a_file_is_split(capsys):
    write_invented("data", 0, (30, 5, 5))
    rows = Path("data/para-train.csv").read_text().splitlines()
    out, _ = say(capsys, "sentences split data/para-train.csv --parts a=20 b=3 c=rest --seed 4")
    assert [line.split() for line in out] == [["a", "20"], ["b", "3"], ["c", "7"]]
    parts = [Path(name).read_text().splitlines() for name in "abc"]
    assert [part[0] for part in parts] == [rows[0]] * 3
    assert sorted(line for part in parts for line in part[1:]) == sorted(rows[1:])
    assert parts[0][1:] == [row for row in rows if row in parts[0][1:]], "in their order"
    say(capsys, "sentences split data/para-train.csv --parts d=20 --seed 4")
    assert Path("d").read_text().splitlines() == parts[0]
    say(capsys, "sentences split data/para-train.csv --parts d=20 --seed 5")
    assert Path("d").read_text().splitlines() != parts[0]
