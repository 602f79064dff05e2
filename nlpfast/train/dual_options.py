"""Options of dual learning. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from nlpfast.train.config import ConfigError, check_options, option
from nlpfast.train.translation_options import TranslationConfig

__all__ = ["WITHOUT", "DualConfig", "DualOptions"]

# of the trainer, that a task with two models and batches by tokens has no use for
WITHOUT = (*("batch_size", "eval_batch_size", "eval_batches", "sampling", "strategy", "average"),)

# what has no default
NAMED = ("source", "forward", "backward", "lm_source", "lm_target")


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
class DualOptions:
    """Which two translators are to teach each other, on what text, and where results go.

    Raises:
        ConfigError: a value outside its bounds, or a name is missing.
    """

    source: str | None = option(None, "sentences, one a line; or a TSV file", metavar="SRC")
    target: str | None = option(None, "their translations, line by line", metavar="TGT")
    columns: tuple[int, int] = option((1, 2), "of a TSV file: source and target, from 1", least=1)
    valid: tuple[str, str] | None = option(
        None, "two files to evaluate on (the last twentieth of the text, 1000 pairs at most)", metavar="FILE"
    )
    forward: str | None = option(None, "run of the translator from source to target", metavar="RUN")
    backward: str | None = option(None, "run of the translator from target to source", metavar="RUN")
    lm_source: str | None = option(None, "run of the source's language model", metavar="RUN")
    lm_target: str | None = option(None, "run of the target's language model", metavar="RUN")
    output_dir: str = option("runs/dual", "folder for log, checkpoints and both models", metavar="DIR")
    overwrite: bool = option(False, "replace the checkpoints of an earlier run in --output-dir")

    dsl_lambda: float = option(1e-2, "how much it counts that the two agree; 0 trains them apart", least=0)
    dsl_warmup_epochs: int = option(2, "epochs at the beginning in which it does not count", least=0)
    length_norm: bool = option(False, "let the log-probability of a token agree, not that of a sentence")

    max_length: int = option(
        256, "longer sentences, in subwords, are skipped", least=2, most=1024, fixed=True
    )
    max_ratio: float | None = option(
        None, "skip pairs of which a side has more times as many subwords (none)", least=1, fixed=True
    )
    max_tokens: int = option(2048, "subwords of either side in a batch", least=2, fixed=True)

    choose_by: str = option("bleu", "what makes an evaluation the best", choices=("bleu", "loss"), fixed=True)
    eval_beam: int = option(1, "hypotheses of a sentence in an evaluation", least=1)
    eval_sentences: int = option(1000, "sentences that an evaluation translates, at most", least=1)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        for name in ("output_dir", *NAMED, "target"):
            if getattr(self, name) == "":
                raise ConfigError(name, "", "give a name")
        if self.max_tokens < self.max_length:
            rule = f"a batch must hold a sentence of --max-length {self.max_length}; raise it, or lower that"
            raise ConfigError("max_tokens", self.max_tokens, rule)
        for name in NAMED:
            if getattr(self, name) is None:
                raise ConfigError(name, None, "is not given, and there is no default: name one")
