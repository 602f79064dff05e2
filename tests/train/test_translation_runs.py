"""Training of translation models: what a run leaves, exact resumption, alignments, files of one's own."""

import dataclasses
import gzip
import itertools
import json
import math
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nlpfast.data.invented_languages import invented_pairs
from nlpfast.data.lines import DataError
from nlpfast.data.subwords import Subwords
from nlpfast.metrics import corpus_scores
from nlpfast.models.translation_files import load_model
from nlpfast.models.translator import Translation, Translator
from nlpfast.stop import Terminated
from nlpfast.train import translation, translation_data
from nlpfast.train.config import ConfigError
from nlpfast.train.random_state import set_seed
from nlpfast.train.translation import train_translation
from nlpfast.train.translation_data import read_translation_data, write_invented_pairs
from nlpfast.train.translation_options import ALIGNED, TranslationConfig, TranslationOptions

SMALL = {
    **{"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "d_ff": 64, "heads": 2},
    **{"embed_size": 24, "hidden_size": 32, "max_tokens": 300, "max_length": 64, "vocab_size": 300},
    **{"pairs": 100, "eval_sentences": 20},
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def files(tmp_path) -> dict[str, str]:
    return {name: str(path) for name, path in write_invented_pairs(tmp_path / "text", 100, 0).items()}


def options(**given) -> TranslationOptions:
    return TranslationOptions(**{**SMALL, "output_dir": "run", **given})


def settings(**given) -> TranslationConfig:
    return TranslationConfig(**{"max_steps": 4, "eval_every": 2, "device": "cpu", "warmup_steps": 2, **given})


def train(given: TranslationOptions, config: TranslationConfig | None = None, **more):
    return train_translation(given, config or settings(), quiet=True, **more)


def records(folder: str = "run") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def same(one: str, other: str) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", ["transformer", "rnn"])
def test_a_run_and_what_is_left_of_it(model, capsys):
    run = train_translation(options(model=model), settings())
    names = sorted(path.name for path in Path("run").iterdir())
    assert names == ["best", "data", "last", "last.previous", "log.jsonl", "model", "vocab"]
    assert run.folder == Path("run/model") and run.state.step == 4
    last = records()[-1]
    assert run.figures.items() <= last.items()
    assert last["ppl"] == pytest.approx(math.exp(last["val_loss"])) and last["score"] == last["bleu"]
    err = capsys.readouterr().err
    assert (
        "train.source: 100 lines read, 100 used" in err and f"{model} of {run.parameters:,} parameters" in err
    )
    translator = Translator.from_folder("run")
    assert len(translator.translate(["mit lu", ""], beam=2)) == 2
    assert same("run/model", "run/best")


@pytest.mark.parametrize("model", ["transformer", "rnn"])
def test_figures_are_those_of_the_validation_text(model, files):
    run = train(options(model=model, label_smoothing=0.3, dropout=0.4, choose_by="loss"))
    lines = [Path("run/data/valid.source"), Path("run/data/valid.target")]
    source, target = (path.read_text().splitlines() for path in lines)
    translator = Translator.from_folder("run/last")
    # the last model, one sentence after the other, by all logits
    nll = smoothed = right = count = 0
    for s, t in zip(source, target, strict=True):
        s, t = translator.source.encode(s), translator.target.encode(t)
        state = translator.model.begin(torch.tensor([[*s, 2]]), torch.tensor([len(s) + 1]), 1)
        for token, following in zip([1, *t], [*t, 2], strict=True):
            logits = translator.model.advance(torch.tensor([[token]]), state)[0, 0]
            nll += float(F.cross_entropy(logits, torch.tensor(following)))
            # fairseq's smoothing: what the label gives away goes to the other V - 1
            few = 0.3 / (len(logits) - 1)
            log_p = F.log_softmax(logits, -1)
            smoothed -= float((1 - 0.3 - few) * log_p[following] + few * log_p.sum())
            right += int(logits.argmax()) == following
            count += 1
    assert run.figures["val_loss"] == pytest.approx(nll / count, rel=1e-4)
    assert run.figures["smoothed_loss"] == pytest.approx(smoothed / count, rel=1e-4)
    assert run.figures["accuracy"] == pytest.approx(right / count, abs=1e-3)
    assert run.figures["score"] == -run.figures["val_loss"]
    found = translator.translate(source[:20], beam=1)
    [(_, bleu, _)] = corpus_scores([best[0].text for best in found], [target[:20]], ("bleu",))
    assert run.figures["bleu"] == pytest.approx(bleu)


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({"model": "rnn"}, {}),
        ({"criterion": ALIGNED, "full_context": True}, {"accumulation_steps": 2, "average": 2}),
        ({"bpe_dropout": 0.1}, {"dtype": "bfloat16", "optimizer": "adam", "schedule": "inverse_sqrt"}),
    ],
)
def test_runs_can_be_repeated_and_resumed_to_the_bit(given, config, monkeypatch):
    whole = train(options(output_dir="whole", **given), settings(**config))
    train(options(output_dir="again", **given), settings(**config))
    calls = []
    loss = translation.TranslationLoss.__call__

    def stop(self, model, batch):
        calls.append(batch)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, model, batch)

    monkeypatch.setattr(translation.TranslationLoss, "__call__", stop)
    with pytest.raises(Terminated):
        train(options(output_dir="parts", **given), settings(**config))
    assert not Path("parts/model").exists() and Translator.from_folder("parts").model
    parts = train(options(output_dir="parts", **given), settings(**config), resume="parts")
    assert parts.state.step == 4
    assert parts.figures == whole.figures
    for other in ("again", "parts"):
        assert same(f"{other}/last", "whole/last") and same(f"{other}/model", "whole/model")


