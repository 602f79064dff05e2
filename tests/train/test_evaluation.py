"""What evaluations decide: when a run ends early, when its learning rate is halved, and what is the best."""

import json
import signal

import pytest
import torch
from toys import Bigram, Sentences, config

from nlpfast.stop import Terminated
from nlpfast.train import checkpoint
from nlpfast.train.config import ConfigError
from nlpfast.train.evaluation import Evaluation
from nlpfast.train.trainer import Trainer, TrainingError, TrainState


def scored(scores, folder=None, **values):
    """Return a trainer whose evaluations, one a step, have the given scores."""
    left = list(scores)
    settings = config(**{"max_steps": len(left), "eval_every": 1, "learning_rate": 0.01, **values})
    return Trainer(
        *(Bigram(), Sentences(40), settings),
        score_fn=lambda model, pause: {"score": left.pop(0)},
        output_dir=folder,
        quiet=True,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("patience", "scores", "steps", "ended"),
    [
        (1, [1, 2, 2, 9, 9], 3, "early_stop"),
        (2, [1, 0, 2, 2, 1, 9], 5, "early_stop"),
        (3, [1, 0, 0, 2, 2, 1, 9], 7, "max_steps"),
        (2, [3, 2, 1], 3, "max_steps"),
        (None, [3, 2, 1, 0], 4, "max_steps"),
    ],
)
def test_a_run_without_better_evaluations_ends_early(patience, scores, steps, ended, tmp_path):
    trainer = scored(scores, tmp_path, early_stop=patience)
    state = trainer.run()
    assert (state.step, state.ended) == (steps, ended)
    log = lines(tmp_path)
    note = {"step": steps, "ended": "early_stop"}
    assert (log[-1] == note) is (ended == "early_stop")
    # the last evaluation is not done again
    assert [record["step"] for record in log if "score" in record] == list(range(1, steps + 1))
    best = scores.index(max(scores[:steps])) + 1
    assert checkpoint.load(tmp_path / "best").state["step"] == best
    saved = checkpoint.load(tmp_path / "last").state
    assert saved["step"] == steps and saved["stale_evaluations"] == steps - best
    assert "ended" not in saved


def test_the_validation_loss_can_end_a_run_and_people_are_told(tmp_path, capsys):
    settings = config(max_steps=40, eval_every=2, learning_rate=60.0, grad_norm_clip=None, early_stop=2)
    trainer = Trainer(Bigram(), Sentences(8), settings, validation=Sentences(30), output_dir=tmp_path)
    state = trainer.run()
    evaluated = [record for record in lines(tmp_path) if "val_loss" in record]
    losses = [record["val_loss"] for record in evaluated]
    best = [loss < min(losses[:number], default=99) for number, loss in enumerate(losses)]
    assert [record["best"] for record in evaluated] == best
    assert len(losses) < 20 and state.step == 2 * len(losses)
    assert losses.index(min(losses)) == len(losses) - 3
    assert capsys.readouterr().err.splitlines()[-1] == "ended early: 2 evaluations without a better one"


def test_epochs_end_a_run_for_their_own_reason():
    settings = config(max_steps=None, max_epochs=2, eval_every=9, early_stop=1)
    trainer = Trainer(Bigram(), Sentences(8), settings, validation=Sentences(8), quiet=True)
    assert trainer.run().ended == "max_epochs"


def test_who_goes_on_with_an_early_end_may_have_more_patience(tmp_path):
    scored([2, 1, 1], tmp_path, max_steps=9, early_stop=2).run()
    again = scored([], tmp_path, max_steps=9, early_stop=2)
    again.resume(tmp_path)
    assert (again.run().step, again.state.ended) == (3, "early_stop")
    before = lines(tmp_path)
    patient = scored([1, 3, 3, 3, 3], tmp_path, max_steps=9, early_stop=3)
    assert patient.resume(tmp_path) == ["early_stop: 2 -> 3"]
    assert (patient.run().step, patient.state.ended) == (4, "early_stop")
    # the end that was none is not in the log any more
    assert [line for line in lines(tmp_path) if "ended" in line] == [{"step": 4, "ended": "early_stop"}]
    assert before[-1] not in lines(tmp_path)


