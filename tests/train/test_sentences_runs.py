"""Sentence tasks on BERT: files found, runs, figures, predictions, exact resumption, and what is refused."""

import dataclasses
import json
import math
import signal
from pathlib import Path

import pytest
import torch

from nlpfast.data.invented_sentences import write_invented
from nlpfast.data.lines import DataError
from nlpfast.data.sentences import PARAPHRASE, SIMILARITY, SST, Example, SentenceDataset, read_examples
from nlpfast.data.wordpiece import WordPiece
from nlpfast.models.bert import BertModel
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.stop import Terminated
from nlpfast.train import sentences
from nlpfast.train.bert_options import SIZES
from nlpfast.train.bert_pretraining import bert_config
from nlpfast.train.config import ConfigError
from nlpfast.train.sentences import train_sentences
from nlpfast.train.sentences_answers import figures_of, predict, score_of
from nlpfast.train.sentences_options import ClassifyOptions, MultitaskOptions, SentencesOptions, TaskFiles

PARTS = ("train", "dev", "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    return write_invented(tmp_path_factory.mktemp("data"), 0, (40, 12, 6))


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    monkeypatch.setitem(SIZES, "tiny", (1, 64))
    monkeypatch.chdir(tmp_path)


def classify(files, **given) -> ClassifyOptions:
    named = {part: str(files[f"sst-{part}"]) for part in PARTS}
    return ClassifyOptions(**{**named, "epochs": 2, "device": "cpu", "vocab_size": 200, "lr": 1e-3, **given})


def multitask(files, **given) -> MultitaskOptions:
    named = {f"{key}_{part}": str(files[f"{key}-{part}"]) for key in ("sst", "para", "sts") for part in PARTS}
    return MultitaskOptions(**{**named, "epochs": 1, "device": "cpu", "vocab_size": 200, "lr": 1e-3, **given})


def records(folder: str = "runs/sentences") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def predictions(path: str | Path) -> list[tuple[str, float]]:
    _, *lines = Path(path).read_text().splitlines()
    pairs = [line.split(" , ") for line in lines]
    return [(name, float(value)) for name, value in pairs]


def test_one_task(files, capsys):
    run = train_sentences(classify(files))
    assert run.state.step == 2 * 3
    assert [record["step"] for record in records() if "score" in record] == [3, 6]
    best = max(record["score"] for record in records() if "score" in record)
    assert run.figures["sst accuracy"] == run.figures["score"] == best
    found = [path.name for path in run.predictions]
    assert found == ["sst-dev-out.csv", "sst-test-out.csv"]
    examples, _ = read_examples(files["sst-dev"], SST)
    dev = predictions(run.predictions[0])
    assert [name for name, _ in dev] == [example.id for example in examples]
    right = sum(value == example.label for (_, value), example in zip(dev, examples, strict=True))
    assert right / len(examples) == pytest.approx(best)
    assert run.predictions[0].read_text().startswith("id \t Predicted_Sentiment \n")
    assert len(predictions(run.predictions[1])) == 6
    err = capsys.readouterr().err
    assert "sst: 40 train, 12 dev, 6 test; always the most frequent label 0." in err
    # the folder is a model with its vocabulary
    again = BertForSentences.from_pretrained(run.folder)
    vocabulary = WordPiece.from_folder(run.folder)
    assert predict(again, SST, SentenceDataset(examples, vocabulary)).tolist() == [value for _, value in dev]


def test_several_tasks(files):
    run = train_sentences(multitask(files, rlayer=True, objective="regression"), quiet=True)
    names = {"sst accuracy", "sst f1", "para accuracy", "para f1", "sts pearson", "score"}
    assert run.figures.keys() == names
    expected = (
        run.figures["sst accuracy"] + run.figures["para accuracy"] + (1 + run.figures["sts pearson"]) / 2
    )
    assert run.figures["score"] == pytest.approx(expected / 3)
    assert len(run.predictions) == 6 and all(path.exists() for path in run.predictions)
    assert run.state.step == 3 * 3
    values = {value for _, value in predictions("runs/sentences/para-dev-out.csv")}
    assert values <= {0.0, 1.0}
    text = Path("runs/sentences/para-dev-out.csv").read_text()
    assert text.startswith("id \t Predicted_Is_Paraphrase \n") and " , 1.0 \n" in text + " , 1.0 \n"
    assert Path("runs/sentences/sts-test-out.csv").read_text().startswith("id \t Predicted_Similiary \n")
    assert run.model.rlayer and run.model.objective == "regression"


@pytest.mark.parametrize("strategy", ["proportional", "annealed", "sequential", "mixed"])
def test_every_strategy_trains(files, strategy):
    run = train_sentences(multitask(files, strategy=strategy), quiet=True)
    assert run.state.step == (3 if strategy == "mixed" else 9)
    assert math.isfinite(records()[-1]["loss"])


def test_the_model_is_that_of_the_best_score(files, monkeypatch):
    scores = iter((0.9, 0.1))
    monkeypatch.setattr(sentences.Validation, "__call__", lambda *_: {"score": next(scores)})
    run = train_sentences(classify(files), quiet=True)
    best, last = (BertForSentences.from_pretrained(f"runs/sentences/{name}") for name in ("best", "last"))
    assert torch.equal(run.model.heads["sst"].weight, best.heads["sst"].weight)
    assert not torch.equal(best.heads["sst"].weight, last.heads["sst"].weight)


def test_a_run_that_is_cut_short_comes_to_every_task(files, monkeypatch):
    seen = []
    original = sentences.count_examples
    monkeypatch.setattr(
        sentences,
        "count_examples",
        lambda batches: (seen.append(batches[0].parts[0][0]), original(batches))[1],
    )
    train_sentences(multitask(files, strategy="sequential", max_steps=6, epochs=4), quiet=True)
    assert seen == ["sst", "sst", "paraphrase", "paraphrase", "similarity", "similarity"]


def test_projected_gradients_train(files):
    plain = train_sentences(multitask(files, strategy="mixed", output_dir="a"), quiet=True)
    other = train_sentences(multitask(files, strategy="mixed", pcgrad=True, output_dir="b"), quiet=True)
    first, second = (dict(run.model.named_parameters()) for run in (plain, other))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_heads_alone(files):
    BertModel(bert_config("tiny", 200, 0.1)).save_pretrained("bert")
    WordPiece.train(["all the words of a text"] * 9, 60).save("bert")
    run = train_sentences(classify(files, option="pretrain", model="bert"), quiet=True)
    before = BertModel.from_pretrained("bert").state_dict()
    for name, tensor in run.model.bert.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert run.model.heads["sst"].bias.abs().max() > 0
    assert WordPiece.from_folder(run.folder).tokens == WordPiece.from_folder("bert").tokens


def test_what_is_learned_by_heart_is_predicted(files):
    """Training examples, many times: files, tokens, heads, loss and figures fit together."""
    same = {f"{key}_dev": str(files[f"{key}-train"]) for key in ("sst", "para", "sts")}
    options = multitask(files, **same, epochs=25, lr=3e-3, hidden_dropout_prob=0.0)
    run = train_sentences(options, quiet=True)
    assert run.figures["sst accuracy"] > 0.8
    assert run.figures["para accuracy"] > 0.8
    assert run.figures["sts pearson"] > 0.8


def test_runs_can_be_repeated_and_resumed_to_the_bit(files, monkeypatch):
    options = {"strategy": "proportional", "epochs": 2}
    whole = train_sentences(multitask(files, output_dir="whole", **options), quiet=True)
    calls = []
    original = sentences.count_examples

    def stop(batches):
        calls.append(1)
        if len(calls) == 12:
            signal.raise_signal(signal.SIGTERM)
        return original(batches)

    monkeypatch.setattr(sentences, "count_examples", stop)
    with pytest.raises(Terminated):
        train_sentences(multitask(files, output_dir="parts", **options), quiet=True)
    assert not Path("parts/model").exists()
    parts = train_sentences(multitask(files, output_dir="parts", **options), resume="parts", quiet=True)
    assert parts.state.step == whole.state.step == 18
    assert parts.figures == whole.figures
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, parts.model.state_dict()[name]), name
    scores = [
        [record["score"] for record in records(name) if "score" in record] for name in ("whole", "parts")
    ]
    assert scores[0] == scores[1]


