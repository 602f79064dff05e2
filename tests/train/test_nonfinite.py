"""Losses and gradients that are not finite: no step is taken, its examples are named, nothing is averaged."""

import json
import math

import pytest
import torch
from toys import Bigram, Sentences, config, train

from nlpfast.train.trainer import Trainer, TrainingError


class Named(Sentences):
    """Sentences with the lines that they come from."""

    def source(self, index):
        return f"corpus.txt:{index + 1}"


class Spoilt:
    """A loss that spoils itself, or its gradient alone, in some calls."""

    def __init__(self, calls, how):
        self.calls, self.spoilt, self.how = 0, calls, how

    def __call__(self, model, batch):
        self.calls += 1
        loss = model(*batch)[1]
        if self.calls not in self.spoilt:
            return loss
        if self.how == "gradient":
            # 0, with an infinite derivative
            return loss + (model.table * 0).sum().sqrt()
        return loss * {"nan": math.nan, "inf": math.inf}[self.how]


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
@pytest.mark.parametrize("named", [False, True])
def test_the_run_stops_and_the_examples_are_named(how, named, tmp_path):
    data = (Named if named else Sentences)(40)
    settings = config(max_steps=9, batch_size=3, accumulation_steps=2)
    trainer = Trainer(Bigram(), data, settings, loss_fn=Spoilt({6}, how), quiet=True)
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    message = str(caught.value)
    # the sixth batch is the second of the third step; a gradient is of all of its step
    batches = list(trainer.feed.order)[4 if how == "gradient" else 5 : 6]
    indices = [index for batch in batches for index in batch]
    words = [f"corpus.txt:{index + 1}" if named else f"example {index}" for index in indices]
    assert ", ".join(words[:3]) in message
    assert ("and 3 more" in message) == (how == "gradient")
    assert "step 3: the " + ("gradient norm" if how == "gradient" else "loss") in message
    assert trainer.state.step == 2 and trainer.state.nonfinite_steps == 1
    # as after two steps
    two = train(Bigram(), data, config(max_steps=2, batch_size=3, accumulation_steps=2))
    assert torch.equal(trainer.model.table, two.model.table)


@pytest.mark.parametrize("how", ["nan", "inf", "gradient"])
def test_so_many_steps_are_left_out(how, tmp_path, capsys):
    settings = config(max_steps=8, skip_nonfinite=2, log_every=3)
    data = Named(40)
    trainer = Trainer(Bigram(), data, settings, loss_fn=Spoilt({2, 5}, how), output_dir=tmp_path)
    trainer.run()
    assert trainer.state.step == 8 and trainer.state.nonfinite_steps == 2
    assert bool(trainer.model.table.isfinite().all())
    records = {r["step"]: r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())}
    # 1; 2 and 3, 4 to 6 with a bad one each; 7 and 8
    assert [not math.isfinite(records[step]["loss"]) for step in (1, 3, 6, 8)] == [False, True, True, False]
    assert [records[step]["nonfinite_steps"] for step in (1, 3, 6, 8)] == [0, 1, 2, 2]
    told = [line for line in capsys.readouterr().err.splitlines() if "was not taken" in line]
    assert len(told) == 2 and all("corpus.txt:" in line for line in told)
    with pytest.raises(TrainingError, match="step 7"):
        train(Bigram(), data, settings, loss_fn=Spoilt({2, 5, 7}, how))


def test_steps_that_are_left_out_change_nothing():
    """The same weights as a run in which the bad batches are not there."""
    data = Sentences(24)
    left_out = train(Bigram(), data, config(max_steps=6, skip_nonfinite=1), loss_fn=Spoilt({3}, "nan"))
    model = Bigram()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for number, part in enumerate(left_out.feed.order):
        model.table.grad = None
        model(*torch.utils.data.default_collate([data[i] for i in part]))[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if number != 2:
            optimizer.step()
    torch.testing.assert_close(left_out.model.table, model.table, rtol=1e-12, atol=1e-14)


def test_a_step_that_is_left_out_survives_a_resume(tmp_path):
    """A mean that is not a number is in the checkpoint too."""
    settings = config(max_steps=6, skip_nonfinite=1, log_every=6, save_every=1, eval_every=100)
    train(Bigram(), Sentences(24), settings, loss_fn=Spoilt({3}, "nan"), output_dir=tmp_path / "whole")
    first = config(**{**vars(settings), "max_steps": 4})
    train(Bigram(), Sentences(24), first, loss_fn=Spoilt({3}, "nan"), output_dir=tmp_path / "run")
    second = Trainer(Bigram(), Sentences(24), settings, output_dir=tmp_path / "run", quiet=True)
    assert second.resume(tmp_path / "run") == ["max_steps: 4 -> 6"]
    second.run()
    assert second.state.nonfinite_steps == 1
