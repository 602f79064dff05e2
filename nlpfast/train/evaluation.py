"""An evaluation of a run: the validation loss, figures of a task's own, and what they mean for the run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from nlpfast.train.config import ConfigError
from nlpfast.train.feed import Batch, Feed
from nlpfast.train.objective import evaluation_mode, mean_loss
from nlpfast.train.random_state import random_state_kept
from nlpfast.train.step import OptimizerStep, TrainingError

__all__ = ["Evaluation", "ScoreFunction"]

ScoreFunction = Callable[[nn.Module, Callable[[], None]], Mapping[str, float]]


class Evaluation:
    """Evaluate a run; random numbers that are drawn meanwhile do not change it.

    Args:
        steps: of the run; its state gets what an evaluation finds.
        feed: validation data, if there are any.
        score_fn: `(model, pause) -> figures by name`, if there is one; see `Trainer`.
        pause: is called between batches, and leaves the evaluation when the run is to stop.

    Raises:
        ConfigError: the run compares evaluations, and there is nothing to evaluate.
    """

    def __init__(
        self,
        steps: OptimizerStep,
        feed: Feed | None,
        score_fn: ScoreFunction | None,
        pause: Callable[[], None],
    ) -> None:
        """Check that there is what the settings need."""
        self.steps, self.config, self.feed = steps, steps.config, feed
        self.score_fn, self.pause = score_fn, pause
        if feed is None and score_fn is None:
            rule = "it compares evaluations, pass validation= or score_fn= to the trainer"
            if self.config.early_stop is not None:
                raise ConfigError("early_stop", self.config.early_stop, rule)
            if self.config.schedule == "plateau":
                raise ConfigError("schedule", "plateau", rule)

    def loss(self, model: nn.Module) -> float:
        """Return the mean loss over the counted targets of the validation data, in evaluation mode.

        Args:
            model: of the run.

        Raises:
            ValueError: there is no validation data.
            TrainingError: no target counts, or the loss is not finite.
        """
        if self.feed is None:
            raise ValueError("validation=None: give the trainer validation data to evaluate on")
        feed = self.feed

        def batches() -> Iterator[Batch]:
            for batch in itertools.islice(feed.batches(), self.config.eval_batches):
                self.pause()
                yield batch

        with random_state_kept():
            loss, tokens = mean_loss(
                model, batches(), lambda batch: self.steps.loss(model, batch), self.steps.processes
            )
        if not math.isfinite(loss):
            step = self.steps.state.step
            raise TrainingError(
                f"step {step}: the validation loss is {loss} over {tokens} tokens: check the data"
            )
        return loss

    def into(self, record: dict[str, Any], model: nn.Module) -> bool:
        """Add the figures of an evaluation to a record, and return whether they are the best so far.

        The state changes at the end alone: a run that stops within an evaluation does all of it again.

        Args:
            record: gets `val_loss`, the figures, and `best`.
            model: of the run.

        Raises:
            TrainingError: as `loss`, or the run compares evaluations and there is nothing to compare.
        """
        state, config, figures = self.steps.state, self.config, dict[str, float]()
        if self.feed is not None:
            record["val_loss"] = self.loss(model)
        if self.score_fn is not None:
            with random_state_kept(), evaluation_mode(model):
                figures = dict(self.score_fn(model, self.pause))
        compared = self.feed is not None or "score" in figures
        if not compared and (config.early_stop is not None or config.schedule == "plateau"):
            rule = "early_stop and schedule plateau compare it: return it from score_fn"
            raise TrainingError(f"step {state.step}: there is no figure by the name of score: {rule}")
        best = compared and state.judge(record.get("val_loss"), figures.get("score"))
        if compared and not best and config.schedule == "plateau":
            state.halvings += state.stale_evaluations % config.plateau_patience == 0
        if figures or self.feed is not None:
            record |= {**figures, "best": best}
        return best
