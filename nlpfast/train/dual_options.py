"""Options of dual learning. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from nlpfast.train.config import option
from nlpfast.train.continued_options import ContinuedOptions
from nlpfast.train.translation_options import WITHOUT as OF_ONE_TRANSLATOR
from nlpfast.train.translation_options import TranslationConfig

__all__ = ["WITHOUT", "DualConfig", "DualOptions"]

# of the trainer, that a task with two models and batches by tokens has no use for
WITHOUT = (*OF_ONE_TRANSLATOR, "average")


@dataclasses.dataclass(kw_only=True)
class DualConfig(TranslationConfig):
    """Settings of the training loop for dual learning: of two models that can translate already.

    Raises:
        ConfigError: a value outside its bounds.
    """

    learning_rate: float = option(5e-4, "peak learning rate; with --schedule noam its factor", above=0)
    grad_norm_clip: float | None = option(
        None, "largest norm of the gradient of each translator (no limit)", above=0
    )


@dataclasses.dataclass(kw_only=True)
class DualOptions(ContinuedOptions):
    """Which two translators are to teach each other, on what text, and where results go.

    Raises:
        ConfigError: a value outside its bounds, or a name is missing.
    """

    forward: str | None = option(None, "run of the translator from source to target", metavar="RUN")
    backward: str | None = option(None, "run of the translator from target to source", metavar="RUN")
    lm_source: str | None = option(None, "run of the source's language model", metavar="RUN")
    lm_target: str | None = option(None, "run of the target's language model", metavar="RUN")
    output_dir: str = option("runs/dual", "folder for log, checkpoints and both models", metavar="DIR")

    dsl_lambda: float = option(1e-2, "how much it counts that the two agree; 0 trains them apart", least=0)
    dsl_warmup_epochs: int = option(2, "epochs at the beginning in which it does not count", least=0)
    length_norm: bool = option(False, "let the log-probability of a token agree, not that of a sentence")

    choose_by: str = option("bleu", "what makes an evaluation the best", choices=("bleu", "loss"), fixed=True)

    named = ("source", "forward", "backward", "lm_source", "lm_target")
