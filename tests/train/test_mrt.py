"""Minimum risk training: the gradient of the risk, samples that are cut off, runs and their resumption."""

import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nlpfast.cli import main
from nlpfast.data.translation_batches import IGNORED, make_batch
from nlpfast.hypotheses import Hypothesis
from nlpfast.models.seq2seq import Seq2Seq, Seq2SeqConfig
from nlpfast.models.sequence_log_probabilities import translation_log_probabilities
from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.models.translation_files import load_model
from nlpfast.models.translator import Translator
from nlpfast.sentence_rewards import REWARDS
from nlpfast.stop import Terminated
from nlpfast.train import mrt
from nlpfast.train.config import ConfigError
from nlpfast.train.mrt import (
    MinimumRisk,
    RewardedBatch,
    RewardedDataset,
    advantages,
    count_sentences_of,
    sample_batch,
    train_mrt,
)
from nlpfast.train.mrt_options import MrtConfig, MrtOptions
from nlpfast.train.translation import train_translation
from nlpfast.train.translation_data import read_translation_data, write_invented_pairs
from nlpfast.train.translation_options import TranslationConfig, TranslationOptions

SPECIAL = {"pad_id": 0, "bos_id": 1, "eos_id": 2}
EOS, V = 2, 6


def transformer(vocabulary: int = V) -> Transformer:
    sizes = dict.fromkeys(("encoder_layers", "decoder_layers"), 1)
    config = TransformerConfig(
        source_vocab=vocabulary, target_vocab=vocabulary, d_model=8, heads=2, d_ff=16, dropout=0.0, **sizes
    )
    return Transformer(config)


def rnn(vocabulary: int = V) -> Seq2Seq:
    sizes = {"embed_size": 6, "hidden_size": 8, "dropout": 0.0}
    return Seq2Seq(Seq2SeqConfig(source_vocab=vocabulary, target_vocab=vocabulary, **sizes))


KINDS = pytest.mark.parametrize("build", [transformer, rnn])


class Numbers:
    """A vocabulary whose words are the ids."""

    def decode(self, ids):
        return " ".join(map(str, ids))


def risk(model: nn.Module, **given) -> MinimumRisk:
    return MinimumRisk(model, Numbers(), MrtOptions(source="text", model="run", **given))


def batch_of(sources: list[list[int]], targets: list[list[int]]) -> RewardedBatch:
    return RewardedBatch(make_batch(sources, targets, **SPECIAL), [Numbers().decode(t) for t in targets])


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and any(grad.abs().max() > 1e-3 for grad in one.values())
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], rtol=1e-9, atol=1e-9, msg=name)


def with_graph(model: Transformer | Seq2Seq, source: list[int], found: Hypothesis) -> Tensor:
    """Return log p of a sample as the decoder gives it, token by token, with gradients; its end if drawn."""
    source_row, drawn = torch.tensor([[*source, EOS]]), [*found.tokens, *[EOS] * found.finished]
    terms = []
    for place, token in enumerate(drawn):
        before = torch.tensor([[1, *drawn[:place]]])
        if isinstance(model, Transformer):
            lengths = torch.tensor([source_row.shape[1]]), torch.tensor([place + 1])
            logits = model.logits(source_row, lengths[0], before, lengths[1])[0, -1]
        else:
            memory, state = model.encode(source_row.T, [source_row.shape[1]])
            whole = torch.cat((before, before[:, :1]), 1)
            logits = (model.decode(memory, None, state, whole.T) @ model.output_weight.T)[-1, 0]
        terms.append(logits.log_softmax(-1)[token])
    return torch.stack(terms).sum()


SOURCES, TARGETS = [[3, 4, 5], [4], [5, 5]], [[3, 4, 5], [4, 3], [5]]


