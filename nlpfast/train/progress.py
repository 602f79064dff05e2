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
        warmup_tokens: where the warm-up ends.
        final_tokens: where the learning rate ends; 0 until the first step has been counted.
        best_loss: lowest validation loss so far.
        val_loss: latest validation loss.
        best_score: highest score so far, of a run that has one.
        skipped_steps: steps that the loss scaler left out because of an overflow.
        skipped_in_a_row: those since the last step that was taken.
        nonfinite_steps: steps that were left out because a loss or gradient was not finite.
        empty_batches: batches without any target that counts.
        evaluated_step: the step of the latest evaluation.
        due: the latest step was not yet logged, nor evaluated or saved where that is due.
        window: weighted losses of the batches that are done of a step that is not complete; their gradients
            are in a file of their own.
        log_bytes: length of the log.
        seconds: time spent, evaluation and saving included.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    tokens: int = 0
    warmup_tokens: int = 0
    final_tokens: int = 0
    best_loss: float | None = None
    val_loss: float | None = None
    best_score: float | None = None
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    nonfinite_steps: int = 0
    empty_batches: int = 0
    evaluated_step: int = 0
    due: bool = False
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