def test_rare_classes_weigh_more(files, monkeypatch):
    seen = []

    class Watched(sentences.TaskLoss):
        def __init__(self, tasks, weights, *, pcgrad=False):
            seen.append(weights)
            super().__init__(tasks, weights, pcgrad=pcgrad)

    monkeypatch.setattr(sentences, "TaskLoss", Watched)
    train_sentences(classify(files, class_weights=True, max_steps=1, output_dir="a"), quiet=True)
    train_sentences(classify(files, max_steps=1, output_dir="b"), quiet=True)
    counts = torch.tensor([0.0] * 5)
    for example in read_examples(files["sst-train"], SST)[0]:
        counts[int(example.label)] += 1
    torch.testing.assert_close(seen[0]["sst"], 40 / (5 * counts))
    assert seen[1] == {}


def test_embedded_examples(monkeypatch):
    monkeypatch.setattr(
        sentences, "write_invented", lambda folder, seed: write_invented(folder, seed, (20, 8, 4))
    )
    options = MultitaskOptions(epochs=1, device="cpu", vocab_size=200)
    assert len(train_sentences(options, quiet=True).predictions) == 6
    assert Path("runs/sentences/data/sts-train.csv").exists()
    options = ClassifyOptions(epochs=1, device="cpu", vocab_size=200, output_dir="one")
    assert list(train_sentences(options, quiet=True).figures) == ["sst accuracy", "sst f1", "score"]


