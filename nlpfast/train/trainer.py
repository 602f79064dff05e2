"""The training loop, one for every model: batches in, steps, evaluations, checkpoints and a log out.

A task is a model, a data set and two functions: `loss_fn(model, batch)`, the mean loss over the targets that
count, and `count_fn(batch)`, how many count. With counts n_i and losses l_i of the batches of one optimizer
step its loss is sum(n_i * l_i) / sum(n_i): that of one big batch, however unequal the counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from nlpfast.train import checkpoint
from nlpfast.train.config import TrainerConfig
from nlpfast.train.device import resolve_device, to_device
from nlpfast.train.log import Meter, RunLog, check_tensorboard
from nlpfast.train.objective import count_targets, mean_loss, model_loss
from nlpfast.train.sampling import BatchOrder
from nlpfast.train.schedule import learning_rate_multiplier

# a loss scaler that still finds overflow after this many halvings in a row hides a divergence
MOST_SKIPPED_IN_A_ROW = 50
RECORDED = ("step", "epoch", "tokens", "skipped_steps", "empty_batches")


class TrainingError(RuntimeError):
    """Report that a run cannot go on; the message names the step, the value and the fix."""


@dataclasses.dataclass
class TrainState:
    """All that a run knows about its progress, beside weights and optimizer; plain values only.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the data that are complete.
        batch: batches of the current pass that are done.
        tokens: targets that counted in the loss so far.
        warmup_tokens: where the warm-up ends.
        final_tokens: where the learning rate ends; 0 until the first step has been counted.
        best_loss: lowest validation loss so far.
        val_loss: latest validation loss.
        skipped_steps: steps that the loss scaler left out because of an overflow.
        empty_batches: batches without any target that counts.
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
    skipped_steps: int = 0
    empty_batches: int = 0
    seconds: float = 0.0


