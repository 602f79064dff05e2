"""Dual learning: gradients, the weight of agreement in each epoch, runs, exact resumption, refusals."""

import json
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nlpfast.data.lines import DataError
from nlpfast.data.subwords import Subwords
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.pretrained import read_weights
from nlpfast.models.seq2seq import Seq2Seq, Seq2SeqConfig
from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.models.translator import Translator
from nlpfast.stop import Terminated
from nlpfast.train import dual, language_model_scores
from nlpfast.train.config import ConfigError
from nlpfast.train.dual import DualTranslators, pair_losses, train_dual
from nlpfast.train.dual_batches import DualBatch, DualDataset
from nlpfast.train.dual_options import DualConfig, DualOptions
from nlpfast.train.translation import train_translation
from nlpfast.train.translation_data import read_translation_data, write_invented_pairs
from nlpfast.train.translation_options import TranslationConfig, TranslationOptions

SMALL = {
    **{"encoder_layers": 1, "decoder_layers": 1, "d_model": 16, "d_ff": 32, "heads": 2, "dropout": 0.1},
    **{"embed_size": 12, "hidden_size": 16, "max_tokens": 300, "max_length": 64},
}


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, str]:
    """Text, a vocabulary, four translators and two language models that know next to nothing."""
    folder = tmp_path_factory.mktemp("dual")
    found = {name: str(path) for name, path in write_invented_pairs(folder / "text", 100, 0).items()}
    lines = [
        line
        for side in ("source", "target")
        for line in Path(found[f"train.{side}"]).read_text().splitlines()
    ]
    vocabulary = Subwords.train(lines, 200, source="text")
    vocabulary.save(folder / "vocab")
    valid = (found["valid.source"], found["valid.target"])
    texts = (found["train.source"], found["train.target"])
    for name, model, way in (
        ("there", "transformer", 1),
        ("back", "transformer", -1),
        ("back-rnn", "rnn", -1),
    ):
        options = TranslationOptions(
            **SMALL,
            model=model,
            source=texts[::way][0],
            target=texts[::way][1],
            valid=valid[::way],
            vocab=str(folder / "vocab"),
            output_dir=str(folder / name),
            eval_sentences=2,
        )
        config = TranslationConfig(max_steps=2, eval_every=2, warmup_steps=1, device="cpu")
        found[name] = str(train_translation(options, config, quiet=True).folder)
    for seed, name in enumerate(("lm-source", "lm-target")):
        torch.manual_seed(seed)
        model = GPT(GPTConfig(len(vocabulary), 64, n_layer=1, n_head=2, n_embd=16))
        # the one is surer of itself, so that there is something to disagree by
        model.head.weight.data *= 25 if name == "lm-source" else 1
        model.save_pretrained(folder / name)
        vocabulary.save(folder / name / "vocab")
        found[name] = str(folder / name)
    found["valid"] = valid
    return found


def options(made, **given) -> DualOptions:
    texts = {"source": made["train.source"], "target": made["train.target"], "valid": made["valid"]}
    models = {"forward": made["there"], "backward": made["back"]}
    models |= {"lm_source": made["lm-source"], "lm_target": made["lm-target"]}
    few = {"max_tokens": 300, "max_length": 64, "eval_sentences": 3, "output_dir": "run"}
    return DualOptions(**{**texts, **models, **few, **given})


def settings(**given) -> DualConfig:
    return DualConfig(**{"max_steps": 4, "eval_every": 2, "device": "cpu", "warmup_steps": 1, **given})


