"""The files of a language model: config.json and model.safetensors of either kind, and `vocab/`."""

from __future__ import annotations

from pathlib import Path

from nlpfast.data.subwords import Subwords
from nlpfast.models import pretrained
from nlpfast.models.gpt import GPT
from nlpfast.models.rnnlm import RNNLM

__all__ = ["VOCAB", "load_language_model", "load_vocabulary", "save_vocabulary"]

# folder of the vocabulary beside a model
VOCAB = "vocab"
KINDS: dict[str, type[GPT] | type[RNNLM]] = {"gpt": GPT, "rnnlm": RNNLM}


def load_language_model(folder: str | Path) -> GPT | RNNLM:
    """Read a language model of either kind.

    Args:
        folder: holds config.json and model.safetensors.

    Raises:
        OSError: a file is missing or unreadable; names it.
        ValueError: a file is damaged, or of another kind of model; names it.
    """
    # a file that names none is a GPT's, as that has it
    kind = pretrained.model_type(folder) or "gpt"
    if kind not in KINDS:
        path = Path(folder) / pretrained.CONFIG_FILE
        raise ValueError(f"{path}: model_type is {kind!r}, which is no language model; name another model")
    return KINDS[kind].from_pretrained(folder)


def save_vocabulary(folder: str | Path, vocabulary: Subwords) -> None:
    """Write the vocabulary of a language model of sentences to `vocab/` in its folder.

    Args:
        folder: of the model.
        vocabulary: of its tokens.

    Raises:
        OSError: a file cannot be written; names it.
    """
    vocabulary.save(Path(folder) / VOCAB)


def load_vocabulary(folder: str | Path) -> Subwords:
    """Return the vocabulary that `save_vocabulary` wrote.

    Args:
        folder: of the model.

    Raises:
        DataError: it is missing or damaged.
    """
    return Subwords.from_folder(Path(folder) / VOCAB)