def test_another_text_or_vocabulary_is_not_that_of_the_run(files):
    given = {"source": files["train.source"], "target": files["train.target"]}
    train(options(**given), settings(max_steps=2))
    Path(files["train.target"]).write_text(Path(files["train.target"]).read_text().replace("a", "o"))
    with pytest.raises(DataError, match="not the text that the run was trained on"):
        train(options(**given), settings(max_steps=4), resume="run")


def test_alignments_supervise_the_head_that_is_asked_for(files):
    """The loss of the alignments falls where they are learned, and hardly elsewhere."""
    given = {
        **{
            "source": files["train.source"],
            "target": files["train.target"],
            "decoder_layers": 2,
            "dropout": 0.0,
        },
        **{"valid": (files["valid.source"], files["valid.target"]), "alignments": files["train.align"]},
    }
    config = settings(max_steps=120, learning_rate=1e-2, eval_every=120)
    aligned = {"criterion": ALIGNED, "alignment_lambda": 1.0, "alignment_layer": 1}
    train(options(**given, **aligned), config)
    train(options(**{**given, "alignments": None}, output_dir="plain"), config)
    source = Path(files["train.source"]).read_text().splitlines()
    target = Path(files["train.target"]).read_text().splitlines()
    gold = [
        {tuple(map(int, link.split("-"))) for link in line.split()}
        for line in Path(files["train.align"]).read_text().splitlines()
    ]

    def right(folder: str, **heads) -> float:
        translator = Translator.from_folder(folder)
        tokens = translator.source.encode_batch(source), translator.target.encode_batch(target)
        links = [translator.word_links(alignment) for alignment in translator.align(*tokens, **heads)]
        both = sum(len(found & links) for found, links in zip(links, gold, strict=True))
        return both / sum(map(len, links))

    assert right("run") > 0.55
    assert right("run", layer=0) < 0.45 and right("plain", layer=1) < 0.45


def test_links_between_words_and_between_subwords_are_the_same(files):
    words = read_translation_data(
        options(
            **{"source": files["train.source"], "target": files["train.target"]},
            **{"alignments": files["train.align"], "criterion": ALIGNED},
        ),
        0,
    )
    lines = []
    for number in range(len(words.train)):
        batch = words.train[number]
        for row in range(batch.sentences):
            begins = batch.target_cu[row], batch.source_cu[row]
            ends = batch.target_cu[row + 1], batch.source_cu[row + 1]
            inside = (batch.pairs[:, 1] >= begins[0]) & (batch.pairs[:, 1] < ends[0])
            links = [(int(s - begins[1]), int(t - begins[0])) for _, t, s in batch.pairs[inside]]
            lines.append((int(words.train.rows(number)[row]), " ".join(f"{s}-{t}" for s, t in sorted(links))))
    text = [line for _, line in sorted(lines)]
    # the last twentieth is kept to evaluate on, and needs lines too
    Path("subwords").write_text("\n".join([*text, *[""] * 5]) + "\n")
    subwords = read_translation_data(
        options(
            **{"source": files["train.source"], "target": files["train.target"]},
            **{"alignments": "subwords", "alignment_level": "subword", "criterion": ALIGNED},
        ),
        0,
    )
    for number in range(len(words.train)):
        pairs = [data.train[number].pairs.tolist() for data in (words, subwords)]
        assert sorted(pairs[0]) == sorted(pairs[1])


