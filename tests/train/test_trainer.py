"""The whole run: its length, its learning rate, evaluation, log and checkpoints, and the loss going down."""

import json
import math
import signal

import pytest
import torch
from toys import VOCABULARY, Bigram, Counting, Sentences, config, small_gpt, train

from nlpfast.models.gpt import GPT
from nlpfast.stop import Terminated
from nlpfast.train import checkpoint
from nlpfast.train.trainer import Trainer, TrainingError


def test_a_validation_loss_that_is_not_finite_stops_the_run():
    trainer = Trainer(Bigram(), Sentences(8), config(), validation=Sentences(2, empty=(0, 1)), quiet=True)
    with pytest.raises(TrainingError, match="validation loss is nan over 0 tokens"):
        trainer.run()


def test_evaluation_is_the_mean_over_tokens_in_evaluation_mode():
    data = Sentences(11)
    seen = []

    def loss(model, batch):
        seen.append(model.training)
        return model(*batch)[1]

    trainer = Trainer(Bigram(), data, config(eval_batch_size=3), validation=data, loss_fn=loss, quiet=True)
    idx, targets = torch.utils.data.default_collate([data[i] for i in range(11)])
    expected = Bigram()(idx, targets)[1].item()
    assert trainer.evaluate() == pytest.approx(expected, rel=1e-12)
    assert seen == [False] * 4
    assert trainer.model.training
    trainer.config.eval_batches = 2
    assert trainer.evaluate() == pytest.approx(Bigram()(idx[:6], targets[:6])[1].item(), rel=1e-12)


def test_learning_rate_follows_the_tokens_that_count(tmp_path):
    data = Sentences(40)
    settings = config(max_steps=10, schedule="cosine", warmup_tokens=60, final_tokens=150, log_every=1)
    trainer = train(Bigram(), data, settings, output_dir=tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    tokens, rates = 0, []
    for part in trainer.feed.order:
        tokens += int(data.counts[part].sum())
        progress = min(1.0, (tokens - 60) / 90)
        factor = tokens / 60 if tokens < 60 else max(0.1, 0.5 * (1 + math.cos(math.pi * progress)))
        rates.append(0.5 * factor)
    assert [record["tokens"] for record in records][-1] == tokens == trainer.state.tokens
    assert [record["lr"] for record in records] == pytest.approx(rates)
    assert tokens > 150, "the end of the schedule is part of the test"


def test_tokens_of_warmup_and_end_are_planned_from_the_first_step():
    trainer = train(Bigram(), Counting(), config(max_steps=10, warmup_tokens=None, schedule="cosine"))
    assert trainer.state.schedule_end == 10 * 4 * 8
    assert trainer.state.warmup_end == 16


@pytest.mark.parametrize(
    ("values", "steps", "epochs"),
    [
        ({"max_steps": None, "max_epochs": 2}, 6, 2),
        ({"max_steps": None, "max_epochs": 2, "accumulation_steps": 2}, 4, 2),
        ({"max_steps": 4, "max_epochs": 2}, 4, 1),
        ({"max_steps": 7}, 7, 2),
    ],
)
def test_length_of_a_run(values, steps, epochs):
    trainer = train(Bigram(), Sentences(10), config(**values))
    assert trainer.state.step == trainer.total_steps() == steps
    assert trainer.state.epoch == epochs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_the_loss_of_a_gpt_goes_down_in_every_precision(dtype):
    settings = config(max_steps=60, batch_size=8, learning_rate=1e-2, dtype=dtype, schedule="cosine")
    trainer = Trainer(small_gpt(), Counting(), settings, validation=Counting(), quiet=True)
    before = trainer.evaluate()
    assert before == pytest.approx(math.log(VOCABULARY), abs=0.1)
    trainer.run()
    assert trainer.state.val_loss < 0.2 * before
    assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())


def test_same_seed_same_weights_and_no_touch_of_the_global_generator():
    before = torch.get_rng_state()
    first, second, other = (train(Bigram(), Sentences(40), config(max_steps=3, seed=s)) for s in (1, 1, 2))
    assert torch.equal(first.model.table, second.model.table)
    assert not torch.equal(first.model.table, other.model.table)
    assert torch.equal(before, torch.get_rng_state())


def test_workers_see_the_same_batches():
    here = train(Bigram(), Sentences(40), config(max_steps=4))
    there = train(Bigram(), Sentences(40), config(max_steps=4, num_workers=1))
    assert torch.equal(here.model.table, there.model.table)


def test_log_and_checkpoints_of_a_run(tmp_path, capsys):
    settings = config(max_steps=7, eval_every=3, log_every=2, learning_rate=1e-2, schedule="cosine")
    trainer = Trainer(
        small_gpt(),
        Counting(),
        settings,
        validation=Counting(),
        output_dir=tmp_path / "run",
        metadata={"vocabulary": list("abcdefg")},
    )
    state = trainer.run()
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2, 3, 4, 6, 7]
    assert [record["step"] for record in records if "val_loss" in record] == [3, 6, 7]
    for record in records:
        assert {"step", "epoch", "loss", "lr", "tokens", "time", "grad_norm"} <= record.keys()
        assert record["tokens"] == record["step"] * 4 * 8
    assert records[-1]["val_loss"] == state.val_loss
    best = min(record["val_loss"] for record in records if "val_loss" in record)
    assert state.best_loss == best
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "best",
        "last",
        "last.previous",
        "log.jsonl",
    ]
    saved = checkpoint.load(tmp_path / "run" / "last")
    assert saved.state["step"] == 7
    assert saved.metadata["vocabulary"] == list("abcdefg")
    # the checkpoint is also a saved model
    again = GPT.from_pretrained(tmp_path / "run" / "last")
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, trainer.model.state_dict()[name])
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == len(records)
    assert "step         3/7" in lines[2]
    assert "val" in lines[2]