@KINDS
@pytest.mark.parametrize(
    "given",
    [
        {"samples": 1, "baseline_samples": 2},
        {"samples": 3, "baseline_samples": 0, "reward": "gleu", "nll_weight": 0.3},
        {"samples": 2, "baseline_samples": 1, "reward": "chrf", "temperature": 2.0},
    ],
)
def test_the_gradient_is_that_of_samples_with_their_graph(build, given):
    torch.manual_seed(0)
    model = build().double()
    loss, batch = risk(model, max_len_a=0.0, max_len_b=3, **given), batch_of(SOURCES, TARGETS)
    state = torch.get_rng_state()
    found = loss(model, batch)
    torch.set_rng_state(state)
    drawn = loss.draw(batch.pairs)
    assert {sample.finished for row in drawn for sample in row} == {True, False}
    expected, rewards, nll = torch.zeros(()).double(), [], torch.zeros(()).double()
    for source, target, row in zip(SOURCES, TARGETS, drawn, strict=True):
        assert len(row) == given["samples"] + given["baseline_samples"]
        right = Numbers().decode(target)
        scores = [REWARDS[loss.options.reward](Numbers().decode(sample.tokens), right) for sample in row]
        rewards += scores
        for number in range(given["samples"]):
            others = scores[given["samples"] :] or [s for j, s in enumerate(scores) if j != number]
            advantage = scores[number] - sum(others) / len(others)
            expected = expected - advantage * with_graph(model, source, row[number]) / given["samples"]
        nll = nll - with_graph(model, source, Hypothesis(target, 0.0, 0.0, True))
    weight = given.get("nll_weight", 0.0)
    mean = sum(rewards) / len(rewards)
    assert found.item() == pytest.approx(1 - mean + weight * nll.item() / 3, rel=1e-9)
    equal(gradients(model, found), gradients(model, (expected + weight * nll) / 3))


def texts(longest: int) -> list[Hypothesis]:
    """Return all that can be written in so many tokens; the longest ones are cut off."""
    words = [token for token in range(V) if token != EOS]
    return [
        Hypothesis(list(text), 0.0, 0.0, len(text) < longest)
        for length in range(longest + 1)
        for text in itertools.product(words, repeat=length)
    ]


def expected_risk(model: nn.Module, source: list[int], reference: str, found: list[Hypothesis]) -> Tensor:
    log_p = torch.stack([with_graph(model, source, text) for text in found])
    assert log_p.exp().sum().item() == pytest.approx(1)
    rewards = [REWARDS["gleu"](Numbers().decode(text.tokens), reference) for text in found]
    return 1 - log_p.exp() @ torch.tensor(rewards, dtype=torch.float64)


@KINDS
def test_the_mean_over_all_samples_is_the_gradient_of_the_risk(build):
    """PAD and BOS are among the tokens here, so that probabilities add up to 1."""
    torch.manual_seed(1)
    model, source, target = build().double(), [3, 4], [4, 3]
    found, batch = texts(2), batch_of([source], [target])
    whole = expected_risk(model, source, batch.references[0], found)
    expected = gradients(model, whole)
    for others in ([], [Hypothesis([4], 0, 0, True)], [Hypothesis([4, 3], 0, 0, True), found[0]]):
        loss, total = risk(model, reward="gleu", baseline_samples=len(others)), torch.zeros(()).double()
        for text in found:
            loss.draw = lambda _, text=text: [[text, *others]]  # noqa: B023
            probability = with_graph(model, source, text).exp().detach()
            total = total + probability * loss(model, batch)
        equal(gradients(model, total), expected)
        if not others:
            assert total.item() == pytest.approx(whole.item())


def test_samples_that_expect_what_the_others_got_have_the_gradient_of_the_risk():
    torch.manual_seed(2)
    model, source, target = transformer().double(), [3, 4], [4]
    found, batch = texts(1), batch_of([source], [target])
    expected = gradients(model, expected_risk(model, source, batch.references[0], found))
    loss, total = risk(model, reward="gleu", samples=2, baseline_samples=0), torch.zeros(()).double()
    for pair in itertools.product(found, repeat=2):
        loss.draw = lambda _, pair=pair: [list(pair)]
        probability = sum(with_graph(model, source, text) for text in pair).exp().detach()
        total = total + probability * loss(model, batch)
    equal(gradients(model, total), expected)


