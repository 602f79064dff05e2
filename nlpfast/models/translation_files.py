"""The files of a translation model: config.json and model.safetensors of either kind, and `vocab/`."""

from __future__ import annotations

from pathlib import Path

from nlpfast.data.subwords import Subwords
from nlpfast.models import pretrained
from nlpfast.models.seq2seq import Seq2Seq
from nlpfast.models.transformer import Transformer

__all__ = ["VOCAB", "load_model", "load_vocabularies", "save_vocabularies"]

# folder of the vocabulary beside a model, or of both vocabularies in it
VOCAB, SIDES = "vocab", ("source", "target")
KINDS: dict[str, type[Transformer] | type[Seq2Seq]] = {
    "transformer": Transformer,
    "seq2seq": Seq2Seq,
}


def load_model(folder: str | Path) -> Transformer | Seq2Seq:
    """Read a translation model of either kind.

    Args:
        folder: holds config.json and model.safetensors.

    Raises:
        OSError: a file is missing or unreadable; names it.
        ValueError: a file is damaged, or of another kind of model; names it.
    """
    kind = pretrained.model_type(folder)
    if kind not in KINDS:
        path = Path(folder) / pretrained.CONFIG_FILE
        raise ValueError(f"{path}: model_type is {kind!r}, which does not translate; name another model")
    return KINDS[kind].from_pretrained(folder)


def save_vocabularies(folder: str | Path, source: Subwords, target: Subwords) -> None:
    """Write the vocabulary of both languages to `vocab/` in a folder, or to two folders in that.

    Args:
        folder: of the model.
        source: vocabulary of the source.
        target: of the target; the same object where it is joint.

    Raises:
        OSError: a file cannot be written; names it.
    """
    folder = Path(folder) / VOCAB
    if source is target:
        source.save(folder)
        return
    for name, side in zip(SIDES, (source, target), strict=True):
        side.save(folder / name)


def load_vocabularies(folder: str | Path) -> tuple[Subwords, Subwords]:
    """Return the vocabularies that `save_vocabularies` wrote.

    Args:
        folder: of the model.

    Raises:
        DataError: they are missing or damaged.
    """
    folder = Path(folder) / VOCAB
    if all((folder / name).is_dir() for name in SIDES):
        source, target = (Subwords.from_folder(folder / name) for name in SIDES)
        return source, target
    both = Subwords.from_folder(folder)
    return both, both
