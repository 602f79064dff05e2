"""Options of minimum risk training. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from nlpfast.sentence_rewards import REWARDS
from nlpfast.train.config import ConfigError, check_options, option
from nlpfast.train.translation_options import TranslationConfig, TranslationOptions

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
class MrtOptions:
    """Which translator is to raise the reward of its samples, on what text, and where results go.

    Raises:
        ConfigError: a value outside its bounds, or a name that is missing.
    """

    source: str | None = option(None, "sentences, one a line; or a TSV file", metavar="SRC")
    target: str | None = option(None, "their translations, line by line", metavar="TGT")
    columns: tuple[int, int] = option((1, 2), "of a TSV file: source and target, from 1", least=1)
    valid: tuple[str, str] | None = option(
        None, "two files to evaluate on (the last twentieth of the text, 1000 pairs at most)", metavar="FILE"
    )
    model: str | None = option(None, "run of the translator that it starts from", metavar="RUN")
    output_dir: str = option("runs/mrt", "folder for log, checkpoints and the model", metavar="DIR")
    overwrite: bool = option(False, "replace the checkpoints of an earlier run in --output-dir")

    reward: str = option("bleu", "of a sample, from 0 to 1", choices=tuple(REWARDS))
    samples: int = option(1, "translations of a sentence that are made more or less probable", least=1)
    baseline_samples: int = option(
        2, "more of them, for the reward to expect; 0: each of --samples expects that of the others", least=0
    )
    temperature: float = option(1.0, "of sampling; with another than 1 the gradient is not exact", above=0)
    max_len_a: float = option(1.5, "a sample has at most a * subwords of the source + b", least=0)
    max_len_b: int = option(20, "b", least=1, most=1000)
    nll_weight: float = option(0.0, "of cross entropy, the sum over a sentence, beside the reward", least=0)

    max_length: int = option(
        256, "longer sentences, in subwords, are skipped", least=2, most=1024, fixed=True
    )
    max_ratio: float | None = option(
        None, "skip pairs of which a side has more times as many subwords (none)", least=1, fixed=True
    )
    max_tokens: int = option(2048, "subwords of either side in a batch", least=2, fixed=True)

    eval_beam: int = option(1, "hypotheses of a sentence in an evaluation", least=1)
    eval_sentences: int = option(1000, "sentences that an evaluation translates, at most", least=1)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if not self.output_dir:
            raise ConfigError("output_dir", self.output_dir, "give a name")
        for name in ("source", "model"):
            if not getattr(self, name):
                raise ConfigError(name, getattr(self, name), "is missing, name it")
        if self.max_tokens < self.max_length:
            rule = f"a batch must hold a sentence of --max-length {self.max_length}; raise it, or lower that"
            raise ConfigError("max_tokens", self.max_tokens, rule)

    def of_translation(self, model: str) -> TranslationOptions:
        """Return what reads the text and evaluates, as options of ordinary training.

        Args:
            model: kind of the model.
        """
        names = ("source", "target", "columns", "valid", "max_length", "max_ratio", "max_tokens")
        shared = {name: getattr(self, name) for name in (*names, "eval_beam", "eval_sentences")}
        return TranslationOptions(model=model, **shared)