def test_advantages():
    rewards = torch.tensor([[0.5, 0.1, 0.3, 0.9], [1.0, 0.0, 0.0, 0.0]]).double()
    for samples, expected in (
        (1, [[0.5 - 1.3 / 3], [1.0]]),
        (2, [[-0.1, -0.5], [1.0, 0.0]]),
        (4, [[0.5 - 1.3 / 3, 0.1 - 1.7 / 3, 0.3 - 0.5, 0.9 - 0.3], [1.0, *[-1 / 3] * 3]]),
    ):
        torch.testing.assert_close(advantages(rewards, samples), torch.tensor(expected).double())
    assert advantages(rewards[:, :1], 1).tolist() == [[0.5], [1.0]]


@KINDS
def test_samples_have_the_probabilities_by_which_they_were_drawn(build):
    """Finished, cut off, and empty ones, of sentences with limits of their own."""
    torch.manual_seed(3)
    model = build()
    loss = risk(model, samples=12, baseline_samples=0, max_len_a=0.5, max_len_b=1)
    drawn = loss.draw(batch_of(SOURCES, TARGETS).pairs)
    assert {len(sample.tokens) for row in drawn for sample in row if not sample.finished} == {2, 3}
    chosen = [sample for row in drawn for sample in row]
    batch = sample_batch([s for s in SOURCES for _ in range(12)], chosen, model.config)
    found = translation_log_probabilities(model, batch)
    expected = torch.tensor([sample.log_probability for sample in chosen])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_end_of_a_sample_that_was_cut_off_does_not_count():
    chosen = [Hypothesis([3, 4], 0, 0, False), Hypothesis([], 0, 0, True), Hypothesis([5], 0, 0, False)]
    batch = sample_batch([[3], [4], [5]], chosen, transformer().config)
    assert batch.target_out[:6].tolist() == [3, 4, IGNORED, EOS, 5, IGNORED]
    assert batch.target_in[:6].tolist() == [1, 3, 4, 1, 1, 5]
    assert batch.source[:6].tolist() == [3, EOS, 4, EOS, 5, EOS]


