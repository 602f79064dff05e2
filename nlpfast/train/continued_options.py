"""Options of what goes on with translators that are trained: on which pairs of sentences, evaluated how."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from nlpfast.train.config import ConfigError, check_options, option
from nlpfast.train.translation_options import TranslationOptions

__all__ = ["ContinuedOptions"]

OF_TRANSLATION = (
    *("source", "target", "columns", "valid", "max_length", "max_ratio", "max_tokens"),
    *("eval_beam", "eval_sentences"),
)


@dataclasses.dataclass(kw_only=True)
class ContinuedOptions:
    """Which pairs of sentences, and where results go; a base of the options of tasks.

    Attributes:
        named: what a task needs and has no default for.

    Raises:
        ConfigError: a value outside its bounds, or a name is missing.
    """

    source: str | None = option(None, "sentences, one a line; or a TSV file", metavar="SRC")
    target: str | None = option(None, "their translations, line by line", metavar="TGT")
    columns: tuple[int, int] = option((1, 2), "of a TSV file: source and target, from 1", least=1)
    valid: tuple[str, str] | None = option(
        None, "two files to evaluate on (the last twentieth of the text, 1000 pairs at most)", metavar="FILE"
    )
    output_dir: str = option("runs/continued", "folder for log, checkpoints and models", metavar="DIR")
    overwrite: bool = option(False, "replace the checkpoints of an earlier run in --output-dir")
    max_length: int = option(
        256, "longer sentences, in subwords, are skipped", least=2, most=1024, fixed=True
    )
    max_ratio: float | None = option(
        None, "skip pairs of which a side has more times as many subwords (none)", least=1, fixed=True
    )
    max_tokens: int = option(2048, "subwords of either side in a batch", least=2, fixed=True)
    eval_beam: int = option(1, "hypotheses of a sentence in an evaluation", least=1)
    eval_sentences: int = option(1000, "sentences that an evaluation translates, at most", least=1)

    named: ClassVar[tuple[str, ...]] = ("source",)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        for name in ("output_dir", *self.named, "target"):
            if getattr(self, name) == "":
                raise ConfigError(name, "", "give a name")
        if self.max_tokens < self.max_length:
            rule = f"a batch must hold a sentence of --max-length {self.max_length}; raise it, or lower that"
            raise ConfigError("max_tokens", self.max_tokens, rule)
        for name in self.named:
            if getattr(self, name) is None:
                raise ConfigError(name, None, "is missing, name it")

    def of_translation(self, model: str) -> TranslationOptions:
        """Return what reads the text and evaluates, as options of ordinary training.

        Args:
            model: kind of the model.
        """
        return TranslationOptions(model=model, **{name: getattr(self, name) for name in OF_TRANSLATION})