def test_evaluations_translate_as_they_are_told(monkeypatch):
    calls, pauses = [], []
    evaluate = translation.Validation.__call__

    def translate(self, lines, **given):
        text = Path("run/data/valid.target").read_text().splitlines()
        calls.append((len(lines), given["beam"], self.dtype))
        given["pause"]()
        return [[Translation(line, [], 0.0, 0.0, True)] for line in text[: len(lines)]]

    def counted(self, model, pause):
        pauses.append(0)

        def count():
            pauses[-1] += 1
            pause()

        return evaluate(self, model, count)

    monkeypatch.setattr(Translator, "translate", translate)
    monkeypatch.setattr(translation.Validation, "__call__", counted)
    run = train(options(eval_beam=3, eval_sentences=7), settings(dtype="bfloat16"))
    assert calls == [(7, 3, torch.bfloat16)] * 2
    # before each batch of the loss, and whenever the translator does
    assert pauses == [len(read_translation_data(options(), 0).validation) + 1] * 2
    assert run.figures["bleu"] == run.figures["score"] == pytest.approx(100)


def test_pairs_to_evaluate_on_are_those_of_loss_and_bleu(files):
    """A sentence that no model reads is left out of both, and named; --max-length leaves none out."""
    long, medium, short = (" ".join(["mit"] * words) for words in (1030, 300, 2))
    Path("valid.source").write_text(f"{short}\n{long}\n{short}\n")
    Path("valid.target").write_text(f"{short}\n{short}\n{medium}\n")
    text = {"source": files["train.source"], "target": files["train.target"]}
    given = options(**text, valid=("valid.source", "valid.target"), max_length=8)
    data = read_translation_data(given, 0)
    assert data.sentences.source == [short, short] and data.sentences.target == [short, medium]
    reports = data.facts["data"]
    assert reports["validation"]["skipped"]["longer than 1,024 tokens with EOS"]["first"] == [
        "valid.source:2"
    ]
    assert 0 < reports["train"]["skipped"]["longer than 8 tokens with EOS"]["count"] < 100
    assert train(given, settings(max_steps=2)).state.step == 2


def test_pairs_are_kept_to_evaluate_on(files, monkeypatch):
    text = {"source": files["train.source"], "target": files["train.target"]}
    report = read_translation_data(options(**text), 0).facts["data"]["validation"]
    assert (report["read"], report["used"]) == (100, 5)
    assert report["skipped"] == {
        "for training": {"count": 95, "first": [f"{files['train.source']}:{n}" for n in (1, 2, 3)]}
    }
    for name in text:
        lines = Path(files[f"train.{name}"]).read_text().splitlines()
        Path(name).write_text("".join(f"{line}\n" for line in [*lines, lines[0]]))
    given = options(source="source", target="target")
    assert len(read_translation_data(given, 0).sentences) == 6, "a share is rounded up"
    monkeypatch.setattr(translation_data, "MOST_VALIDATION", 3)
    assert len(read_translation_data(given, 0).sentences) == 3


def test_pairs_of_unequal_lengths_are_skipped(files):
    text = {"source": files["train.source"], "target": files["train.target"]}
    skipped = read_translation_data(options(**text, max_ratio=1.0), 0).facts["data"]["train"]["skipped"]
    assert 0 < skipped["more than 1 times as long on one side"]["count"] < 95