def test_samples_are_drawn_from_the_model_itself():
    """Several processes share it in a wrapper, which has no decoder; the gradient goes through that."""

    class Shared(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, []

        def forward(self, *given, **named):
            self.calls.append(torch.is_grad_enabled() and self.module.training)
            return self.module(*given, **named)

    torch.manual_seed(4)
    shared = Shared(transformer()).train()
    found = risk(shared.module)(shared, batch_of(SOURCES, TARGETS))
    assert shared.calls == [True] and found.requires_grad and shared.module.training


def test_a_low_temperature_draws_the_most_probable():
    torch.manual_seed(6)
    model, pairs = transformer(), batch_of(SOURCES, TARGETS).pairs
    given = {"samples": 9, "max_len_a": 0.0, "max_len_b": 3}
    kinds = [
        [{tuple(sample.tokens) for sample in row} for row in risk(model, temperature=t, **given).draw(pairs)]
        for t in (1e-9, 1.0)
    ]
    assert all(len(row) == 1 for row in kinds[0]) and all(len(row) > 1 for row in kinds[1])


@pytest.mark.parametrize(("build", "learning_rate"), [(transformer, 0.01), (rnn, 0.03)])
def test_rewards_rise(build, learning_rate):
    """From a model that knows nothing to one that copies most sentences, by rewards alone."""
    torch.manual_seed(0)
    model, copied = build(), [[3], [4], [5], [3, 3], [4, 4], [5, 5]]
    batch = batch_of(copied, copied)
    loss = risk(model, reward="gleu", samples=8, baseline_samples=0, max_len_a=0.0, max_len_b=3)
    optimizer, risks = torch.optim.Adam(model.parameters(), lr=learning_rate), []
    for _ in range(100):
        optimizer.zero_grad()
        found = loss(model, batch)
        found.backward()
        optimizer.step()
        risks.append(found.item())
    assert sum(risks[:10]) / 10 > 0.8 and sum(risks[-10:]) / 10 < 0.65


SMALL = {
    **{"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "d_ff": 64, "heads": 2},
    **{"embed_size": 24, "hidden_size": 32, "max_tokens": 300, "max_length": 64, "vocab_size": 300},
}
TEXT = {"source": "text/train.source", "target": "text/train.target"}
VALID = ("text/valid.source", "text/valid.target")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Return a folder with text and a run of each kind, trained a little."""
    folder = tmp_path_factory.mktemp("mrt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_invented_pairs("text", 100, 0)
        for model in ("transformer", "rnn"):
            given = {**SMALL, **TEXT, "valid": VALID, "eval_sentences": 10, "model": model, "dropout": 0.3}
            given["separate"] = model == "rnn"
            config = TranslationConfig(max_steps=40, eval_every=40, device="cpu", learning_rate=0.02)
            train_translation(TranslationOptions(output_dir=model, **given), config, quiet=True)
    return folder


@pytest.fixture
def here(folder, tmp_path, monkeypatch) -> Path:
    for name in ("text", "transformer", "rnn"):
        (tmp_path / name).symlink_to(folder / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def options(**given) -> MrtOptions:
    small = {"max_tokens": 300, "max_length": 64, "eval_sentences": 10, "max_len_a": 0.0, "max_len_b": 15}
    return MrtOptions(
        **{**TEXT, "valid": VALID, "model": "transformer", "output_dir": "run", **small, **given}
    )


def settings(**given) -> MrtConfig:
    return MrtConfig(**{"max_steps": 4, "eval_every": 2, "device": "cpu", "warmup_steps": 1, **given})


def same(one: str, other: str) -> bool:
    a, b = (load_model(folder).state_dict() for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("model", ["transformer", "rnn"])
def test_a_run_and_what_is_left_of_it(model, here, capsys):
    run = train_mrt(options(model=model, reward="chrf"), settings(log_every=1))
    names = sorted(path.name for path in Path("run").iterdir())
    assert names == ["best", "last", "last.previous", "log.jsonl", "model", "vocab"]
    assert run.folder == Path("run/model") and run.state.step == 4
    before, after = (Translator.from_folder(folder) for folder in (model, "run"))
    assert after.source.digest() == before.source.digest() and same("run/model", "run/best")
    assert after.target.digest() == before.target.digest()
    assert not same("run/model", f"{model}/model") and after.model.config == before.model.config
    records = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()][1:]
    assert all(0 < record["loss"] < 1 for record in records)
    assert run.figures.items() <= records[-1].items() and records[-1]["score"] == records[-1]["bleu"]
    assert f"{model} of {run.parameters:,} parameters; 4 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "config"),
    [
        ({}, {}),
        ({"model": "rnn", "samples": 2, "baseline_samples": 0, "nll_weight": 0.1}, {}),
        (
            {"reward": "chrf", "temperature": 0.7},
            {"accumulation_steps": 2, "average": 2, "dtype": "bfloat16"},
        ),
    ],
)
def test_runs_are_resumed_to_the_bit(given, config, here, monkeypatch):
    whole = train_mrt(options(output_dir="whole", **given), settings(**config), quiet=True)
    calls, loss = [], MinimumRisk.__call__

    def stop(self, model, batch):
        calls.append(batch)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss(self, model, batch)

    monkeypatch.setattr(MinimumRisk, "__call__", stop)
    with pytest.raises(Terminated):
        train_mrt(options(output_dir="parts", **given), settings(**config), quiet=True)
    parts = train_mrt(options(output_dir="parts", **given), settings(**config), resume="parts", quiet=True)
    assert parts.state.step == 4 and parts.figures == whole.figures
    assert same("parts/last", "whole/last") and same("parts/model", "whole/model")


def test_what_a_trainer_is_made_of(here, monkeypatch):
    made, seeded = [], []
    # samples, too, differ between processes
    monkeypatch.setattr(mrt, "own_dropout", seeded.append)
    trainer, _ = mrt._prepared(options(), settings(), True, made)
    data, loss = made[0], trainer.steps.loss_fn
    assert seeded == [trainer] and trainer.steps.width == 32
    assert trainer.model is loss.model and type(trainer.optimizer) is torch.optim.Adam
    rates = {module.p for module in trainer.model.modules() if isinstance(module, nn.Dropout)}
    assert rates == {0.0} and trainer.model.config.dropout == 0.3
    batches = trainer.feed.dataset
    assert isinstance(batches, RewardedDataset) and len(batches) == len(data.train) > 1
    assert trainer.metadata["options"] == dataclasses.asdict(options())
    assert trainer.count_fn(batches[0]) == count_sentences_of(batches[0]) == batches[0].pairs.sentences > 1
    assert batches.source(0) == data.train.source(0)
    # no smoothing in the loss of evaluations
    found = trainer.evaluation.score_fn(trainer.model, lambda: None)
    assert found["smoothed_loss"] == found["val_loss"] and found["score"] == found["bleu"]
    sizes = settings(max_steps=None, max_epochs=8, eval_every=None, warmup_steps=None, accumulation_steps=2)
    others = options(model="rnn", max_ratio=1.5, eval_beam=3, output_dir="other")
    trainer, _ = mrt._prepared(others, sizes, True, made)
    assert trainer.config.eval_every == -(-len(trainer.feed.dataset) // 2)
    validation = trainer.evaluation.score_fn
    assert validation.options.eval_beam == 3 and validation.options.choose_by == "bleu"
    assert "more than 1.5 times as long on one side" in made[1].train.pairs.report.skipped
    loss = trainer.steps.loss_fn
    assert trainer.steps.width == 32
    assert loss.options is others and loss.vocabulary is made[1].target is not made[1].source


def test_references_are_the_lines_of_the_text(here):
    lines = {name: Path(path).read_text().splitlines() for name, path in TEXT.items()}
    for name in lines:
        # what is skipped, or has unknown characters, moves no other line
        lines[name][1:1] = ["", "mit  \u2603 lu", "mit " * 70]
        Path(f"own.{name}").write_text("".join(f"{line}\n" for line in lines[name]))
    given = options(source="own.source", target="own.target")
    translator = Translator.from_folder("transformer")
    data = read_translation_data(
        given.of_translation("transformer"), 0, vocabularies=(translator.source, translator.target)
    )
    batches, seen = RewardedDataset(data.train), []
    for number in range(len(batches)):
        batch = batches[number]
        flat, ends = batch.pairs.source.tolist(), batch.pairs.source_cu.tolist()
        for row, reference in enumerate(batch.references):
            tokens = flat[ends[row] : ends[row + 1] - 1]
            line = lines["target"].index(reference)
            assert translator.source.encode(lines["source"][line]) == tokens
            seen.append(line)
    assert len(seen) == 101 and 2 in seen and not {1, 3} & set(seen)


def test_options_that_do_not_fit(here):
    with pytest.raises(ConfigError, match="a sample of 1116 subwords is possible"):
        train_mrt(options(max_len_a=16.7, max_len_b=48), settings(), quiet=True)
    assert math.floor(15.0 * 64) + 63 == 1023
    mrt._check_longest(options(max_len_a=15.0, max_len_b=63), load_model("transformer/model"))
    with pytest.raises(ConfigError, match="max_len_b=64"):
        mrt._check_longest(options(max_len_a=15.0, max_len_b=64), load_model("transformer/model"))
    mrt._check_longest(options(max_len_a=15.0, max_len_b=64), load_model("rnn/model"))
    with pytest.raises(ConfigError, match="use ddp"):
        train_mrt(options(), settings(strategy="fsdp"), quiet=True)
    for name in ("source", "model"):
        with pytest.raises(ConfigError, match=f"{name}=None: is missing, name it"):
            options(**{name: None})
    assert not Path("run").exists()


def test_the_command_line(here, capsys):
    words = "--max-tokens 300 --max-length 64 --max-len-b 9 --max-len-a 0 --eval-sentences 5 --device cpu"
    assert main(["train", "mrt", *TEXT.values(), "--model", "rnn", "--max-steps", "1", *words.split()]) == 0
    out = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert out["model"] == "runs/mrt/model" and out["steps"] == "1" and "bleu" in out
    assert main(["train", "mrt", "--resume", "runs/mrt", "--max-steps", "2"]) == 0
    captured = capsys.readouterr()
    assert "steps            2" in captured.out and "changed: max_steps: 1 -> 2" in captured.err