def records(folder: str = "run") -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def same(one: str, other: str) -> bool:
    a, b = (read_weights(Path(folder)) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def dataset(made, dsl_lambda=0.02, warmup_epochs=0, **given) -> DualDataset:
    data = read_translation_data(
        TranslationOptions(
            source=made["train.source"],
            target=made["train.target"],
            vocab=str(Path(made["there"]) / "vocab"),
            **SMALL,
            **given,
        ),
        0,
    )
    count = len(data.train.pairs.rows)
    generator = torch.Generator().manual_seed(1)
    scores = tuple(
        (-30 * torch.rand(count, dtype=torch.float64, generator=generator)).numpy() for _ in range(2)
    )
    return DualDataset(
        data.train,
        scores,
        pad_id=data.source.pad_id,
        bos_id=data.source.bos_id,
        dsl_lambda=dsl_lambda,
        warmup_epochs=warmup_epochs,
    )


def by_steps(model: Transformer | Seq2Seq, source: Tensor, target: Tensor) -> Tensor:
    """Return log p of one translation from the logits of all of it; both with EOS, target with BOS too."""
    S, T = len(source), len(target) - 1
    if isinstance(model, Transformer):
        lengths = torch.tensor([S]), torch.tensor([T])
        logits = model.logits(source[None], lengths[0], target[None, :-1], lengths[1])[0]
    else:
        memory, state = model.encode(source[:, None], [S])
        logits = (model.decode(memory, None, state, target[:, None]) @ model.output_weight.T)[:, 0]
    return logits.log_softmax(-1).gather(1, target[1:, None]).sum()


@pytest.mark.parametrize("length_norm", [False, True])
def test_gradients_are_those_of_the_two_written_losses(made, length_norm):
    batches = dataset(made)
    batch = batches[0]
    V, pairs = int(batch.there.source.max()) + 200, batch.there.sentences
    torch.manual_seed(0)
    sizes = dict.fromkeys(("source_vocab", "target_vocab"), V)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 8, "d_ff": 16, "heads": 2}
    model = DualTranslators(
        Transformer(TransformerConfig(**sizes, **layers, dropout=0.0)),
        Seq2Seq(Seq2SeqConfig(**sizes, embed_size=6, hidden_size=8, dropout=0.0)),
    ).double()
    found = pair_losses(model, batch, length_norm=length_norm)
    assert found.gap.shape == (pairs,)
    bos = torch.tensor([int(batch.there.target_in[0])])
    cu = batch.there.source_cu.tolist(), batch.there.target_cu.tolist()
    total = torch.zeros((), dtype=torch.float64)
    for b in range(pairs):
        x, y = (
            tokens[ends[b] : ends[b + 1]]
            for tokens, ends in ((batch.there.source, cu[0]), (batch.there.target_out, cu[1]))
        )
        a = by_steps(model.source_to_target, x, torch.cat((bos, y)))
        c = by_steps(model.target_to_source, y, torch.cat((bos, x)))
        lx, ly = batch.lm_source[b], batch.lm_target[b]
        n, m = (len(x), len(y)) if length_norm else (1, 1)
        forward = -a + 0.02 * ((lx / n + a / m) - (ly / m + c.detach() / n)) ** 2
        backward = -c + 0.02 * ((lx / n + a.detach() / m) - (ly / m + c / n)) ** 2
        torch.testing.assert_close(found.forward[b], forward, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.backward[b], backward, rtol=1e-9, atol=1e-9)
        total = total + forward + backward
    parameters = dict(model.named_parameters())
    both = (
        torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for loss in (total, (found.forward + found.backward).sum())
    )
    for name, expected, grad in zip(parameters, *both, strict=True):
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9, msg=name)


def test_agreement_counts_after_the_warm_up(made):
    batches = dataset(made, dsl_lambda=0.5, warmup_epochs=2)
    counts = []
    for epoch in range(4):
        batches.epoch = epoch
        counts.append(batches[0].dsl_lambda)
    assert counts == [0.0, 0.0, 0.5, 0.5]
    assert dataset(made, dsl_lambda=0.5)[0].dsl_lambda == 0.5


def test_scores_belong_to_their_sentences(made):
    batches = dataset(made)
    for number in range(len(batches)):
        batch, rows = batches[number], batches._batches.rows(number)
        for found, scores in zip((batch.lm_source, batch.lm_target), batches._scores, strict=True):
            assert found.tolist() == scores[rows].tolist()
    assert batches.source(0) == batches._batches.source(0)


@pytest.mark.parametrize("back", ["back", "back-rnn"])
def test_a_run_and_what_is_left_of_it(made, back, capsys):
    run = train_dual(options(made, backward=made[back]), settings())
    names = sorted(path.name for path in Path("run").iterdir())
    assert names == ["backward", "best", "forward", "last", "last.previous", "log.jsonl"]
    assert run.folders == (Path("run/forward"), Path("run/backward")) and run.state.step == 4
    assert run.figures.items() <= records()[-1].items()
    assert run.figures["score"] == (run.figures["bleu"] + run.figures["backward_bleu"]) / 2
    kept = read_weights(Path("run/best"))
    for folder, part in (("forward", "source_to_target"), ("backward", "target_to_source")):
        translator = Translator.from_folder(f"run/{folder}")
        assert len(translator.translate(["mit lu"], beam=2)) == 1
        for name, weight in translator.model.state_dict().items():
            assert torch.equal(weight, kept[f"{part}.{name}"]), name
    assert f"two translators of {run.parameters:,} parameters" in capsys.readouterr().err