def test_seeds_reach_text_batches_and_weights(files):
    text = {"source": files["train.source"], "target": files["train.target"]}
    rows = [
        [data.train.rows(i).tolist() for i in range(len(data.train))]
        for data in (read_translation_data(options(**text), seed) for seed in (0, 1))
    ]
    assert rows[0] != rows[1] and sorted(itertools.chain(*rows[0])) == sorted(itertools.chain(*rows[1]))
    made = []
    trainer, _ = translation.prepared(options(), settings(seed=3), True, made)
    assert Path("run/data/train.source").read_text().splitlines() == invented_pairs(800, 3).source[:100]
    set_seed(3)
    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2}
    model = translation.build_model(options(), len(made[0].source), len(made[0].target), **special)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_options_reach_the_trainer():
    aligned = {"criterion": ALIGNED, "align_shift": 1, "label_smoothing": 0.2, "alignment_lambda": 0.7}
    trainer, _ = translation.prepared(options(**aligned), settings(), True, [])
    criterion = trainer.steps.loss_fn.criterion
    assert (criterion.label_smoothing, criterion.alignment_lambda, criterion.align_shift) == (0.2, 0.7, 1)
    assert trainer.model.config.align_shift == 1
    assert trainer.metadata["options"] == dataclasses.asdict(options(**aligned))
    batches = len(trainer.feed.dataset)
    accumulated = TranslationConfig(max_epochs=8, accumulation_steps=batches - 1, device="cpu")
    trainer, _ = translation.prepared(options(**aligned), accumulated, True, [])
    # the last step of an epoch has one batch
    assert (trainer.config.eval_every, trainer.config.warmup_steps) == (2, 2)


@pytest.mark.parametrize(("model", "width"), [("transformer", "d_model"), ("rnn", "hidden_size")])
def test_noam_is_of_the_models_width(model, width):
    rates = []
    for number, sizes in enumerate(
        ({"d_model": 16, "hidden_size": 16}, {"d_model": 16, "hidden_size": 16, width: 64})
    ):
        train(
            options(model=model, output_dir=str(number), **sizes),
            settings(schedule="noam", max_steps=2, log_every=1),
        )
        rates.append([record["lr"] for record in records(str(number)) if "lr" in record])
    assert rates[0] == pytest.approx([2 * rate for rate in rates[1]]) and rates[0]


def test_digest_is_of_all_that_is_read(files):
    text = {"source": files["train.source"], "target": files["train.target"], "vocab": "one"}
    lines = [Path(files[f"train.{side}"]).read_text() for side in ("source", "target", "align")]
    Subwords.train(lines[0].splitlines(), 100).save("one")
    Subwords.train(lines[1].splitlines(), 100).save("two")
    for name, content in zip(("source", "target", "align"), lines, strict=True):
        first, rest = content.split("\n", 1)
        Path(name).write_text(f"{first.rsplit(' ', 1)[0]}\n{rest}")
    aligned = {"alignments": files["train.align"], "criterion": ALIGNED}
    changes = [
        *({}, {"source": "source"}, {"target": "target"}, {"vocab": "two"}, aligned),
        *({**aligned, "alignments": "align"}, {"target_vocab": "two", "tied": "none"}),
    ]
    found = [read_translation_data(options(**{**text, **change}), 0).facts["digest"] for change in changes]
    assert len(set(found)) == len(changes)
    assert read_translation_data(options(**text), 5).facts["digest"] == found[0]
    assert "alignments" in read_translation_data(options(**{**text, **aligned}), 0).facts["data"]


def test_special_tokens_must_be_the_same_on_both_sides(files, monkeypatch):
    """Those of SentencePiece's models may be any."""
    text = {"source": files["train.source"], "target": files["train.target"]}
    for name in ("pad_id", "bos_id", "eos_id"):
        sides = [Subwords.train(["mit lu"] * 3, 20) for _ in range(2)]
        setattr(sides[1], name, 9)
        monkeypatch.setattr(translation_data, "_named", lambda _, sides=tuple(sides): sides)
        with pytest.raises(DataError, match="two: its special tokens have other ids than those of --vocab"):
            train(options(**text, vocab="one", target_vocab="two", tied="none"))


def test_a_tsv_file_and_its_columns(files):
    source, target = (Path(files[f"train.{side}"]).read_text().splitlines() for side in ("source", "target"))
    rows = [f"{i}\t{t}\t{s}" for i, (s, t) in enumerate(zip(source, target, strict=True))]
    with gzip.open("both.tsv.gz", "wt") as file:
        file.write("\n".join(rows) + "\n")
    data = read_translation_data(options(source="both.tsv.gz", columns=(3, 2)), 0)
    two = read_translation_data(options(source=files["train.source"], target=files["train.target"]), 0)
    assert data.sentences.source == two.sentences.source == source[95:]
    assert data.sentences.target == two.sentences.target == target[95:]
    assert all(torch.equal(data.train[0][i], two.train[0][i]) for i in (0, 3, 4))
    report = data.facts["data"]["train"]
    assert report["read"] == 100 and report["used"] == 95
    assert report["skipped"] == {
        "kept to evaluate on": {"count": 5, "first": [f"both.tsv.gz:{n}" for n in (96, 97, 98)]}
    }


