"""Options of minimum risk training. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from nlpfast.sentence_rewards import REWARDS
from nlpfast.train.config import option
from nlpfast.train.continued_options import ContinuedOptions
from nlpfast.train.translation_options import TranslationConfig

__all__ = ["MrtConfig", "MrtOptions"]


@dataclasses.dataclass(kw_only=True)
class MrtConfig(TranslationConfig):
    """Settings of the training loop for minimum risk training: of a model that can translate already.

    Raises:
        ConfigError: a value outside its bounds.
    """

    optimizer: str = option(
        "adam",
        "adam's and sgd's weight decay is L2, sgd has no momentum",
        choices=("adamw", "adam", "adamax", "sgd"),
        fixed=True,
    )
    learning_rate: float = option(1e-4, "peak learning rate; with --schedule noam its factor", above=0)
    grad_norm_clip: float | None = option(5.0, "largest norm of the whole gradient", above=0)


@dataclasses.dataclass(kw_only=True)
class MrtOptions(ContinuedOptions):
    """Which translator is to raise the reward of its samples, on what text, and where results go.

    Raises:
        ConfigError: a value outside its bounds, or a name is missing.
    """

    model: str | None = option(None, "run of the translator that it starts from", metavar="RUN")
    output_dir: str = option("runs/mrt", "folder for log, checkpoints and the model", metavar="DIR")

    reward: str = option("bleu", "of a sample, from 0 to 1", choices=tuple(REWARDS))
    samples: int = option(1, "translations of a sentence that are made more or less probable", least=1)
    baseline_samples: int = option(
        2, "more of them, for the reward to expect; 0: each of --samples expects that of the others", least=0
    )
    temperature: float = option(1.0, "of sampling; with another than 1 the gradient is not exact", above=0)
    max_len_a: float = option(1.5, "a sample has at most a * subwords of the source + b", least=0)
    max_len_b: int = option(20, "b", least=1, most=1000)
    nll_weight: float = option(0.0, "of cross entropy, the sum over a sentence, beside the reward", least=0)

    named = ("source", "model")