def test_figures_are_those_of_the_validation_text(made):
    run = train_dual(options(made, choose_by="loss", dsl_warmup_epochs=0), settings(max_steps=1))
    sides = [Path(path).read_text().splitlines() for path in made["valid"]]
    there, back = (Translator.from_folder(f"run/{name}") for name in ("forward", "backward"))
    models = [GPT.from_pretrained(made[f"lm-{side}"]) for side in ("source", "target")]
    nll, counts, gaps = [0.0, 0.0], [0, 0], []
    for lines in zip(*sides, strict=True):
        x, y = (there.source.encode(line) for line in lines)
        bos, eos = there.source.bos_id, there.source.eos_id
        logs = []
        with torch.no_grad():
            for translator, s, t in ((there, x, y), (back, y, x)):
                logs.append(
                    float(by_steps(translator.model, torch.tensor([*s, eos]), torch.tensor([bos, *t, eos])))
                )
            for model, tokens in zip(models, (x, y), strict=True):
                log_p = model(torch.tensor([[bos, *tokens]]))[0][0].log_softmax(-1)
                logs.append(float(log_p.gather(1, torch.tensor([*tokens, eos])[:, None]).sum()))
        gaps.append((logs[2] + logs[0]) - (logs[3] + logs[1]))
        for side, tokens in enumerate((y, x)):
            nll[side] -= logs[side]
            counts[side] += len(tokens) + 1
    gaps = torch.tensor(gaps, dtype=torch.float64)
    figures = run.figures
    assert figures["val_loss"] == pytest.approx(nll[0] / counts[0], rel=1e-4)
    assert figures["backward_loss"] == pytest.approx(nll[1] / counts[1], rel=1e-4)
    assert figures["score"] == pytest.approx(-(figures["val_loss"] + figures["backward_loss"]) / 2)
    assert figures["gap"] == pytest.approx(float(gaps.abs().mean()), rel=1e-4)
    for share in (10, 50, 90):
        assert figures[f"gap_{share}"] == pytest.approx(float(gaps.quantile(share / 100)), rel=1e-3, abs=1e-3)


def test_the_best_has_the_highest_mean_of_both_bleu(made, monkeypatch):
    monkeypatch.setattr(dual._Validation, "_bleu", lambda *_: {"bleu": 10.0, "backward_bleu": 30.0})
    assert train_dual(options(made), settings(max_steps=1)).figures["score"] == 20.0


@pytest.mark.parametrize(
    "config", [{}, {"accumulation_steps": 2, "grad_norm_clip": 0.5, "optimizer": "adam"}]
)
def test_runs_are_resumed_to_the_bit_in_the_middle_of_an_epoch(made, config, monkeypatch):
    # an epoch has 4 batches; the third call is a step's
    given = {"dsl_warmup_epochs": 1, "backward": made["back-rnn"], "max_tokens": 600}
    config = {**config, "max_steps": 6, "eval_every": 4}
    whole = train_dual(options(made, output_dir="whole", **given), settings(**config), quiet=True)
    assert whole.state.epoch >= 1
    calls = []
    losses = dual.pair_losses

    def stop(model, batch, **rest):
        calls.append(batch)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return losses(model, batch, **rest)

    monkeypatch.setattr(dual, "pair_losses", stop)
    with pytest.raises(Terminated):
        train_dual(options(made, output_dir="parts", **given), settings(**config), quiet=True)
    parts = train_dual(
        options(made, output_dir="parts", **given),
        settings(**config),
        resume="parts",
        quiet=True,
    )
    assert parts.figures == whole.figures and parts.state.step == 6
    assert same("parts/last", "whole/last") and same("parts/best", "whole/best")


def test_agreement_makes_the_gap_smaller(made):
    gaps = {}
    for dsl_lambda in (0.0, 0.1):
        given = {"dsl_lambda": dsl_lambda, "dsl_warmup_epochs": 0, "output_dir": f"run-{dsl_lambda}"}
        run = train_dual(
            options(made, **given), settings(max_steps=30, eval_every=30, learning_rate=3e-3), quiet=True
        )
        gaps[dsl_lambda] = run.figures["gap"]
    assert gaps[0.1] < 0.7 * gaps[0.0]


def test_scores_are_computed_once(made, monkeypatch, tmp_path):
    train_dual(options(made), settings(max_steps=1), quiet=True)
    assert len(list((tmp_path / "cache" / "nlpfast").glob("*.scores"))) == 4

    def computed(*_):
        raise AssertionError("scores are computed again")

    monkeypatch.setattr(language_model_scores, "_computed", computed)
    train_dual(options(made, output_dir="other"), settings(max_steps=1), quiet=True)
    assert same("run/last", "other/last")