def test_vocabularies_joint_and_separate(files):
    text = {"source": files["train.source"], "target": files["train.target"]}
    joint = read_translation_data(options(**text), 0)
    assert joint.source is joint.target
    pairs = invented_pairs(100)
    made = Subwords.train([*pairs.source[:95], *pairs.target[:95]], 300)
    assert joint.source.tokens == made.tokens
    apart = read_translation_data(options(**text, separate=True, tied="decoder"), 0)
    assert apart.source.tokens == Subwords.train(pairs.source[:95], 300).tokens
    assert apart.target.tokens == Subwords.train(pairs.target[:95], 300).tokens
    apart.source.save("one")
    apart.target.save("two")
    run = train(options(**text, vocab="one", target_vocab="two", tied="none"), settings(max_steps=1))
    read = Translator.from_folder(run.folder)
    assert read.source.tokens == apart.source.tokens and read.target.tokens == apart.target.tokens
    named = read_translation_data(options(**text, vocab="one"), 0)
    assert named.source is named.target and named.source.tokens == apart.source.tokens


def test_dropout_of_subwords_draws_anew_in_every_epoch(files):
    text = {"source": files["train.source"], "target": files["train.target"]}
    data = read_translation_data(options(**text, bpe_dropout=0.3), 0).train
    plain = read_translation_data(options(**text), 0).train
    first = data[0].source.tolist()
    assert first == data[0].source.tolist() != plain[0].source.tolist()
    data.epoch = 1
    assert data[0].source.tolist() != first
    lines = [Path(path).read_text().splitlines()[:95] for path in text.values()]
    apart = read_translation_data(options(**text, bpe_dropout=0.3, separate=True, tied="decoder"), 0)
    # each sentence keeps its text, on its side
    for number in range(len(apart.train)):
        batch = apart.train[number]
        sides = (
            (apart.source, batch.source, batch.source_cu),
            (apart.target, batch.target_in, batch.target_cu),
        )
        for (vocabulary, tokens, cu), texts in zip(sides, lines, strict=True):
            for b, row in enumerate(apart.train.rows(number).tolist()):
                ids = [i for i in tokens[cu[b] : cu[b + 1]].tolist() if i > 2]
                assert vocabulary.decode(ids) == texts[row]
    vocabularies = (apart.source, apart.target)
    drawn = [
        translation_data._Redrawn(dropout, seed, vocabularies, tuple(lines))(0, list(range(20)), epoch)
        for dropout, seed, epoch in ((0.3, 0, 0), (0.3, 1, 0), (0.3, 0, 1), (0.9, 0, 0))
    ]
    assert all(one != other for one, other in itertools.combinations(drawn, 2))


def test_the_best_model_is_kept_unless_an_average_is_asked_for(monkeypatch):
    scores = iter((3.0, 2.0, 3.0, 2.0))
    monkeypatch.setattr(translation.Validation, "__call__", lambda *_: {"score": next(scores)})
    train(options())
    assert same("run/model", "run/best") and not same("run/model", "run/last")
    train(options(output_dir="mean"), settings(average=2))
    kept = weights("mean/best"), weights("mean/last")
    for name, tensor in weights("mean/model").items():
        torch.testing.assert_close(tensor, (kept[0][name] + kept[1][name]) / 2)


def test_defaults_follow_from_the_data():
    data = read_translation_data(options(), 0)
    config = TranslationConfig(max_epochs=2, device="cpu")
    run = train(options(), config)
    steps = [record["step"] for record in records() if "val_loss" in record]
    assert steps == [len(data.train), 2 * len(data.train)] and run.state.step == 2 * len(data.train)
    assert TranslationConfig().max_epochs == 10


