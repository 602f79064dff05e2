"""One optimizer step: exact accumulation, clipping after unscaling, and bad numbers stop before it."""

import json
import math

import pytest
import torch
from torch import nn
from toys import VOCABULARY, Bigram, Sentences, config, small_gpt, train

from nlpfast.models.bert import BertConfig, BertForPreTraining
from nlpfast.optim import Adamax
from nlpfast.train import checkpoint
from nlpfast.train.config import ConfigError
from nlpfast.train.trainer import Trainer, TrainingError


@pytest.mark.parametrize("steps", [1, 3])
def test_accumulation_equals_one_big_batch_with_unequal_token_counts(steps, tmp_path):
    data = Sentences(48)
    big = train(Bigram(), data, config(batch_size=12, max_steps=steps), output_dir=tmp_path / "big")
    settings = config(batch_size=4, accumulation_steps=3, max_steps=steps)
    small = train(Bigram(), data, settings, output_dir=tmp_path / "small")
    assert len({data.counts[part].sum().item() for part in list(small.feed.order)[:3]}) > 1, (
        "counts must differ"
    )
    torch.testing.assert_close(small.model.table, big.model.table, rtol=1e-12, atol=1e-14)
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("big", "small")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert small.state.tokens == big.state.tokens


def test_the_gradient_of_the_short_last_batch_is_not_diluted():
    data = Sentences(5)
    trainer = train(Bigram(), data, config(batch_size=4, accumulation_steps=4, grad_norm_clip=None))
    model = Bigram()
    model(*torch.utils.data.default_collate([data[i] for i in range(5)]))[1].backward()
    expected = Bigram().table - 0.5 * model.table.grad
    torch.testing.assert_close(trainer.model.table.detach(), expected.detach(), rtol=1e-12, atol=1e-14)


def test_batches_without_counted_targets_are_left_out_and_counted():
    empty = train(Bigram(), Sentences(8, empty=(1, 4, 6)), config(batch_size=1, max_steps=None, max_epochs=1))
    assert empty.state.empty_batches == 3
    assert empty.state.step == 5
    assert bool(empty.model.table.isfinite().all())
    with pytest.raises(TrainingError, match="no target counts"):
        train(Bigram(), Sentences(3, empty=(0, 1, 2)), config(max_steps=5))


class RecordingScaler:
    """Behaves like a loss scaler of 2**10 and writes down the order of calls."""

    factor = 1024.0

    def __init__(self, calls):
        self.calls = calls

    def is_enabled(self):
        return True

    def scale(self, loss):
        self.calls.append("scale")
        return loss * self.factor

    def unscale_(self, optimizer):
        self.calls.append("unscale")
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad /= self.factor

    def step(self, optimizer):
        self.calls.append("step")
        optimizer.step()

    def update(self):
        self.calls.append("update")

    def state_dict(self):
        return {}


def test_clipping_comes_after_unscaling(monkeypatch):
    calls = []
    clip = nn.utils.clip_grads_with_norm_

    def recording_clip(*args, **kwargs):
        calls.append("clip")
        return clip(*args, **kwargs)

    monkeypatch.setattr(nn.utils, "clip_grads_with_norm_", recording_clip)
    trainer = Trainer(Bigram(), Sentences(8), config(grad_norm_clip=0.01, accumulation_steps=2), quiet=True)
    trainer.steps.scaler = RecordingScaler(calls)
    trainer.run()
    assert calls == ["scale", "scale", "unscale", "clip", "step", "update"]
    # the gradient's norm is the limit; clipped before unscaling it would be 1/1024 of it
    change = (trainer.model.table - Bigram().table).detach().norm()
    assert float(change) == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_float16_skips_steps_that_overflow_and_says_so():
    def huge(model, batch):
        return model.table.sum() * 1e10

    settings = config(dtype="float16", max_steps=12, learning_rate=1e-12, grad_norm_clip=None)
    trainer = Trainer(Bigram(torch.float32), Sentences(8), settings, loss_fn=huge, quiet=True)
    # so large that only the scaled gradient overflows, and a few halvings help
    trainer.steps.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    trainer.run()
    assert 0 < trainer.state.skipped_steps < 12
    assert bool(trainer.model.table.isfinite().all())


