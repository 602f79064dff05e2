"""How far a run has come: plain values that a checkpoint holds, each of which a resumed run needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

# what a record of the log shows of it
RECORDED = ("step", "epoch", "tokens", "skipped_steps", "nonfinite_steps", "empty_batches")


@dataclasses.dataclass
class TrainState:
    """All that a run knows about its progress beside weights, optimizer and random numbers; plain values.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data that are complete.
        batch: batches of the current pass that are done.
        tokens: targets that counted in the loss so far.
        warmup_end: where the warm-up of the schedule ends, in tokens, or in steps where it counts these.
        schedule_end: where the schedule ends, likewise; 0 until it is planned, by the first step.
        best_loss: lowest validation loss so far.
        val_loss: latest validation loss.
        best_score: highest score so far, of a run that has one.
        stale_evaluations: evaluations since the best one.
        halvings: how often the learning rate was halved because none was better, with the schedule "plateau".
        skipped_steps: steps that the loss scaler left out because of an overflow.
        skipped_in_a_row: those since the last step that was taken.
        nonfinite_steps: steps that were left out because a loss or gradient was not finite.
        empty_batches: batches without any target that counts.
        evaluated_step: the step of the latest evaluation.
        due: the latest step was not yet logged, nor evaluated or saved where that is due.
        ended: why the run is over, "max_steps", "max_epochs" or "early_stop"; None before. It is in no
            checkpoint: whoever goes on with a run decides anew when it is over.
        window: weighted losses of the batches that are done of a step that is not complete; their gradients
            are in a file of their own.
        log_bytes: length of the log.
        seconds: time spent, evaluation and saving included.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    warmup_end: int = 0
    schedule_end: int = 0
    best_loss: float | None = None
    val_loss: float | None = None
    best_score: float | None = None
    stale_evaluations: int = 0
    halvings: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    nonfinite_steps: int = 0
    empty_batches: int = 0
    evaluated_step: int = 0
    due: bool = False
    ended: str | None = None
    window: list[float] = dataclasses.field(default_factory=list)
    log_bytes: int = 0
    seconds: float = 0.0

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> TrainState:
        """Return the state that a checkpoint holds.

        Args:
            values: every field, and nothing else.

        Raises:
            ValueError: a field is missing or unknown; names it.
        """
        fields = {field.name for field in dataclasses.fields(cls)}
        for name in sorted(fields ^ values.keys()):
            raise ValueError(f"{name} is {'missing' if name in fields else 'unknown'}")
        return cls(**values)

    def judge(self, val_loss: float | None, score: float | None) -> bool:
        """Take in an evaluation, and return whether it is the best so far, by the score if there is one.

        Args:
            val_loss: mean loss of the validation data, if there are any.
            score: the higher the better.
        """
        best = False
        if val_loss is not None:
            self.val_loss = val_loss
            best = self.best_loss is None or val_loss < self.best_loss
            self.best_loss = val_loss if best else self.best_loss
        if score is not None:
            best = self.best_score is None or score > self.best_score
            self.best_score = score if best else self.best_score
        self.stale_evaluations = 0 if best else self.stale_evaluations + 1
        return best