@pytest.mark.parametrize(
    ("given", "evaluated", "warmup"),
    [
        ({}, 300, 375),
        ({"max_epochs": 20}, 300, 400),
        ({"max_steps": 7}, 300, 1),
        ({"max_steps": 80, "max_epochs": 1, "eval_every": 9}, 9, 10),
        ({"max_steps": 800, "max_epochs": 1}, 300, 37),
        ({"warmup_steps": 3}, 300, 3),
        ({"schedule": "noam"}, 300, None),
        ({"warmup_tokens": 5}, 300, None),
        ({"final_tokens": 9}, 300, None),
    ],
)
def test_settings_follow_from_the_steps_of_an_epoch(given, evaluated, warmup):
    found = TranslationConfig(**given).planned(300)
    assert (found.eval_every, found.warmup_steps) == (evaluated, warmup)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"source": "missing"}, DataError, "missing"),
        ({"source": "one", "target": "two"}, DataError, "one has 2 lines, two has 3"),
        ({"source": "two"}, DataError, "two:1"),
        ({"source": "one", "target": "one", "vocab": "nothing"}, DataError, "nothing"),
        (
            {"source": "one", "target": "one", "alignments": "bad", "criterion": ALIGNED},
            DataError,
            "bad:1",
        ),
        ({"source": "single", "target": "single"}, DataError, "name --valid files"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(given, error, message):
    Path("one").write_text("a b\nc d\n")
    Path("two").write_text("a\nb\nc\n")
    Path("single").write_text("a b\n")
    Path("bad").write_text("0-0 1--1\n\n")
    with pytest.raises(error, match=message):
        train(options(**given))
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("given", "argument"),
    [
        ({"target": "b"}, "target"),
        ({"valid": ("a", "b")}, "valid"),
        ({"alignments": "a"}, "alignments"),
        ({"source": "a", "criterion": ALIGNED}, "criterion"),
        ({"source": "a", "alignments": "b"}, "alignments"),
        ({"bpe_dropout": 0.1, "criterion": ALIGNED}, "bpe_dropout"),
        ({"bpe_dropout": 1.0}, "bpe_dropout"),
        ({"max_tokens": 63}, "max_tokens"),
        ({"target_vocab": "a"}, "target_vocab"),
        ({"target_vocab": "a", "vocab": "b"}, "target_vocab"),
        ({"separate": True}, "separate"),
        ({"separate": True, "tied": "none", "vocab": "a"}, "separate"),
        ({"model": "rnn", "criterion": ALIGNED}, "criterion"),
        ({"model": "rnn", "tied": "decoder"}, "tied"),
        ({"heads": 3}, "d_model"),
        ({"alignment_heads": 3}, "alignment_heads"),
        ({"alignment_layer": 1}, "alignment_layer"),
        ({"alignment_layer": -2}, "alignment_layer"),
        ({"output_dir": ""}, "output_dir"),
        *(
            ({"source": "a", "target": "b", "vocab": "c", name: ""}, name)
            for name in ("source", "target", "vocab")
        ),
        ({"vocab": "a", "target_vocab": "", "tied": "none"}, "target_vocab"),
        ({"source": "a", "alignments": "", "criterion": ALIGNED}, "alignments"),
        ({"columns": (0, 1)}, "columns"),
        ({"valid": ("a",), "source": "a"}, "valid"),
    ],
)
def test_wrong_options(given, argument):
    with pytest.raises(ConfigError) as caught:
        options(**given)
    assert caught.value.argument == argument


def test_options_that_go_together():
    options(model="rnn", separate=True)
    options(separate=True, tied="decoder")
    options(alignment_layer=-1, alignment_heads=2)
    options(model="rnn", tied="decoder", embed_size=32)


def test_whole_models_are_needed():
    with pytest.raises(ConfigError, match="use ddp"):
        train(options(), settings(strategy="fsdp"))


def test_invented_pairs_are_written_in_parts(tmp_path):
    paths = write_invented_pairs(tmp_path / "text", 100, 3)
    pairs = invented_pairs(800, 3)
    for part, begin, end in (("train", 0, 100), ("valid", 100, 300), ("test", 300, 800)):
        assert paths[f"{part}.source"].read_text().splitlines() == pairs.source[begin:end]
        assert paths[f"{part}.target"].read_text().splitlines() == pairs.target[begin:end]
        lines = paths[f"{part}.align"].read_text().splitlines()
        assert [{tuple(map(int, link.split("-"))) for link in line.split()} for line in lines] == (
            pairs.links[begin:end]
        )


def test_every_field_but_the_text_is_part_of_the_model():
    """What a run is resumed with must not change its model."""
    changeable = {
        "source",
        "target",
        "columns",
        "valid",
        "output_dir",
        "overwrite",
        "eval_beam",
        "eval_sentences",
    }
    found = {field.name for field in dataclasses.fields(TranslationOptions) if not field.metadata["fixed"]}
    assert found == changeable