def test_best_stays_when_the_validation_loss_rises(tmp_path):
    # the rate is so high that later steps are worse
    settings = config(max_steps=6, eval_every=1, learning_rate=60.0, grad_norm_clip=None)
    trainer = train(Bigram(), Sentences(8), settings, validation=Sentences(30), output_dir=tmp_path)
    losses = [json.loads(line)["val_loss"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert losses[-1] > min(losses), "the case must have a rising loss"
    saved = checkpoint.load(tmp_path / "best", model := Bigram())
    assert saved.state["step"] == losses.index(min(losses)) + 1
    trainer.model = model
    assert trainer.evaluate() == min(losses)
    assert checkpoint.load(tmp_path / "last").state["step"] == 6


def test_the_score_decides_which_checkpoint_is_the_best(tmp_path, capsys):
    scores, modes = [0.25, 0.5, 0.5, -1.0], []

    def score(model, pause):
        pause()
        modes.append((model.training, torch.is_grad_enabled()))
        torch.rand(3)
        return {"accuracy": 7.0, "score": scores[len(modes) - 1]}

    settings = config(max_steps=4, eval_every=1)
    trainer = Trainer(
        *(Bigram(), Sentences(40), settings),
        validation=Sentences(30),
        score_fn=score,
        output_dir=tmp_path,
    )
    before = torch.get_rng_state()
    state = trainer.run()
    assert torch.equal(before, torch.get_rng_state())
    assert modes == [(False, False)] * 4 and trainer.model.training
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [record["score"] for record in records] == scores
    assert [record["best"] for record in records] == [True, True, False, False]
    assert all(record["accuracy"] == 7.0 and "val_loss" in record for record in records)
    assert state.best_score == 0.5 and state.best_loss == min(record["val_loss"] for record in records)
    assert checkpoint.load(tmp_path / "best").state["step"] == 2
    assert checkpoint.load(tmp_path / "last").state["best_score"] == 0.5
    assert "score 0.5000 (best)" in capsys.readouterr().err.splitlines()[1]


def test_a_run_that_goes_on_knows_its_best_score(tmp_path):
    def trainer(steps, score):
        arguments = {"score_fn": lambda *_: {"score": score}, "output_dir": tmp_path, "quiet": True}
        return Trainer(Bigram(), Sentences(40), config(max_steps=steps, eval_every=2), **arguments)

    trainer(2, 0.5).run()
    later = trainer(4, 0.4)
    later.resume(tmp_path)
    assert later.run().best_score == 0.5
    assert checkpoint.load(tmp_path / "best").state["step"] == 2


def test_figures_without_a_score_leave_the_choice_to_the_loss(tmp_path):
    settings = config(max_steps=3, eval_every=1, learning_rate=60.0, grad_norm_clip=None)
    trainer = train(
        *(Bigram(), Sentences(8), settings),
        validation=Sentences(30),
        score_fn=lambda model, pause: {"accuracy": 1.0},
        output_dir=tmp_path,
    )
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [record["val_loss"] for record in records]
    assert checkpoint.load(tmp_path / "best").state["step"] == losses.index(min(losses)) + 1
    assert trainer.state.best_score is None and {record["accuracy"] for record in records} == {1.0}


def test_a_run_can_be_stopped_between_the_batches_of_its_score(tmp_path):
    def score(model, pause):
        signal.raise_signal(signal.SIGTERM)
        pause()
        raise AssertionError("the run goes on")

    trainer = Trainer(
        Bigram(),
        Sentences(8),
        config(max_steps=4, eval_every=2),
        score_fn=score,
        output_dir=tmp_path,
        quiet=True,
    )
    with pytest.raises(Terminated):
        trainer.run()
    saved = checkpoint.load(tmp_path / "last").state
    assert saved["step"] == 2 and saved["due"]
    again = Trainer(
        *(Bigram(), Sentences(8), config(max_steps=4, eval_every=2)),
        score_fn=lambda model, pause: {"score": 1.0},
        output_dir=tmp_path,
        quiet=True,
    )
    again.resume(tmp_path)
    assert again.run().step == 4 and again.state.best_score == 1.0


def test_every_epoch_has_an_order_of_its_own():
    seen = []

    def loss(model, batch):
        seen.append(batch[0].flatten().tolist())
        return model(*batch)[1]

    train(Bigram(), Sentences(12), config(max_steps=None, max_epochs=2, batch_size=1), loss_fn=loss)
    assert sorted(seen[:12]) == sorted(seen[12:])
    assert seen[:12] != seen[12:]


def test_a_model_in_evaluation_mode_is_trained_in_training_mode():
    modes = []

    def loss(model, batch):
        modes.append(model.training)
        return model(*batch)[1]

    train(Bigram().eval(), Sentences(4), config(max_steps=2), loss_fn=loss)
    assert modes == [True, True]
