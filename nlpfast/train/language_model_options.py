"""Options of training a language model, on characters or on sentences. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from nlpfast.train.config import ConfigError, check_options, option

__all__ = ["LanguageModelOptions"]

# layers of a kind of model, unless there is a word of it
LAYERS = {"gpt": 4, "rnn": 1}


@dataclasses.dataclass(kw_only=True)
class LanguageModelOptions:
    """Which text to train a language model on, the model's kind and size, and where results go.

    Without a vocabulary the model is one of the characters of the text, with a vocabulary of its sentences.

    Raises:
        ConfigError: a value outside its bounds, or two that exclude each other.
    """

    text: str | None = option(None, "UTF-8 text to train on (embedded biographies)", metavar="FILE")
    vocab: str | None = option(
        None,
        "take the text for sentences, one a line, and this vocabulary of `nlpfast vocab bpe` (characters)",
        metavar="DIR",
        fixed=True,
    )
    valid: str | None = option(
        None,
        "with --vocab: sentences to evaluate on (the last twentieth of the text, 1000 at most)",
        metavar="FILE",
    )
    max_length: int = option(
        256,
        "with --vocab: longer sentences, in subwords with their end, are skipped",
        least=2,
        most=1024,
        fixed=True,
    )
    biographies: int = option(
        2000, "how many embedded biographies, without --text", least=1, most=5000, fixed=True
    )
    output_dir: str = option("runs/lm", "folder for the log and the checkpoints", metavar="DIR")
    overwrite: bool = option(False, "replace the checkpoints of an earlier run in --output-dir")
    model: str = option("gpt", "kind of model", choices=("gpt", "rnn"), fixed=True)
    n_layer: int | None = option(
        None, "blocks of the GPT (4), or layers of the RNN's LSTM (1)", least=1, fixed=True
    )
    n_head: int = option(4, "attention heads of a block", least=1, fixed=True)
    n_embd: int = option(128, "width of the GPT", least=1, fixed=True)
    embed_size: int = option(256, "width of the RNN's embeddings", least=1, fixed=True)
    hidden_size: int = option(512, "width of the RNN", least=1, fixed=True)
    block_size: int = option(64, "characters the model sees at once, without --vocab", least=1, fixed=True)
    dropout: float = option(
        0.0, "dropout of embeddings, and of what attention and layers give", least=0, most=1, fixed=True
    )

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if self.n_layer is None:
            self.n_layer = LAYERS[self.model]
        if self.model == "gpt" and self.n_embd % self.n_head:
            raise ConfigError("n_embd", self.n_embd, f"give a multiple of n_head, which is {self.n_head}")
        for name in ("vocab", "valid"):
            if getattr(self, name) == "":
                raise ConfigError(name, "", "give a name")
        if not self.output_dir:
            raise ConfigError("output_dir", self.output_dir, "give the name of a folder")
        if self.vocab is not None and self.text is None:
            raise ConfigError("vocab", self.vocab, "is of sentences, name their file by --text too")
        if self.valid is not None and self.vocab is None:
            raise ConfigError("valid", self.valid, "sentences need a vocabulary, add --vocab")
