"""The optimizer step: batches weighted by counts, clipping, the learning rate, and numbers gone wrong."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from nlpfast.optim import build_optimizer, linear_weights_and_rest
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.device import autocast, to_device
from nlpfast.train.distributed import Processes, whole
from nlpfast.train.feed import Batch
from nlpfast.train.log import Meter
from nlpfast.train.progress import TrainState
from nlpfast.train.schedule import learning_rate_multiplier

# a loss scaler that still finds overflow after this many halvings in a row hides a divergence
MOST_SKIPPED_IN_A_ROW = 50
# steps of warm-up in Vaswani et al. 2017
NOAM_WARMUP = 4000
# examples that a message about a bad batch names
NAMED = 3


class TrainingError(RuntimeError):
    """Report that a run cannot go on; the message names the step, the value and the fix."""


class Stopping(Exception):  # noqa: N818
    """Leave the training loop, whose state is complete, so that it can be saved."""


class OptimizerStep:
    """Take the steps of a run, one by one.

    Attributes:
        optimizer: of the model.
        scaler: of the loss, for float16.
        state: of the run, which every step moves on.
        meter: gets the loss of every step.

    Args:
        model: on its device; shared with the other processes from here on.
        config: the settings.
        device: of the model.
        processes: who trains together.
        loss_fn: `(model, batch) -> mean loss`, a scalar tensor.
        sources: `indices -> where the examples come from`, for messages.
        say: prints a line for people.
        planned_steps: of the whole run, if known; the schedule's length follows from it.
        schedule_tokens: what an example counts for in the schedule; None for its targets that count.
        width: channels of the model, which the schedule "noam" needs.

    Raises:
        ConfigError: the schedule is "noam" and there is no width.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainerConfig,
        device: torch.device,
        processes: Processes,
        loss_fn: Callable[[nn.Module, Any], Tensor],
        *,
        sources: Callable[[list[int]], list[str]],
        say: Callable[[str], None],
        planned_steps: int | None,
        schedule_tokens: int | None = None,
        width: int | None = None,
    ) -> None:
        """Build the optimizer."""
        if config.schedule == "noam" and width is None:
            rule = "it needs the width of the model, pass width= to the trainer or take another schedule"
            raise ConfigError("schedule", "noam", rule)
        self.planned_steps, self.schedule_tokens, self.width = planned_steps, schedule_tokens, width
        self.model, self.config, self.device, self.processes = model, config, device, processes
        self.loss_fn, self.sources, self.say = loss_fn, sources, say
        self._shared = processes.share(model, config.strategy)
        self.optimizer = self._build_optimizer()
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
        self.state, self.meter = TrainState(), Meter()

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        if hasattr(self.model, "configure_optimizers"):
            optimizer: torch.optim.Optimizer = cast(Any, self.model).configure_optimizers(config)
        else:
            optimizer = build_optimizer(*linear_weights_and_rest(self.model), config)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def loss(self, model: nn.Module, data: Any) -> Tensor:
        """Return the mean loss of a batch, in the precision of the run."""
        with autocast(self.device, self.config.dtype):
            return self.loss_fn(model, to_device(data, self.device))

    def take(self, group: list[Batch], stopping: Callable[[], bool]) -> bool:
        """Take one step over batches that are weighted by their counts.

        Args:
            group: the batches; a step that was interrupted goes on after those in `state.window`.
            stopping: is asked between two batches whether to stop there, with what is done in `state.window`
                and in the gradients.

        Returns:
            Whether there was anything to take it over.

        Raises:
            TrainingError: a loss or gradient is not finite, and that was so in `skip_nonfinite` steps before.
            Stopping: in the middle of the step.
        """
        state = self.state
        # of all processes, by batch: who has nothing in one that counts for others takes part all the same
        counts = list(zip(*self.processes.gather([batch.count for batch in group]), strict=True))
        tokens = sum(map(sum, counts))
        if tokens:
            counted = [(batch, min(n) == 0) for batch, n in zip(group, counts, strict=True) if any(n)]
            self._accumulate(counted, tokens, stopping)
        state.batch += len(group)
        state.empty_batches += sum(not any(n) for n in counts)
        return tokens > 0

    def _accumulate(
        self, batches: list[tuple[Batch, bool]], tokens: int, stopping: Callable[[], bool]
    ) -> None:
        """Add up the gradients of batches, each with whether somebody's part of it is empty, and step."""
        state, world = self.state, self.processes.world_size
        self._shared.train()
        if not state.window:
            self.optimizer.zero_grad(set_to_none=True)
        losses = [torch.tensor(loss, dtype=torch.float64) for loss in state.window]
        for number in range(len(losses), len(batches)):
            last = number == len(batches) - 1
            with self._in_this_process_alone() if not last else contextlib.nullcontext():
                loss = self._weighted(*batches[number], tokens)
                # PyTorch takes the mean over processes
                self.scaler.scale(loss * world if world > 1 else loss).backward()
            losses.append(loss.detach().double())
            # several processes stop between steps: until the last batch their gradients are of each alone
            if not last and world == 1 and stopping():
                state.window = torch.stack(losses).tolist()
                raise Stopping
        state.window = []
        self._step([batch for batch, _ in batches], torch.stack(losses).tolist(), tokens)

    def _in_this_process_alone(self) -> contextlib.AbstractContextManager[None]:
        """Leave gradients where they are, for a later batch of the same step to bring them to the others."""
        shared: Any = self._shared
        alone: contextlib.AbstractContextManager[None] = (
            shared.no_sync() if hasattr(shared, "no_sync") else contextlib.nullcontext()
        )
        return alone

    def _weighted(self, batch: Batch, with_empty_parts: bool, tokens: int) -> Tensor:
        """Return the loss of a batch times its share of the step's targets.

        A process in whose part nothing counts computes with another's: the mean over nothing is NaN.
        """
        data = batch.data
        if with_empty_parts:
            others = self.processes.gather(data if batch.count else None)
            data = data if batch.count else next(other for other in others if other is not None)
        return self.loss(self._shared, data) * (batch.count / tokens)

    def _step(self, batches: list[Batch], losses: list[float], tokens: int) -> None:
        """Clip and step with the gradients that are there."""
        state = self.state
        mine = sum(len(batch.indices) for batch in batches if batch.count)
        value, examples = self.processes.sum([sum(losses), mine])
        self._set_learning_rate(int(examples) * self.schedule_tokens if self.schedule_tokens else tokens)
        norm = math.nan
        if not math.isfinite(value):
            self._leave_out(
                "loss", value, [b for b, x in zip(batches, losses, strict=True) if not math.isfinite(x)]
            )
        else:
            self.scaler.unscale_(self.optimizer)
            norm = self._clipped()
            if not math.isfinite(norm) and not self.scaler.is_enabled():
                self._leave_out("gradient norm", norm, batches)
                value = math.nan
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
                self._count_skipped(math.isfinite(norm))
        state.step += 1
        state.due = True
        self.meter.add(value, tokens, norm)

    def _clipped(self) -> float:
        """Clip the gradients, and return the norm that they had together."""
        norms = []
        for part in getattr(self.model, "clipped_apart", (self.model,)):
            parameters = [parameter for parameter in part.parameters() if parameter.grad is not None]
            norms.append(whole(nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])))
            if self.config.grad_norm_clip is not None:
                nn.utils.clip_grads_with_norm_(parameters, self.config.grad_norm_clip, norms[-1])
        return math.hypot(*map(float, norms))

    def _set_learning_rate(self, tokens: int) -> None:
        state, config = self.state, self.config
        state.tokens += tokens
        in_steps = config.warmup_steps is not None or config.schedule == "noam"
        if not state.schedule_end:
            planned = self.planned_steps or 1
            state.schedule_end = planned if in_steps else config.final_tokens or tokens * planned
            share = NOAM_WARMUP if in_steps else round(0.05 * state.schedule_end)
            given = config.warmup_steps if in_steps else config.warmup_tokens
            state.warmup_end = share if given is None else given
        factor = learning_rate_multiplier(
            *(state.step + 1 if in_steps else state.tokens, state.warmup_end, state.schedule_end),
            config.schedule,
            width=self.width,
            halvings=state.halvings,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def _leave_out(self, what: str, value: float, batches: list[Batch]) -> None:
        """Count a step that is not taken, and name its examples, or stop the run.

        Raises:
            TrainingError: there were `skip_nonfinite` such steps before.
        """
        mine = [source for batch in batches for source in self.sources(batch.indices) if batch.count]
        sources = [source for part in self.processes.gather(mine) for source in part]
        rest = f" and {len(sources) - NAMED} more" if len(sources) > NAMED else ""
        step = f"step {self.state.step + 1}: the {what} is {value}, so the step was not taken"
        batch = f"its examples: {', '.join(sources[:NAMED])}{rest}"
        self.state.nonfinite_steps += 1
        if self.state.nonfinite_steps > self.config.skip_nonfinite:
            fix = f"lower learning_rate ({self.config.learning_rate:g}) or check the data"
            raise TrainingError(f"{step}; {batch}: {fix}")
        self.say(f"{step}; {batch}")

    def _count_skipped(self, taken: bool) -> None:
        """Count a step that the loss scaler left out, or that it did not.

        Raises:
            TrainingError: too many in a row.
        """
        if taken:
            self.state.skipped_in_a_row = 0
            return
        self.state.skipped_steps += 1
        self.state.skipped_in_a_row += 1
        if self.state.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(
                f"step {self.state.step + 1}: gradients overflow float16 in {self.state.skipped_in_a_row} "
                "steps in a row, at any loss scale: use dtype bfloat16 or float32, or lower learning_rate"
            )