def test_a_file_of_ones_own(files):
    text = files["para-train"].read_text().replace("is_duplicate", "same")
    Path("own.csv").write_text(text)
    Path("more.csv").write_text(text)
    options = ClassifyOptions(task="own.csv", dev="more.csv", epochs=1, device="cpu", vocab_size=200)
    run = train_sentences(options, quiet=True)
    assert run.figures.keys() == {"same accuracy", "same f1", "score"}
    assert run.model.tasks["same"].classes == 2 and run.model.heads["same"].in_features == 128
    assert run.predictions[0].name == "same-dev-out.csv"


def test_sentences_that_are_cut_are_counted(files, capsys):
    train_sentences(classify(files, max_length=5, max_steps=1))
    assert "52 examples cut" in capsys.readouterr().err


def test_a_model_that_reads_little_gets_little(files, capsys):
    config = dataclasses.replace(bert_config("tiny", 200, 0.1), max_position_embeddings=6)
    BertModel(config).save_pretrained("bert")
    WordPiece.train(["all the words of a text"] * 9, 60).save("bert")
    run = train_sentences(classify(files, model="bert", max_steps=1))
    assert run.model.config.max_position_embeddings == 6
    assert "examples cut" in capsys.readouterr().err
    BertModel(dataclasses.replace(config, vocab_size=20)).save_pretrained("bert")
    with pytest.raises(DataError, match="bert: has 20 pieces, the vocabulary"):
        train_sentences(classify(files, model="bert", max_steps=1, output_dir="other"), quiet=True)


def test_rows_that_are_skipped_are_told(files, capsys):
    rows = files["sst-train"].read_text().splitlines()
    rows[3] = rows[3].rpartition("\t")[0] + "\t"
    Path("train.csv").write_text("\n".join(rows) + "\n")
    train_sentences(classify(files, train="train.csv", max_steps=1))
    err = capsys.readouterr().err
    assert "train.csv: skipped {'without a label': {'count': 1, 'first': ['train.csv:4']}}" in err
    assert records()[0]["data"]["train.csv"]["used"] == 39


def test_figures_by_hand():
    def examples(labels):
        return [Example(str(i), ("a",), label, i) for i, label in enumerate(labels)]

    found = figures_of(SST, "sst", torch.tensor([0, 1, 1, 4]), examples([0, 1, 2, 4]))
    assert found == {"sst accuracy": 0.75, "sst f1": pytest.approx((1 + 2 / 3 + 0 + 1) / 4)}
    found = figures_of(PARAPHRASE, "para", torch.tensor([1.0, 0.0, 1.0]), examples([1, 1, 1]))
    assert found == {"para accuracy": pytest.approx(2 / 3), "para f1": pytest.approx(0.8)}
    found = figures_of(SIMILARITY, "sts", torch.tensor([1.0, 2.0, 3.0]), examples([0.5, 1.0, 1.5]))
    assert found == {"sts pearson": pytest.approx(1.0)}
    assert score_of({"a accuracy": 0.5, "a f1": 0.1, "b pearson": 0.5}) == (0.5 + 0.75) / 2
    assert score_of({"b pearson": math.nan}) == 0.5