def test_float16_gives_up_when_every_step_overflows(monkeypatch):
    monkeypatch.setattr("nlpfast.train.step.MOST_SKIPPED_IN_A_ROW", 3)

    def infinite_gradient(model, batch):
        return (model.table * 0).sum().sqrt()

    settings = config(dtype="float16", max_steps=12)
    with pytest.raises(TrainingError, match=r"step 4: gradients overflow float16 in 4 steps in a row"):
        Trainer(Bigram(), Sentences(8), settings, loss_fn=infinite_gradient, quiet=True).run()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_step(value, tmp_path):
    def loss(model, batch):
        loss.calls += 1
        return model(*batch)[1] * (value if loss.calls == 3 else 1.0)

    loss.calls = 0
    trainer = Trainer(
        Bigram(),
        Sentences(16),
        config(max_steps=9, eval_every=2),
        loss_fn=loss,
        output_dir=tmp_path,
        quiet=True,
    )
    with pytest.raises(TrainingError, match=f"step 3: the loss is {value}.*lower learning_rate") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert trainer.state.step == 2
    model = Bigram()
    assert checkpoint.load(tmp_path / "last", model).state["step"] == 2
    assert torch.equal(model.table, trainer.model.table), "the weights are those of step 2"


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    def loss(model, batch):
        return (model.table * 0).sum().sqrt()

    trainer = Trainer(Bigram(), Sentences(8), config(), loss_fn=loss, quiet=True)
    with pytest.raises(TrainingError, match="step 1: the gradient norm is nan"):
        trainer.run()
    assert torch.equal(trainer.model.table, Bigram().table)


def test_autocast_is_on_in_forward_only_with_a_low_precision():
    seen = []

    def loss(model, batch):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return model(*batch)[1]

    for dtype in ("float32", "bfloat16"):
        train(Bigram(), Sentences(4), config(dtype=dtype), loss_fn=loss)
    assert seen == [False, torch.bfloat16]


def test_gradients_of_earlier_steps_are_forgotten():
    data = Sentences(8)
    trainer = train(Bigram(), data, config(max_steps=2, grad_norm_clip=None))
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for part in trainer.feed.order:
        model.table.grad = None
        model(*torch.utils.data.default_collate([data[i] for i in part]))[1].backward()
        optimizer.step()
    torch.testing.assert_close(trainer.model.table, model.table, rtol=1e-12, atol=1e-14)


def test_overflow_now_and_then_is_no_reason_to_give_up(monkeypatch):
    monkeypatch.setattr("nlpfast.train.step.MOST_SKIPPED_IN_A_ROW", 2)

    def loss(model, batch):
        loss.calls += 1
        overflowing = (model.table * 0).sum().sqrt()
        return model(*batch)[1] if loss.calls % 3 == 0 else overflowing

    loss.calls = 0
    settings = config(dtype="float16", max_steps=9)
    trainer = train(Bigram(torch.float32), Sentences(36), settings, loss_fn=loss)
    assert trainer.state.skipped_steps == 6


def test_the_schedule_can_count_examples_with_their_padding():
    """As minGPT does: 3 examples of 8 positions a step, whatever the number of targets that count."""
    data = Sentences(6, empty=(1,))
    settings = {"schedule": "cosine", "warmup_tokens": 24, "final_tokens": 24 * 9, "sampling": "sequential"}
    trainer = train(Bigram(), data, config(**settings, max_steps=4, batch_size=3), schedule_tokens=8)
    assert trainer.state.tokens == 4 * 3 * 8
    expected = 0.5 * 0.5 * (1 + math.cos(math.pi * (96 - 24) / (216 - 24)))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(expected)


def rates(folder):
    return [json.loads(line)["lr"] for line in (folder / "log.jsonl").read_text().splitlines()]