class Trainer:
    """Train a model; `run()` does it all.

    Torch's global generator is used by dropout alone and is never seeded here: call `torch.manual_seed` first
    for a run that can be repeated.

    Args:
        model: any module; `configure_optimizers(config)` is used if it has one, else AdamW on all parameters.
        train_dataset: a data set with a length.
        config: the settings.
        validation: a data set that is evaluated every `eval_every` steps and at the end; decides which
            checkpoint is the best.
        output_dir: gets `log.jsonl`, `last/` and `best/`; None writes no file.
        loss_fn: `(model, batch) -> mean loss`, a scalar tensor.
        count_fn: `batch -> number of targets that count`; it gets the batch on the CPU.
        collate_fn: makes a batch from a list of examples; torch's default when None.
        metadata: plain values to be kept in every checkpoint, for example the vocabulary.
        quiet: print nothing; otherwise lines or a progress bar go to stderr.

    Raises:
        ConfigError: the device does not exist, or TensorBoard is asked for and cannot be had.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Dataset[Any],
        config: TrainerConfig,
        *,
        validation: Dataset[Any] | None = None,
        output_dir: str | Path | None = None,
        loss_fn: Callable[[nn.Module, Any], Tensor] = model_loss,
        count_fn: Callable[[Any], int] = count_targets,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        """Move the model to its device and build optimizer and data order; nothing is written yet."""
        self.device = resolve_device(config.device)
        if config.tensorboard:
            check_tensorboard()
        self.model, self.config, self.validation = model.to(self.device), config, validation
        self.loss_fn, self.count_fn, self.collate_fn = loss_fn, count_fn, collate_fn
        self.output_dir = Path(output_dir) if output_dir is not None else None
        self.metadata, self.quiet = dict(metadata or {}), quiet
        self.state = TrainState()
        self.optimizer = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "float16")
        size = len(train_dataset)  # type: ignore[arg-type]
        self.order = BatchOrder(size, config.batch_size, config.seed, config.sampling)
        self._loader = self._build_loader(train_dataset, batch_sampler=self.order)
        self._skipped_in_a_row = 0
        self._evaluated_step = 0
        self._clock = time.monotonic()

    def run(self) -> TrainState:
        """Train until `max_steps` or `max_epochs`, evaluate, save, and return the final state.

        Raises:
            TrainingError: a loss or gradient is not finite (that step is not taken), or no target counts.
            OSError: a file cannot be written.
        """
        if self.output_dir is not None:
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self._clock = time.monotonic() - self.state.seconds
        append, stream = self.state.step > 0, None if self.quiet else sys.stderr
        tensorboard = self.config.tensorboard
        with RunLog(self.output_dir, append=append, tensorboard=tensorboard, stream=stream) as log:
            meter = Meter()
            while not self._finished():
                before = self.state.step
                for batches in self._steps_of_epoch():
                    self._one_step(batches, meter)
                    self._after_step(log, meter)
                    if self._finished():
                        break
                else:
                    self.state.epoch += 1
                    self.state.batch = 0
                if self.state.step == before:
                    raise TrainingError(
                        f"epoch {self.state.epoch}: no target counts in the loss: check the data"
                    )
            if self._evaluated_step != self.state.step:
                self._after_step(log, meter, final=True)
        return self.state

    def evaluate(self) -> float:
        """Return the mean loss over the counted targets of the validation data, in evaluation mode.

        Raises:
            ValueError: there is no validation data.
            TrainingError: no target counts, or the loss is not finite.
        """
        if self.validation is None:
            raise ValueError("validation=None: give the trainer validation data to evaluate on")
        size = self.config.eval_batch_size or 4 * self.config.batch_size
        loader = self._build_loader(self.validation, batch_size=size)
        batches = itertools.islice(loader, self.config.eval_batches)
        loss, tokens = mean_loss(self.model, batches, self._loss, self.count_fn)
        if not math.isfinite(loss):
            raise TrainingError(
                f"step {self.state.step}: the validation loss is {loss} over {tokens} tokens: check the data"
            )
        return loss

    def save(self, name: str) -> None:
        """Write the checkpoint `output_dir/name`; nothing happens without an output folder.

        Raises:
            OSError: it cannot be written; the previous one of that name is unharmed.
        """
        if self.output_dir is None:
            return
        self.state.seconds = time.monotonic() - self._clock
        state = {**dataclasses.asdict(self.state), "scaler": self.scaler.state_dict()}
        config = dataclasses.asdict(self.config)
        folder = self.output_dir / name
        checkpoint.save(folder, self.model, self.optimizer, state, config, metadata=self.metadata)

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if hasattr(self.model, "configure_optimizers"):
            optimizer: torch.optim.Optimizer = cast(Any, self.model).configure_optimizers(config)
        else:
            optimizer = torch.optim.AdamW(
                self.model.parameters(), config.learning_rate, config.betas, weight_decay=config.weight_decay
            )
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def _build_loader(self, dataset: Dataset[Any], **options: Any) -> DataLoader[Any]:
        return DataLoader(
            dataset,
            num_workers=self.config.num_workers,
            collate_fn=self.collate_fn,
            pin_memory=self.device.type == "cuda",
            # torch's global generator is left to dropout, or the data order would change its numbers
            generator=torch.Generator().manual_seed(self.config.seed),
            **options,
        )

    def _finished(self) -> bool:
        steps, epochs = self.config.max_steps, self.config.max_epochs
        return (steps is not None and self.state.step >= steps) or (
            epochs is not None and self.state.epoch >= epochs
        )

    def total_steps(self) -> int | None:
        """Return how many optimizer steps the run will take."""
        steps, epochs = self.config.max_steps, self.config.max_epochs
        if epochs is None:
            return steps
        of_epochs = epochs * -(-len(self.order) // self.config.accumulation_steps)
        return of_epochs if steps is None else min(steps, of_epochs)

    def _steps_of_epoch(self) -> Iterator[list[tuple[Any, int]]]:
        """Yield the batches of each optimizer step, with their counts."""
        self.order.epoch = self.state.epoch
        batches = iter(self._loader)
        while group := list(itertools.islice(batches, self.config.accumulation_steps)):
            counted = [(batch, self.count_fn(batch)) for batch in group]
            self.state.batch += len(group)
            self.state.empty_batches += sum(count == 0 for _, count in counted)
            # the mean loss of a batch without targets is NaN, and would stay so with weight 0
            counted = [(batch, count) for batch, count in counted if count]
            if counted:
                yield counted

    def _loss(self, batch: Any) -> Tensor:
        dtype = getattr(torch, self.config.dtype)
        with torch.autocast(self.device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext():
            return self.loss_fn(self.model, to_device(batch, self.device))

    def _one_step(self, batches: list[tuple[Any, int]], meter: Meter) -> None:
        """Take one optimizer step over batches that are weighted by their counts."""
        tokens = sum(count for _, count in batches)
        self._set_learning_rate(tokens)
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for batch, count in batches:
            loss = self._loss(batch) * (count / tokens)
            self.scaler.scale(loss).backward()
            losses.append(loss.detach())
        value = float(torch.stack(losses).sum())
        if not math.isfinite(value):
            raise self._not_finite("loss", value)
        self.scaler.unscale_(self.optimizer)
        parameters = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        total_norm = nn.utils.get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
        if self.config.grad_norm_clip is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.grad_norm_clip, total_norm)
        norm = float(total_norm)
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise self._not_finite("gradient norm", norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if math.isfinite(norm):
            self._skipped_in_a_row = 0
        else:
            self._count_skipped()
        self.state.step += 1
        meter.add(value, tokens, norm)

    def _set_learning_rate(self, tokens: int) -> None:
        state, config = self.state, self.config
        state.tokens += tokens
        if not state.final_tokens:
            planned = tokens * (self.total_steps() or 1)
            state.final_tokens = config.final_tokens or planned
            share = round(0.05 * state.final_tokens)
            state.warmup_tokens = share if config.warmup_tokens is None else config.warmup_tokens
        factor = learning_rate_multiplier(
            state.tokens, state.warmup_tokens, state.final_tokens, config.schedule
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _not_finite(self, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"step {self.state.step + 1}: the {what} is {value}, so the step was not taken: "
            f"lower learning_rate ({self.config.learning_rate:g}) or check the data"
        )

    def _count_skipped(self) -> None:
        self.state.skipped_steps += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"step {self.state.step + 1}: gradients overflow float16 in {self._skipped_in_a_row} "
                "steps in a row, at any loss scale: use dtype bfloat16 or float32, or lower learning_rate"
            )

    def _after_step(self, log: RunLog, meter: Meter, final: bool = False) -> None:
        """Log, evaluate and save where it is due."""
        state, config = self.state, self.config
        evaluating = final or state.step == self.total_steps() or state.step % config.eval_every == 0
        if not evaluating and state.step > 1 and state.step % config.log_every:
            log.progress(state.step, self.total_steps(), meter.latest)
            return
        record = {key: getattr(state, key) for key in RECORDED}
        record |= meter.record(self.optimizer.param_groups[0]["lr"], time.monotonic() - self._clock)
        if evaluating and self.validation is not None:
            state.val_loss = record["val_loss"] = self.evaluate()
            record["best"] = state.best_loss is None or state.val_loss < state.best_loss
            if record["best"]:
                state.best_loss = state.val_loss
        log.record(record, self.total_steps())
        if record.get("best"):
            self.save("best")
        if evaluating:
            self._evaluated_step = state.step
            self.save("last")
        meter.restart()