def test_predictions_of_each_kind():
    torch.manual_seed(0)
    config = dataclasses.replace(bert_config("tiny", 60, 0.0), intermediate_size=32)
    model = BertForSentences(config, [SST, PARAPHRASE, SIMILARITY]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    vocabulary = WordPiece.train(["one two three four five six"] * 9, 60)
    words = ["one", "two two", "three five", "six", "four one six"]
    for task in (SST, PARAPHRASE, SIMILARITY):
        rows = [
            Example(str(i), tuple(words[(i + j) % 5] for j in range(task.sentences)), None, i)
            for i in range(150)
        ]
        together = predict(model, task, SentenceDataset(rows, vocabulary))
        alone = torch.cat([predict(model, task, SentenceDataset([row], vocabulary)) for row in rows[:70]])
        torch.testing.assert_close(together[:70], alone, atol=1e-4, rtol=1e-4)
        assert together.shape == (150,) and together.dtype == (
            torch.int64 if task.kind == "classes" else torch.float32
        )
    assert bool(((together >= 0) & (together <= 5)).all())
    # a logit above 0 says yes
    with torch.no_grad():
        model.heads["paraphrase"].weight.zero_()
        for bias, answer in ((0.1, 1.0), (-0.1, 0.0)):
            model.heads["paraphrase"].bias.fill_(bias)
            pairs = [Example("a", ("one", "two"), None, 1)]
            assert predict(model, PARAPHRASE, SentenceDataset(pairs, vocabulary)).tolist() == [answer]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (ClassifyOptions, {"task": "cfimdb"}, "no embedded examples"),
        (ClassifyOptions, {"train": "a.csv"}, "dev=None: other files"),
        (ClassifyOptions, {"test": "a.csv"}, "train=None: other files"),
        (ClassifyOptions, {"task": "a.csv"}, "dev=None: --task a.csv is a file"),
        (ClassifyOptions, {"task": "a.csv", "train": "b.csv", "dev": "c.csv"}, "train='b.csv'"),
        (MultitaskOptions, {"sts_train": "a.csv"}, "sts_dev=None"),
        (
            MultitaskOptions,
            {"sts_train": "a.csv", "sts_dev": "b.csv"},
            "sst_train=None: files of other tasks",
        ),
        (MultitaskOptions, {"sst_train": "a", "sst_dev": "b", "para_test": "c"}, "para_train=None"),
    ],
)
def test_files_that_do_not_go_together(kind, given, message):
    with pytest.raises(ConfigError, match=message):
        kind(**given).files()


def test_the_courses_names(tmp_path):
    found = ClassifyOptions(task="cfimdb", data_dir="d").files()
    assert found == [TaskFiles("cfimdb", "d/ids-cfimdb-train.csv", "d/ids-cfimdb-dev.csv", None)]
    (tmp_path / "sts-test-student.csv").touch()
    sst, para, sts = MultitaskOptions(data_dir=str(tmp_path), para_train="mine.csv").files()
    assert (sst.key, para.key, sts.key) == ("sst", "para", "sts")
    assert para.train == "mine.csv" and para.dev == str(tmp_path / "quora-dev.csv")
    assert sts.test == str(tmp_path / "sts-test-student.csv") and sst.test is None
    with pytest.raises(NotImplementedError):
        SentencesOptions().files()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"option": "both"}, "option"),
        ({"pcgrad": True}, "needs all tasks in a step"),
        ({"model": ""}, "name of a folder"),
        ({"lr": 0.0}, "lr"),
        ({"max_length": 513}, "max_length"),
    ],
)
def test_wrong_options(given, message):
    with pytest.raises(ConfigError, match=message):
        MultitaskOptions(**given)


def test_learning_rates():
    for given, rate in (
        ({}, 5e-4),
        ({"model": "m"}, 2e-5),
        ({"model": "m", "option": "pretrain"}, 1e-3),
        ({"model": "m", "lr": 0.25}, 0.25),
    ):
        assert ClassifyOptions(**given).trainer_config(7).learning_rate == rate
    assert ClassifyOptions().trainer_config(7).eval_every == 7


def test_nothing_is_written_when_data_is_bad(files):
    with pytest.raises(DataError, match=r"sst-test.csv:1: the columns .* must have .*sentiment"):
        train_sentences(classify(files, dev=str(files["sst-test"])), quiet=True)
    with pytest.raises(DataError, match=r"nowhere.csv: no such file"):
        train_sentences(classify(files, dev="nowhere.csv"), quiet=True)
    with pytest.raises(ConfigError, match="holds the checkpoint"):
        Path("run").mkdir()
        train_sentences(classify(files, output_dir="run", max_steps=1), quiet=True)
        train_sentences(classify(files, output_dir="run", max_steps=1), quiet=True)
    assert train_sentences(classify(files, output_dir="run", max_steps=1, overwrite=True), quiet=True)


def test_several_processes_are_refused(files, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process, leave out torchrun"):
        train_sentences(classify(files), quiet=True)