def test_the_rate_is_halved_where_nothing_gets_better(tmp_path):
    scores = [1, 1, 1, 1, 1, 2, 1, 1, 3, 2]
    settings = {"schedule": "plateau", "plateau_patience": 2, "warmup_tokens": 0, "log_every": 1}
    trainer = scored(scores, tmp_path, learning_rate=0.5, **settings)
    state = trainer.run()
    rates = [record["lr"] for record in lines(tmp_path)]
    # after the third evaluation, the fifth and the eighth; from the next step on
    assert rates == [0.5, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125, 0.125, 0.0625, 0.0625]
    assert state.halvings == 3


def test_only_a_plateau_is_halved():
    trainer = scored([1, 1, 1, 1], schedule="constant", plateau_patience=1)
    assert trainer.run().halvings == 0
    assert trainer.optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize(
    ("values", "named"),
    [({"early_stop": 2}, "early_stop=2"), ({"schedule": "plateau"}, "schedule='plateau'")],
)
def test_nothing_to_compare_is_refused(values, named):
    with pytest.raises(ConfigError, match=f"{named}: it compares evaluations, pass validation= or score_fn="):
        Trainer(Bigram(), Sentences(8), config(**values), quiet=True)
    trainer = Trainer(
        *(Bigram(), Sentences(8), config(**values)),
        score_fn=lambda model, pause: {"accuracy": 1.0},
        quiet=True,
    )
    with pytest.raises(
        TrainingError, match="step 1: there is no figure by the name of score: early_stop and"
    ):
        trainer.run()


def test_figures_that_are_not_compared_need_no_score(tmp_path):
    trainer = Trainer(
        *(Bigram(), Sentences(8), config()),
        score_fn=lambda model, pause: {"accuracy": 1.0},
        output_dir=tmp_path,
        quiet=True,
    )
    assert trainer.run().stale_evaluations == 0
    assert lines(tmp_path)[-1]["accuracy"] == 1.0 and lines(tmp_path)[-1]["best"] is False


def test_no_data_to_evaluate_on():
    trainer = Trainer(Bigram(), Sentences(8), config(), quiet=True)
    with pytest.raises(ValueError, match="validation=None: give the trainer validation data"):
        trainer.evaluate()
    record = {}
    assert Evaluation(trainer.steps, None, None, lambda: None).into(record, trainer.model) is False
    assert record == {}


@pytest.mark.parametrize(
    ("before", "evaluation", "best", "after"),
    [
        # loss and score so far, those of the evaluation
        ((None, None), (2.0, None), True, (2.0, None, 0)),
        ((2.0, None), (1.0, None), True, (1.0, None, 0)),
        ((2.0, None), (2.0, None), False, (2.0, None, 5)),
        ((2.0, None), (3.0, None), False, (2.0, None, 5)),
        ((None, None), (None, 0.5), True, (None, 0.5, 0)),
        ((None, 0.5), (None, 0.5), False, (None, 0.5, 5)),
        # the score decides, and the lowest loss is remembered all the same
        ((2.0, 0.5), (1.0, 0.4), False, (1.0, 0.5, 5)),
        ((2.0, 0.5), (3.0, 0.6), True, (2.0, 0.6, 0)),
    ],
)
def test_judgement(before, evaluation, best, after):
    state = TrainState(best_loss=before[0], best_score=before[1], stale_evaluations=4)
    assert state.judge(*evaluation) is best
    assert (state.best_loss, state.best_score, state.stale_evaluations) == after
    assert state.val_loss == evaluation[0]


def test_an_evaluation_that_is_left_leaves_no_trace(tmp_path):
    """The loss is the best so far, then the score is stopped: both are for the run that goes on."""

    def trainer(score_fn):
        settings = config(max_steps=2, eval_every=2, early_stop=1)
        arguments = {"validation": Sentences(30), "score_fn": score_fn, "output_dir": tmp_path, "quiet": True}
        return Trainer(Bigram(), Sentences(40), settings, **arguments)

    def stopped(model, pause):
        signal.raise_signal(signal.SIGTERM)
        pause()

    with pytest.raises(Terminated):
        trainer(stopped).run()
    saved = checkpoint.load(tmp_path / "last").state
    assert saved["due"] and saved["best_loss"] is None and saved["val_loss"] is None
    again = trainer(lambda model, pause: {"accuracy": 1.0})
    again.resume(tmp_path)
    assert again.run().best_loss is not None and lines(tmp_path)[-1]["best"] is True
    assert torch.equal(torch.tensor(checkpoint.load(tmp_path / "best").state["step"]), torch.tensor(2))
