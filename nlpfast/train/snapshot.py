"""A run as a checkpoint holds it: taken from the loop's parts, and put back into those of another process."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nlpfast.train import checkpoint
from nlpfast.train.checkpoint import CheckpointError
from nlpfast.train.progress import TrainState
from nlpfast.train.random_state import random_state
from nlpfast.train.resume import changed_options
from nlpfast.train.step import OptimizerStep

# Random states by when they are needed: "now", and for a step that is not complete also "window", of before
# its batches were loaded.
RandomStates = dict[str, dict[str, Tensor]]

# options that the optimizer's groups hold
OF_THE_OPTIMIZER = {"learning_rate", "betas", "weight_decay"}
# options with which a schedule is planned
OF_THE_SCHEDULE = {"schedule", "warmup_tokens", "final_tokens", "warmup_steps"}


def take(steps: OptimizerStep, random: RandomStates) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Return the progress of a run and its tensors, beside model and optimizer; all processes have to ask.

    Args:
        steps: of the run.
        random: of before the batches of the step at hand were loaded, as "window".
    """
    state = dataclasses.asdict(steps.state)
    del state["ended"]
    state |= {"scaler": steps.scaler.state_dict(), "processes": steps.processes.world_size}
    # not in JSON, where NaN has no place
    losses = {"window": state.pop("window"), "meter": steps.meter.state()}
    within = bool(steps.state.window)
    states = {"now": random_state(), **({"window": random["window"]} if within else {})}
    named = {name: parameter.grad for name, parameter in steps.model.named_parameters()}
    return state, {
        "random": {
            f"{rank}.{when}.{which}": tensor
            for rank, of_rank in enumerate(steps.processes.gather(states))
            for when, values in of_rank.items()
            for which, tensor in values.items()
        },
        "losses": {name: torch.tensor(values, dtype=torch.float64) for name, values in losses.items()},
        "gradients": {name: grad for name, grad in named.items() if within and grad is not None},
    }


def put_back(folder: Path, steps: OptimizerStep) -> tuple[RandomStates, list[str]]:
    """Put a checkpoint into the parts of a run that begins.

    Args:
        folder: of the checkpoint.
        steps: of the run.

    Returns:
        The random states, and what is different from the run's options, as `name: before -> now`.

    Raises:
        CheckpointError: it is missing, damaged or of something else.
        ConfigError: an option that a run cannot change is different.
    """
    changes = changed_options(steps.config, checkpoint.load(folder).config)
    changed = {change.partition(":")[0] for change in changes}
    fresh = [{k: v for k, v in group.items() if k != "params"} for group in steps.optimizer.param_groups]
    saved = checkpoint.load(folder, steps.model, steps.optimizer)
    if OF_THE_OPTIMIZER & changed:
        for group, values in zip(steps.optimizer.param_groups, fresh, strict=True):
            group.update(values)
    state, random = dict(saved.state), RandomStates()
    try:
        processes, scaler = state.pop("processes"), state.pop("scaler")
        if processes != steps.processes.world_size:
            now = steps.processes.world_size
            raise CheckpointError(f"{folder}: of a run with {processes} processes, not {now}: start as many")
        losses = {name: values.tolist() for name, values in saved.tensors["losses"].items()}
        steps.state = TrainState.restored({**state, "ended": None, "window": losses["window"]})
        if OF_THE_SCHEDULE & changed:
            # what was planned may be of another unit
            steps.state.schedule_end = 0
        steps.meter.restore(losses["meter"])
        steps.scaler.load_state_dict(scaler)
        for name, tensor in saved.tensors["random"].items():
            rank, when, which = name.split(".", 2)
            if int(rank) == steps.processes.rank:
                random.setdefault(when, {})[which] = tensor
        parameters = dict(steps.model.named_parameters())
        for name, gradient in saved.tensors["gradients"].items():
            parameters[name].grad = gradient.to(steps.device)
    except (KeyError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: {error}: use another checkpoint") from error
    return random, changes