def test_two_translators_are_clipped_apart(made):
    torch.manual_seed(0)
    one, other = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    model = DualTranslators(one, other)
    assert model.clipped_apart == (one, other)
    groups = model.configure_optimizers(settings(weight_decay=0.5)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [len(group["params"]) for group in groups] == [2, 2]


@pytest.mark.parametrize("name", ["source", "forward", "backward", "lm_source", "lm_target"])
def test_all_that_is_needed_is_named(made, name):
    with pytest.raises(ConfigError, match=f"{name}=None: is missing"):
        options(made, **{name: None})


def test_models_of_other_vocabularies_are_refused(made, tmp_path):
    other = Subwords.train(["ab ba"] * 5, 50, source="text")
    GPT(GPTConfig(len(other), 64, n_layer=1, n_head=2, n_embd=16)).save_pretrained(tmp_path / "lm")
    other.save(tmp_path / "lm" / "vocab")
    with pytest.raises(DataError, match="lm: its vocabulary is not that of the forward translator"):
        train_dual(options(made, lm_target=str(tmp_path / "lm")), settings(), quiet=True)
    short = tmp_path / "short"
    size = GPT.from_pretrained(made["lm-source"]).config.vocab_size
    GPT(GPTConfig(size, 4, n_layer=1, n_head=2, n_embd=16)).save_pretrained(short)
    Subwords.from_folder(Path(made["lm-source"]) / "vocab").save(short / "vocab")
    with pytest.raises(DataError, match=r"short: .*block_size"):
        train_dual(options(made, lm_source=str(short)), settings(), quiet=True)


def test_another_language_model_is_not_that_of_the_run(made):
    train_dual(options(made), settings(max_steps=1), quiet=True)
    with pytest.raises(DataError, match="is not the text that the run was trained on"):
        train_dual(options(made, lm_source=made["lm-target"]), settings(), resume="run", quiet=True)


def test_changed_options_are_listed(made, capsys):
    train_dual(options(made), settings(max_steps=1), quiet=True)
    capsys.readouterr()
    train_dual(options(made, dsl_lambda=0.5), settings(max_steps=2), resume="run")
    assert "changed: dsl_lambda: 0.01 -> 0.5" in capsys.readouterr().err


def test_a_batch_is_a_tuple_of_tensors(made):
    batch = dataset(made)[0]
    assert isinstance(batch, DualBatch) and dual.count_pairs_of(batch) == batch.there.sentences == len(
        batch.lm_source
    )


def test_vocabularies_of_two_languages(made, tmp_path, monkeypatch):
    """Each side has its own pieces: what is turned round, scored, evaluated and written has them too."""
    sides = [Path(made[f"train.{side}"]) for side in ("source", "target")]
    pieces = [
        Subwords.train(side.read_text().splitlines(), size, source="t")
        for side, size in zip(sides, (90, 120), strict=True)
    ]
    folders = [str(tmp_path / name) for name in ("pieces-source", "pieces-target")]
    models = {}
    for vocabulary, folder in zip(pieces, folders, strict=True):
        vocabulary.save(folder)
    for name, way in (("forward", 1), ("backward", -1)):
        options_ = TranslationOptions(
            **SMALL,
            source=str(sides[::way][0]),
            target=str(sides[::way][1]),
            vocab=folders[::way][0],
            target_vocab=folders[::way][1],
            tied="decoder",
            output_dir=str(tmp_path / name),
            eval_sentences=2,
        )
        config = TranslationConfig(max_steps=1, device="cpu")
        models[name] = str(train_translation(options_, config, quiet=True).folder)
    for name, vocabulary in zip(("lm_source", "lm_target"), pieces, strict=True):
        GPT(GPTConfig(len(vocabulary), 64, n_layer=1, n_head=2, n_embd=16)).save_pretrained(tmp_path / name)
        vocabulary.save(tmp_path / name / "vocab")
        models[name] = str(tmp_path / name)
    evaluated, translator = [], dual.Translator.__init__
    monkeypatch.setattr(
        *(dual.Translator, "__init__"),
        lambda self, model, source, target, **rest: (
            evaluated.append([source.digest(), target.digest()]),
            translator(self, model, source, target, **rest),
        )[1],
    )
    run = train_dual(options(made, **models), settings(max_steps=1), quiet=True)
    digests = [side.digest() for side in pieces]
    assert evaluated[-2:] == [digests, digests[::-1]]
    for folder, wanted in zip(run.folders, (pieces, pieces[::-1]), strict=True):
        found = Translator.from_folder(folder)
        assert [found.source.digest(), found.target.digest()] == [side.digest() for side in wanted]
    swapped = {"forward": models["backward"], "backward": models["forward"]}
    for wrong in ({"backward": models["forward"]}, {"lm_source": models["lm_target"]}, swapped):
        with pytest.raises(DataError, match="its vocabulary is not that of the forward translator"):
            train_dual(options(made, output_dir="other", **{**models, **wrong}), settings(), quiet=True)


@pytest.mark.parametrize("given", [{"strategy": "fsdp"}, {"average": 2}])
def test_settings_of_one_whole_model_are_refused(made, given):
    with pytest.raises(ConfigError, match=f"{next(iter(given))}="):
        train_dual(options(made), settings(**given), quiet=True)
    assert not Path("run").exists()
