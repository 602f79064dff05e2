"""The training loop, one for every model: batches in, steps, evaluations, checkpoints and a log out.

A task is a model, a data set and two functions: `loss_fn(model, batch)`, the mean loss over the targets that
count, and `count_fn(batch)`, how many count. With counts n_i and losses l_i of the batches of one optimizer
step, of all processes, its loss is sum(n_i * l_i) / sum(n_i): that of one big batch, however unequal the
counts.

A run that is resumed goes on where its checkpoint was made, in the middle of a step if need be, and ends with
the bits of one that was never stopped. What it needs for that is in `TrainState`, in the random state, and in
the gradients of a step that is not complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Dataset

from nlpfast.stop import StopSignals
from nlpfast.train import average, checkpoint, snapshot
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.device import resolve_device
from nlpfast.train.distributed import Processes
from nlpfast.train.evaluation import Evaluation, ScoreFunction
from nlpfast.train.feed import Batch, Feed
from nlpfast.train.log import RunLog, check_tensorboard
from nlpfast.train.objective import count_targets, model_loss
from nlpfast.train.progress import RECORDED, TrainState
from nlpfast.train.random_state import random_state, set_random_state
from nlpfast.train.snapshot import RandomStates
from nlpfast.train.step import OptimizerStep, Stopping, TrainingError

__all__ = ["TrainState", "Trainer", "TrainingError"]


class Trainer:
    """Train a model; `run()` does it all.

    Torch's global generator is used by dropout and what a task draws, and is never seeded here: call
    `torch.manual_seed` first for a run that can be repeated. Where torch.distributed is initialised, the
    model is shared with the other processes, each of which gets its part of every batch.

    Args:
        model: any module; `configure_optimizers(config)` is used if it has one, else `build_optimizer` with
            decay of the weights of linear layers alone. Gradients of the modules in `clipped_apart`, if it
            has that, are clipped each by a norm of its own.
        train_dataset: a data set with a length; its `source(index)`, if it has one, names examples in
            messages.
        config: the settings.
        validation: a data set that is evaluated every `eval_every` steps and at the end; decides which
            checkpoint is the best, unless there is a score.
        score_fn: `(model, pause) -> figures by name`, called at each evaluation with the model in evaluation
            mode and without gradients; calls `pause` between its batches, which leaves it when the run is to
            stop. The figures are logged; one by the name of "score" decides which checkpoint is the best, the
            higher the better.
        output_dir: gets `log.jsonl`, `last/`, `last.previous/` and `best/`, and with `config.average` the
            models of the last evaluations, such as `step-00000250/`, and at the end of the run their mean,
            `averaged/`; None writes no file.
        loss_fn: `(model, batch) -> mean loss`, a scalar tensor.
        count_fn: `batch -> number of targets that count`; it gets the batch on the CPU.
        collate_fn: makes a batch from a list of examples; torch's default when None.
        metadata: plain values to be kept in every checkpoint, for example the vocabulary; "data", where it is
            there, is the first record of the log, and tells what was read, used and skipped.
        quiet: print nothing; otherwise lines or a progress bar go to stderr.
        schedule_tokens: what an example counts for in the learning rate's schedule and in `state.tokens`,
            such as its length with padding, as in minGPT; None for its targets that count.
        how_to_resume: option that is named when the run is stopped; None for ``--resume`` with the folder.
        width: channels of the model, for the schedule "noam".

    Raises:
        ConfigError: the device does not exist, TensorBoard is asked for and cannot be had, or what an option
            needs is not given: a width, something to evaluate, an output folder.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any],
        config: TrainerConfig,
        *,
        validation: Dataset[Any] | None = None,
        score_fn: ScoreFunction | None = None,
        output_dir: str | Path | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] = model_loss,
        count_fn: Callable[[Any], int] = count_targets,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        quiet: bool = False,
        schedule_tokens: int | None = None,
        how_to_resume: str | None = None,
        width: int | None = None,
    ) -> None:
        """Move the model to its device and build optimizer and data order; nothing is written yet."""
        self.device, self.processes = resolve_device(config.device), Processes()
        if config.tensorboard:
            check_tensorboard()
        if config.strategy == "fsdp" and config.dtype == "float16":
            raise ConfigError("strategy", "fsdp", "its parts have no loss scaler, use bfloat16 or float32")
        if config.average and output_dir is None:
            raise ConfigError("average", config.average, "it keeps models in files, pass output_dir=")
        self.model, self.config = model.to(self.device), config
        self.count_fn, self.collate_fn = count_fn, collate_fn
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.metadata, self.quiet = dict(metadata or {}), quiet or self.processes.rank > 0
        self.feed = self._build_feed(train_dataset, config.sampling, config.batch_size)
        size = config.eval_batch_size or 4 * config.batch_size
        of_validation = self._build_feed(validation, "sequential", size) if validation is not None else None
        self.steps = OptimizerStep(
            *(self.model, config, self.device, self.processes, loss_fn),
            sources=self.feed.sources,
            say=self._say,
            planned_steps=self.total_steps(),
            schedule_tokens=schedule_tokens,
            width=width,
        )
        self.evaluation, self.score_fn = (
            Evaluation(self.steps, of_validation, score_fn, self._pause),
            score_fn,
        )
        self._how_to_resume = how_to_resume or f"--resume {self.output_dir}"
        self.state, self.meter, self.optimizer = self.steps.state, self.steps.meter, self.steps.optimizer
        self._random = RandomStates()
        self._saved: tuple[int, bool, int] | None = None
        self._stop = StopSignals(raise_at_once=False)
        self._log: RunLog | None = None
        self._clock = time.monotonic()

    def resume(self, folder: str | Path) -> list[str]:
        """Go on from a checkpoint of a run with the same model and data; `run` then continues it.

        Args:
            folder: the run's, or a checkpoint.

        Returns:
            What is different from the run's options, as `name: before -> now`.

        Raises:
            CheckpointError: it is missing, damaged or of something else.
            ConfigError: an option that a run cannot change is different.
        """
        self._random, changes = snapshot.put_back(checkpoint.find_latest(folder), self.steps)
        self.state = self.steps.state
        return changes

    def run(self) -> TrainState:
        """Train until `max_steps`, `max_epochs` or `early_stop`, evaluate, save, and return the final state.

        On SIGINT, SIGTERM or SIGUSR1 the step or evaluation at hand is left, `last` is saved, and the
        exception of the signal is raised; a second signal ends the process at once.

        Raises:
            TrainingError: a loss or gradient is not finite (that step is not taken), or no target counts.
            OSError: a file cannot be written.
            KeyboardInterrupt: after SIGINT.
            Terminated: after SIGTERM or SIGUSR1.
        """
        folder = self.output_dir if self.processes.rank == 0 else None
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
            if self.config.average:
                average.remove_models(folder, newest=self.config.average, until=self.state.step)
        self._clock = time.monotonic() - self.state.seconds
        stream, length = None if self.quiet else sys.stderr, self.state.log_bytes
        log = RunLog(folder, length=length, tensorboard=self.config.tensorboard, stream=stream)
        with self._stop, log as self._log:
            if length == 0 and "data" in self.metadata:
                log.note({"step": 0, "data": self.metadata["data"]})
            try:
                self._run()
            except Stopping:
                self._leave()
        return self.state

    def _run(self) -> None:
        if self._random:
            set_random_state(self._random["window" if self.state.window else "now"])
        if self.state.due:
            self._after_step()
            self._pause()
        while self._reason_to_end() is None:
            self._train_epoch()
        if self.state.evaluated_step != self.state.step:
            self._after_step(final=True)
        self._end()

    def _end(self) -> None:
        """Say why the run is over, and write the mean of its last models where that is asked for."""
        state, config = self.state, self.config
        state.ended = self._reason_to_end()
        if state.ended == "early_stop" and self._log is not None:
            self._log.note({"step": state.step, "ended": state.ended})
            self._say(f"ended early: {state.stale_evaluations} evaluations without a better one")
        if config.average and self.output_dir is not None and self.processes.rank == 0:
            settings = dataclasses.asdict(config)
            steps = average.write_average(self.output_dir, self.model, settings, metadata=self.metadata)
            self._say(f"{average.AVERAGED}/: mean of the models after step {', '.join(map(str, steps))}")

    def _train_epoch(self) -> None:
        """Take the steps of the rest of the current epoch."""
        state = self.state
        start, before = state.batch, state.step
        groups = self.feed.groups(state.epoch, start, self.config.accumulation_steps)
        with contextlib.closing(groups):  # type: ignore[type-var]
            while True:
                # of before the batches were loaded, which a data set may draw random numbers for
                window = random_state() if self.config.accumulation_steps > 1 else {}
                group = next(groups, None)
                if group is None:
                    break
                if state.window:
                    set_random_state(self._random["now"])
                self._random = {"window": window}
                if self._one_step(group):
                    self._after_step()
                    self._pause()
                if self._reason_to_end() is not None:
                    return
        if state.step == before and start == 0:
            raise TrainingError(f"epoch {state.epoch}: no target counts in the loss: check the data")
        state.epoch += 1
        state.batch = 0

    def evaluate(self) -> float:
        """Return the mean loss over the counted targets of the validation data, in evaluation mode.

        Random numbers that are drawn meanwhile do not change the run.

        Raises:
            ValueError: there is no validation data.
            TrainingError: no target counts, or the loss is not finite.
        """
        return self.evaluation.loss(self.model)

    def save(self, name: str) -> None:
        """Write the checkpoint `output_dir/name`; nothing happens without an output folder.

        Raises:
            OSError: it cannot be written; the previous one of that name is unharmed.
        """
        if self.output_dir is None:
            return
        self.state.seconds = time.monotonic() - self._clock
        if self._log is not None:
            self.state.log_bytes = self._log.sync()
        state, tensors = snapshot.take(self.steps, self._random)
        checkpoint.save(
            *(self.output_dir / name, self.model, self.optimizer, state, dataclasses.asdict(self.config)),
            metadata=self.metadata,
            tensors=tensors,
            keep_previous=name == "last",
            write=self.processes.rank == 0,
        )
        if name == "last":
            self._saved = (self.state.step, self.state.due, len(self.state.window))

    def _stopping(self) -> bool:
        return self.processes.any(self._stop.received is not None)

    def _pause(self) -> None:
        """Leave the loop here if a signal asks for it, or one that another process got."""
        if self._stopping():
            raise Stopping

    def _leave(self) -> None:
        """Save, unless this very state is saved already, and raise the exception of the signal."""
        if self._saved != (self.state.step, self.state.due, len(self.state.window)):
            self.save("last")
        received = self.processes.gather(self._stop.received)
        self._stop.received = next(number for number in received if number is not None)
        if self.output_dir is not None:
            self._say(f"stopped after step {self.state.step}: {self._how_to_resume} goes on from there")
        self._stop.check()

    def _build_feed(self, dataset: Dataset[Any], sampling: str, batch_size: int) -> Feed:
        return Feed(
            *(dataset, self.config, sampling, batch_size),
            count_fn=self.count_fn,
            collate_fn=self.collate_fn,
            processes=self.processes,
            pinned=self.device.type == "cuda",
        )

    def _reason_to_end(self) -> str | None:
        """Return the option that ends the run here, or None."""
        state, config = self.state, self.config
        reached = {
            "max_steps": (config.max_steps, state.step),
            "max_epochs": (config.max_epochs, state.epoch),
            "early_stop": (config.early_stop, state.stale_evaluations),
        }
        return next((name for name, (end, now) in reached.items() if end is not None and now >= end), None)

    def total_steps(self) -> int | None:
        """Return how many optimizer steps the run will take."""
        steps, epochs = self.config.max_steps, self.config.max_epochs
        if epochs is None:
            return steps
        of_epochs = epochs * -(-len(self.feed) // self.config.accumulation_steps)
        return of_epochs if steps is None else min(steps, of_epochs)

    def _one_step(self, group: list[Batch]) -> bool:
        return self.steps.take(group, self._stopping)

    def _say(self, line: str) -> None:
        if self._log is not None:
            self._log.say(line)

    def _after_step(self, final: bool = False) -> None:
        """Log, evaluate and save where it is due."""
        state, config, log = self.state, self.config, self._log
        assert log is not None
        evaluating = final or state.step == self.total_steps() or state.step % config.eval_every == 0
        saving = evaluating or (config.save_every is not None and state.step % config.save_every == 0)
        best = False
        if evaluating or state.step == 1 or state.step % config.log_every == 0:
            record = {key: getattr(state, key) for key in RECORDED}
            record |= self.meter.record(self.optimizer.param_groups[0]["lr"], time.monotonic() - self._clock)
            if evaluating:
                best = self.evaluation.into(record, self.model)
            log.record(record, self.total_steps())
            self.meter.restart()
        else:
            log.progress(state.step, self.total_steps(), self.meter.latest)
        state.due = False
        state.evaluated_step = state.step if evaluating else state.evaluated_step
        if best:
            self.save("best")
        keeping = self.output_dir if evaluating and config.average else None
        if keeping is not None:
            options = {"metadata": self.metadata, "write": self.processes.rank == 0}
            average.keep_model(keeping, state.step, self.model, dataclasses.asdict(config), **options)
        if saving:
            self.save("last")
        # only now: a run that goes on from the `last` before this one needs the older models
        if keeping is not None and self.processes.rank == 0:
            average.remove_models(keeping, newest=config.average, until=state.step)
