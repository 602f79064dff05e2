"""The settings of a training run: dataclasses whose fields carry their help, their type and their bounds.

The command line makes its options from these classes and both check values with the same rules. Nothing here
imports torch, so that a wrong option is reported at once.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin, get_type_hints

SCHEDULES = ("cosine", "constant", "mingpt", "inverse_sqrt", "noam", "plateau")
OPTIMIZERS = ("adamw", "adam", "adamax", "sgd")
DTYPES = ("float32", "bfloat16", "float16")
SAMPLINGS = ("shuffle", "replacement", "sequential")
STRATEGIES = ("ddp", "fsdp")


class ConfigError(ValueError):
    """Report a setting that is not usable, in one line: the argument, the value seen, the rule and the fix.

    Args:
        argument: name of the field or parameter.
        value: what was given.
        rule: what it has to be, and a way out.
    """

    def __init__(self, argument: str, value: object, rule: str) -> None:
        """Keep the three parts, for the command line to name its option instead of the field."""
        super().__init__(f"{argument}={value!r}: {rule}")
        self.argument = argument
        self.value = value
        self.rule = rule


def option(
    default: Any,
    text: str,
    *,
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    fixed: bool = False,
) -> Any:
    """Declare a dataclass field with its help text and the bounds that `check_options` holds it to.

    Args:
        default: the default value.
        text: one line for the help of the command line.
        least: smallest allowed value, itself included.
        above: the value has to be larger than this.
        below: the value has to be smaller than this.
        most: largest allowed value, itself included.
        choices: the allowed words.
        metavar: the placeholder that the help shows.
        fixed: a run that is resumed cannot change it.
    """
    bounds = {"at least": least, "above": above, "below": below, "at most": most}
    metadata = {"help": text, "choices": choices, "metavar": metavar, "bounds": bounds, "fixed": fixed}
    return dataclasses.field(default=default, metadata=metadata)


def _rule(kind: Any, metadata: Mapping[str, Any]) -> str:
    if metadata["choices"]:
        return f"give one of {', '.join(metadata['choices'])}"
    words = {int: "a whole number", float: "a finite number", bool: "True or False", str: "a text"}
    bounds = [f"{word} {bound:g}" for word, bound in metadata["bounds"].items() if bound is not None]
    return " ".join(["give", words[kind], " and ".join(bounds)]).strip()


def _fits(value: Any, kind: Any, metadata: Mapping[str, Any]) -> bool:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        return False
    if metadata["choices"]:
        return value in metadata["choices"]
    bounds = metadata["bounds"]
    return (
        (bounds["at least"] is None or value >= bounds["at least"])
        and (bounds["above"] is None or value > bounds["above"])
        and (bounds["below"] is None or value < bounds["below"])
        and (bounds["at most"] is None or value <= bounds["at most"])
    )


def kinds_of(hint: Any) -> list[Any]:
    """Return the type of a field's value, or those of the values in its tuple.

    Args:
        hint: its type; None beside it is left out.
    """
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if get_origin(hint) is not tuple and len(kinds) == 1 and get_origin(kinds[0]) is tuple:
        return kinds_of(kinds[0])
    return kinds or [hint]


def check_options(options: Any) -> None:
    """Check every field of a dataclass instance that was declared with `option`.

    Args:
        options: the instance; fields are int, float, bool, str, tuples of these, or one of these or None.

    Raises:
        ConfigError: a value of another type or outside its bounds.
    """
    hints = get_type_hints(type(options))
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        hint = hints[field.name]
        if value is None and type(None) in get_args(hint):
            continue
        kinds = kinds_of(hint)
        if isinstance(value, tuple):
            fits = len(value) == len(kinds)
            fits = fits and all(_fits(v, k, field.metadata) for v, k in zip(value, kinds, strict=True))
        else:
            fits = len(kinds) == 1 and _fits(value, kinds[0], field.metadata)
        if not fits:
            rule = _rule(kinds[0], field.metadata)
            several = f"give {len(kinds)} values, each "
            raise ConfigError(field.name, value, rule if len(kinds) == 1 else several + rule[len("give ") :])


@dataclasses.dataclass(kw_only=True)
class TrainerConfig:
    """Settings of the training loop; the defaults are a recipe for small models on a laptop.

    A token is a target that counts in the loss. `warmup_tokens=None` is 5 % of `final_tokens`, and
    `final_tokens=None` is what the whole run will see, estimated from the first step. With `warmup_steps` the
    schedule counts optimizer steps instead, and ends with the run; "noam" always does, with 4,000 steps of
    warm-up unless told otherwise (Vaswani et al. 2017). The formulas are at `learning_rate_multiplier`, those
    of the optimizers at `nlpfast.optim.build_optimizer`.

    The run ends at `max_steps` or `max_epochs`, whichever comes first; with neither it takes 2,000 steps. An
    evaluation is better than all before it by its score, or by its validation loss where there is no score:
    `plateau_patience` and `early_stop` count those that are not.

    Raises:
        ConfigError: a value outside its bounds, or two that exclude each other.
    """

    max_steps: int | None = option(None, "optimizer steps (2000 when --max-epochs is not given)", least=1)
    max_epochs: int | None = option(None, "passes over the training data", least=1)
    batch_size: int = option(12, "examples in a forward pass", least=1, fixed=True)
    accumulation_steps: int = option(1, "forward passes in one optimizer step", least=1, fixed=True)
    optimizer: str = option(
        "adamw", "adam's and sgd's weight decay is L2, sgd has no momentum", choices=OPTIMIZERS, fixed=True
    )
    learning_rate: float = option(2e-3, "peak learning rate; with --schedule noam its factor", above=0)
    betas: tuple[float, float] = option(
        (0.9, 0.99), "decay rates of the two averages of adamw, adam and adamax", least=0, below=1
    )
    weight_decay: float = option(0.1, "weight decay, on the weights of Linear layers", least=0)
    grad_norm_clip: float | None = option(1.0, "largest norm of the whole gradient", above=0)
    schedule: str = option("cosine", "learning rate by tokens, or by --warmup-steps", choices=SCHEDULES)
    warmup_tokens: int | None = option(None, "tokens of linear warm-up (5 % of the run)", least=0)
    final_tokens: int | None = option(None, "tokens at the end of the cosine (those of the run)", least=1)
    warmup_steps: int | None = option(
        None, "steps of linear warm-up; the schedule counts steps then (4000 with noam)", least=0
    )
    plateau_patience: int = option(
        3, "evaluations without a better one until --schedule plateau halves the learning rate", least=1
    )
    early_stop: int | None = option(None, "evaluations without a better one that end the run (none)", least=1)
    average: int = option(
        0, "keep the models of the last N evaluations, step-*/, and write their mean to averaged/", least=0
    )
    dtype: str = option("float32", "precision of the forward pass, through autocast", choices=DTYPES)
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")
    seed: int = option(0, "seed of initial weights, data order and dropout", least=0, below=2**63, fixed=True)
    sampling: str = option("shuffle", "order of the examples", choices=SAMPLINGS, fixed=True)
    num_workers: int = option(0, "processes that load data", least=0)
    eval_every: int = option(250, "steps between evaluations, with a checkpoint each", least=1)
    eval_batches: int | None = option(None, "batches of an evaluation (all of them)", least=1)
    eval_batch_size: int | None = option(None, "examples in a batch of an evaluation (4 batches)", least=1)
    save_every: int | None = option(None, "steps between checkpoints (those of the evaluations)", least=1)
    log_every: int = option(50, "steps between two lines of the log", least=1)
    skip_nonfinite: int = option(0, "steps to leave out for a loss or gradient that is not finite", least=0)
    strategy: str = option("ddp", "how several processes share the model", choices=STRATEGIES)
    tensorboard: bool = option(False, "also write TensorBoard events")

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if self.max_steps is None and self.max_epochs is None:
            self.max_steps = 2000
        self._check_schedule()

    def _check_schedule(self) -> None:
        warmup, final, steps = self.warmup_tokens, self.final_tokens, self.warmup_steps
        schedule = self.schedule
        if schedule in ("noam", "inverse_sqrt"):
            if final is not None:
                raise ConfigError("final_tokens", final, f"schedule {schedule} has no end, leave it out")
            for name, value in (("warmup_tokens", warmup), ("warmup_steps", steps)):
                if value == 0:
                    raise ConfigError(name, 0, f"schedule {schedule} begins with a warm-up, give at least 1")
        if schedule == "noam" and warmup is not None:
            raise ConfigError("warmup_tokens", warmup, "schedule noam counts steps, give warmup_steps")
        for name, value in (("warmup_tokens", warmup), ("final_tokens", final)):
            if value is not None and steps is not None:
                rule = f"give {name}, which is {value}, or this: a schedule counts tokens or steps"
                raise ConfigError("warmup_steps", steps, rule)
        if warmup is not None and final is not None and warmup >= final and schedule != "constant":
            raise ConfigError("warmup_tokens", warmup, f"give less than final_tokens, which is {final}")
