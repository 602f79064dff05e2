"""Options of training a translation model. Nothing here imports torch."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from nlpfast.train.config import ConfigError, TrainerConfig, check_options, option

__all__ = ["ALIGNED", "CRITERIA", "WITHOUT", "TranslationConfig", "TranslationOptions"]

Config = TypeVar("Config", bound="TranslationConfig")

ALIGNED = "label_smoothed_cross_entropy_with_alignment"
CRITERIA = ("label_smoothed_cross_entropy", ALIGNED)
MODELS = ("transformer", "rnn")
# steps of warm-up, at most
WARMUP = 400
# of the trainer, that a task with batches by tokens has no use for
WITHOUT = ("batch_size", "eval_batch_size", "eval_batches", "sampling", "strategy")


@dataclasses.dataclass(kw_only=True)
class TranslationConfig(TrainerConfig):
    """Settings of the training loop for translation: a batch is of tokens, an evaluation comes every epoch.

    Raises:
        ConfigError: a value outside its bounds.
    """

    # a batch of the data set is one of its items
    batch_size: int = option(1, "batches of --max-tokens in a forward pass", least=1, most=1, fixed=True)
    optimizer: str = option(
        "adamax",
        "adam's and sgd's weight decay is L2, sgd has no momentum",
        choices=("adamw", "adam", "adamax", "sgd"),
        fixed=True,
    )
    learning_rate: float = option(2e-3, "peak learning rate; with --schedule noam its factor", above=0)
    betas: tuple[float, float] = option(
        (0.9, 0.98), "decay rates of the two averages of adamw, adam and adamax", least=0, below=1
    )
    weight_decay: float = option(0.0, "weight decay, on the weights of Linear layers", least=0)
    grad_norm_clip: float | None = option(0.2, "largest norm of the whole gradient", above=0)
    eval_every: int | None = option(  # type: ignore[assignment]
        None, "steps between evaluations, with a checkpoint each (those of an epoch)", least=1
    )

    def __post_init__(self) -> None:
        """Check every value; ten epochs where nothing else is said."""
        if self.max_steps is None and self.max_epochs is None:
            self.max_epochs = 10
        super().__post_init__()

    def planned(self: Config, steps: int) -> Config:
        """Return the settings of a run of which an epoch has so many steps, as far as they follow from it.

        Without a word of it a run is evaluated once an epoch, and its warm-up takes an eighth of its steps,
        400 at most.

        Args:
            steps: optimizer steps of an epoch.
        """
        limits = (self.max_steps, self.max_epochs and steps * self.max_epochs)
        total = min(limit for limit in limits if limit)
        changes: dict[str, Any] = {}
        if self.eval_every is None:
            changes["eval_every"] = steps
        given = (self.warmup_steps, self.warmup_tokens, self.final_tokens)
        if self.schedule != "noam" and given == (None, None, None):
            changes["warmup_steps"] = max(1, min(WARMUP, total // 8))
        return dataclasses.replace(self, **changes)


@dataclasses.dataclass(kw_only=True)
class TranslationOptions:
    """Which parallel text to train on, its subwords and alignments, the model, and where results go.

    Raises:
        ConfigError: a value outside its bounds, or two that exclude each other.
    """

    source: str | None = option(
        None, "sentences, one a line; or a TSV file (an invented language)", metavar="SRC"
    )
    target: str | None = option(None, "their translations, line by line", metavar="TGT")
    columns: tuple[int, int] = option((1, 2), "of a TSV file: source and target, from 1", least=1)
    valid: tuple[str, str] | None = option(
        None, "two files to evaluate on (the last twentieth of the text, 1000 pairs at most)", metavar="FILE"
    )
    pairs: int = option(
        4000, "how many sentences of the invented languages", least=100, most=100_000, fixed=True
    )
    output_dir: str = option("runs/translation", "folder for log, checkpoints and the model", metavar="DIR")
    overwrite: bool = option(False, "replace the checkpoints of an earlier run in --output-dir")
    vocab: str | None = option(
        None,
        "vocabulary of both languages, or of the source (one made of the text)",
        metavar="DIR",
        fixed=True,
    )
    target_vocab: str | None = option(None, "vocabulary of the target (--vocab)", metavar="DIR", fixed=True)
    vocab_size: int = option(
        8000, "subwords of a vocabulary made of the text", least=10, most=1_000_000, fixed=True
    )
    separate: bool = option(False, "make a vocabulary of each language instead of one of both", fixed=True)
    bpe_dropout: float = option(
        0.0, "how often a pair of subwords is not joined", least=0, below=1, fixed=True
    )
    max_length: int = option(
        256, "longer sentences, in subwords, are skipped", least=2, most=1024, fixed=True
    )
    max_ratio: float | None = option(
        None, "skip pairs of which a side has more times as many subwords (none)", least=1, fixed=True
    )
    max_tokens: int | None = option(
        None, "subwords of either side in a batch (2048; 512 of the invented languages)", least=2, fixed=True
    )

    model: str = option("transformer", "kind of model", choices=MODELS, fixed=True)
    encoder_layers: int = option(3, "layers of the transformer that read", least=1, fixed=True)
    decoder_layers: int = option(3, "layers of the transformer that write", least=1, fixed=True)
    d_model: int = option(256, "width of the transformer", least=1, fixed=True)
    heads: int = option(4, "attention heads of a layer", least=1, fixed=True)
    d_ff: int = option(1024, "width in the middle of a layer", least=1, fixed=True)
    activation: str = option("relu", "in the middle of a layer", choices=("relu", "gelu"), fixed=True)
    norm: str = option(
        "pre", "normalise before a part of a layer, or after", choices=("pre", "post"), fixed=True
    )
    positions: str = option(
        "sinusoidal", "how the transformer tells places", choices=("sinusoidal", "learned"), fixed=True
    )
    tied: str = option(
        "all", "embeddings that are one: with the output", choices=("all", "decoder", "none"), fixed=True
    )
    embed_size: int = option(256, "width of the RNN's embeddings", least=1, fixed=True)
    hidden_size: int = option(512, "width of the RNN", least=1, fixed=True)
    attention: str = option(
        "multiplicative", "scores of the RNN", choices=("multiplicative", "dot", "additive"), fixed=True
    )
    dropout: float = option(0.2, "of embeddings and of what a layer adds", least=0, most=1, fixed=True)
    attention_dropout: float = option(0.0, "of attention, in the transformer", least=0, most=1, fixed=True)
    activation_dropout: float = option(0.0, "in the middle of a layer", least=0, most=1, fixed=True)

    criterion: str = option(CRITERIA[0], "what is minimised", choices=CRITERIA, fixed=True)
    label_smoothing: float = option(0.1, "probability that labels give away", least=0, most=1, fixed=True)
    alignments: str | None = option(
        None, "word alignments of the text, Pharaoh format", metavar="FILE", fixed=True
    )
    alignment_level: str = option("word", "what they link", choices=("word", "subword"), fixed=True)
    alignment_lambda: float = option(0.05, "weight of the alignments", least=0, fixed=True)
    alignment_layer: int | None = option(
        None, "decoder layer that is to align, from 0; -1 is the last (-3, or the last of fewer)", fixed=True
    )
    alignment_heads: int = option(1, "the first so many of its heads", least=1, fixed=True)
    align_shift: int = option(
        0, "0: the step that predicts a word aligns it, 1: the one that reads it", least=0, most=1, fixed=True
    )
    full_context: bool = option(False, "align in a second pass, which sees the whole target", fixed=True)

    choose_by: str = option("bleu", "what makes an evaluation the best", choices=("bleu", "loss"), fixed=True)
    eval_beam: int = option(1, "hypotheses of a sentence in an evaluation", least=1)
    eval_sentences: int = option(1000, "sentences that an evaluation translates, at most", least=1)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if self.max_tokens is None:
            # an epoch of few sentences has too few steps otherwise
            self.max_tokens = 2048 if self.source is not None else 512
        for name in ("output_dir", "vocab", "target_vocab", "source", "target", "alignments"):
            if getattr(self, name) == "":
                raise ConfigError(name, "", "give a name")
        self._check_files()
        self._check_model()
        aligned = self.criterion == ALIGNED
        if aligned and self.source is not None and self.alignments is None:
            raise ConfigError("criterion", self.criterion, "needs word alignments, add --alignments")
        if self.alignments is not None and not aligned:
            rule = f"alignments are for --criterion {ALIGNED}; add it, or leave them out"
            raise ConfigError("alignments", self.alignments, rule)
        if aligned and self.bpe_dropout:
            rule = "changes the subwords that alignments link, leave out one of the two"
            raise ConfigError("bpe_dropout", self.bpe_dropout, rule)
        if self.max_tokens < self.max_length:
            rule = f"a batch must hold a sentence of --max-length {self.max_length}; raise it, or lower that"
            raise ConfigError("max_tokens", self.max_tokens, rule)

    def _check_files(self) -> None:
        if self.source is None:
            for name in ("target", "valid", "alignments"):
                if getattr(self, name) is not None:
                    value = getattr(self, name)
                    raise ConfigError(name, value, "is given without a source text, name that first")
        if self.target_vocab is not None:
            if self.vocab is None:
                raise ConfigError("target_vocab", self.target_vocab, "is given without --vocab, the source's")
            if self.tied == "all":
                rule = "two vocabularies have no embedding in common, add --tied decoder or --tied none"
                raise ConfigError("target_vocab", self.target_vocab, rule)
        if self.separate and self.vocab is not None:
            raise ConfigError("separate", True, "is for a vocabulary made of the text, leave out --vocab")
        if self.separate and self.tied == "all" and self.model == "transformer":
            raise ConfigError("separate", True, "two vocabularies share nothing, add --tied decoder")

    def _check_model(self) -> None:
        if self.model == "rnn":
            if self.criterion == ALIGNED:
                raise ConfigError("criterion", self.criterion, "is for the transformer, leave one out")
            if self.tied == "decoder" and self.embed_size != self.hidden_size:
                raise ConfigError("tied", self.tied, "needs --embed-size as --hidden-size, change one")
            return
        if self.d_model % self.heads:
            raise ConfigError("d_model", self.d_model, f"give a multiple of --heads, {self.heads}")
        if self.alignment_heads > self.heads:
            raise ConfigError("alignment_heads", self.alignment_heads, f"there are {self.heads} heads")
        layers = self.decoder_layers
        if self.alignment_layer is not None and not -layers <= self.alignment_layer < layers:
            rule = f"the decoder has the layers 0..{layers - 1}, or -{layers}..-1 from the last"
            raise ConfigError("alignment_layer", self.alignment_layer, rule)