# rates of 8 steps with a peak of 0.5, or that factor, and a warm-up of 4 steps
IN_STEPS = {
    "cosine": [0.125, 0.25, 0.375, *(0.25 * (1 + math.cos(math.pi * k / 4)) for k in range(4)), 0.05],
    "constant": [0.125, 0.25, 0.375, 0.5, 0.5, 0.5, 0.5, 0.5],
    "inverse_sqrt": [0.125, 0.25, 0.375, *(0.5 * math.sqrt(4 / step) for step in range(4, 9))],
    "noam": [*(0.5 * 0.25 * step / 8 for step in (1, 2, 3)), *(0.125 / math.sqrt(n) for n in range(4, 9))],
}


@pytest.mark.parametrize("schedule", IN_STEPS)
def test_schedules_can_count_steps(schedule, tmp_path):
    """However many targets count in them."""
    settings = config(schedule=schedule, warmup_steps=4, warmup_tokens=None, max_steps=8, log_every=1)
    train(Bigram(), Sentences(40), settings, output_dir=tmp_path, width=16)
    assert rates(tmp_path) == pytest.approx(IN_STEPS[schedule], rel=1e-12)


def test_the_inverse_square_root_can_count_tokens(tmp_path):
    data = Sentences(40)
    settings = config(schedule="inverse_sqrt", warmup_tokens=60, max_steps=8, log_every=1)
    trainer = train(Bigram(), data, settings, output_dir=tmp_path)
    tokens = (
        torch.tensor([int(data.counts[part].sum()) for part in trainer.feed.order][:8]).cumsum(0).tolist()
    )
    assert tokens[0] < 60 < tokens[-1]
    expected = [0.5 * (n / 60 if n < 60 else math.sqrt(60 / n)) for n in tokens]
    assert rates(tmp_path) == pytest.approx(expected, rel=1e-12)


def test_noam_has_4000_steps_of_warmup_and_others_a_twentieth_of_the_run():
    settings = config(schedule="noam", warmup_tokens=None, max_steps=2)
    trainer = train(Bigram(), Sentences(40), settings, width=16)
    assert trainer.state.warmup_end == 4000
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 0.25 * 2 * 4000**-1.5, rel=1e-12)
    settings = config(schedule="inverse_sqrt", warmup_tokens=None, max_steps=10)
    trainer = train(Bigram(), Sentences(40), settings)
    assert trainer.state.warmup_end == round(0.05 * trainer.state.schedule_end) > 1


def test_noam_without_a_width_is_refused():
    with pytest.raises(ConfigError, match="schedule='noam': it needs the width of the model, pass width="):
        Trainer(Bigram(), Sentences(4), config(schedule="noam", warmup_tokens=None), quiet=True)


KINDS = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "adamax": Adamax, "sgd": torch.optim.SGD}


@pytest.mark.parametrize("name", KINDS)
def test_models_are_trained_by_the_optimizer_of_that_name(name):
    settings = config(optimizer=name, betas=(0.7, 0.8), weight_decay=0.25)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    bert = BertForPreTraining(BertConfig(vocab_size=VOCABULARY, **sizes))
    own = nn.Sequential(nn.Embedding(4, 4), nn.Linear(4, 4), nn.LayerNorm(4))
    for model in (small_gpt(), bert, own):
        optimizer = Trainer(model, Sentences(4), settings, quiet=True).optimizer
        assert type(optimizer) is KINDS[name]
        decayed, kept = optimizer.param_groups
        assert (decayed["weight_decay"], kept["weight_decay"]) == (0.25, 0.0)
        assert decayed["lr"] == kept["lr"] == 0.5
        assert name == "sgd" or decayed["betas"] == kept["betas"] == (0.7, 0.8)
        assert sum(len(group["params"]) for group in (decayed, kept)) == len(list(model.parameters()))
    assert [id(parameter) for parameter in decayed["params"]] == [id(own[1].weight)]
