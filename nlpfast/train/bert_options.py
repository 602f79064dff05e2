"""Options of BERT's tasks, and the sizes of its models. Nothing here imports torch."""

from __future__ import annotations

import dataclasses

from nlpfast.train.config import ConfigError, check_options, option

__all__ = ["SIZES", "BertPretrainingOptions"]

MASKINGS = ("pieces", "words", "ngrams")
# Turc et al. 2019, "Well-Read Students Learn Better": layers, channels; a head has 64 channels
SIZES = {"tiny": (2, 128), "mini": (4, 256), "small": (4, 512), "medium": (8, 512), "base": (12, 768)}


@dataclasses.dataclass(kw_only=True)
class BertPretrainingOptions:
    """Which text to pretrain a BERT on, its pieces and their masking, the model, and where results go.

    Raises:
        ConfigError: a value outside its bounds.
    """

    text: str | None = option(
        None, "sentences, one a line, blank lines between documents (embedded biographies)", metavar="FILE"
    )
    biographies: int = option(
        2000, "how many embedded biographies, without a text", least=10, most=5000, fixed=True
    )
    output_dir: str = option("runs/bert", "folder for log, checkpoints and the model", metavar="DIR")
    overwrite: bool = option(False, "replace the checkpoints of an earlier run in --output-dir")
    model: str | None = option(
        None, "BERT to go on with, a folder or a name on the Hugging Face hub", metavar="NAME", fixed=True
    )
    vocab: str | None = option(
        None,
        "folder with the vocabulary (that of --model, or one made of the text)",
        metavar="DIR",
        fixed=True,
    )
    vocab_size: int = option(8000, "pieces of a vocabulary made of the text", least=10, fixed=True)
    cased: bool = option(False, "a vocabulary made of the text has capitals", fixed=True)
    config: str = option("tiny", "size of a new model", choices=tuple(SIZES), fixed=True)
    dropout: float = option(0.1, "dropout of hidden states and attention", least=0, most=1, fixed=True)
    max_length: int = option(128, "pieces the model sees at once", least=8, most=512, fixed=True)
    masking: str = option("pieces", "what is hidden", choices=MASKINGS, fixed=True)
    no_nsp: bool = option(False, "single sentences, without next sentence prediction", fixed=True)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        for name in ("output_dir", "model", "vocab"):
            if getattr(self, name) == "":
                raise ConfigError(name, "", "give the name of a folder")
