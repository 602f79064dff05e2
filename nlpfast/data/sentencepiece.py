"""Models that SentencePiece trained (Kudo and Richardson 2018), through its own package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from nlpfast.data.bpe import UNKNOWN
from nlpfast.data.lines import DataError

__all__ = ["SentencePiece"]

# with which the package decodes what is unknown
_APART = f" {UNKNOWN} "


class SentencePiece:
    """A model of SentencePiece, of any of its types, with the ids that it has.

    Attributes:
        file: the name of the file in which it is saved.
        tokens: the pieces in the order of their ids.
        special: ids of pad, bos, eos and unk.
    """

    file = "sentencepiece.model"

    def __init__(self, content: bytes, source: str | Path = "model") -> None:
        """Take over the content of a .model file.

        Args:
            content: all its bytes.
            source: what messages call it.

        Raises:
            DataError: it is damaged, or lacks the ids that translation needs.
            RuntimeError: sentencepiece is not installed.
        """
        self._content = content
        library = _library()
        try:
            # the package takes no bytes for no model
            model = self._model = library.SentencePieceProcessor(model_proto=content or b"-")
        # it raises nothing more exact
        except Exception as error:
            raise DataError(f"{source}: is no model of SentencePiece; get it again") from error
        self.special: tuple[int, ...] = (model.pad_id(), model.bos_id(), model.eos_id(), model.unk_id())
        named = zip(("pad", "bos", "eos", "unk"), self.special, strict=True)
        if missing := [name for name, number in named if number < 0]:
            fix = "train it again with --pad_id=0 --bos_id=1 --eos_id=2 --unk_id=3"
            raise DataError(f"{source}: has no {' and no '.join(missing)}; {fix}")
        self.tokens: list[str] = [model.id_to_piece(number) for number in range(model.get_piece_size())]
        # ranks of pairs if it is BPE, and logarithms of probabilities if it is not
        self._is_bpe = all(model.get_score(number).is_integer() for number in range(len(self.tokens)))

    @classmethod
    def from_file(cls, path: str | Path) -> SentencePiece:
        """Read a .model file.

        Args:
            path: the file.

        Raises:
            DataError: it is missing or damaged, or lacks the ids that translation needs; names it.
            RuntimeError: sentencepiece is not installed.
        """
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from error
        return cls(content, path)

    def __reduce__(self) -> tuple[type[SentencePiece], tuple[bytes]]:
        """Return what a pickle has."""
        return type(self), (self._content,)

    def encode_batch(self, lines: Sequence[str]) -> list[list[int]]:
        """Return the ids of each line, with one processor."""
        return self._model.encode(list(lines), num_threads=1)

    def sample_batch(self, lines: Sequence[str], dropout: float, seed: int) -> list[list[int]]:
        """Return the ids of each line by BPE-dropout, as the package does it.

        The package has one source of draws, whose seed this sets.

        Args:
            lines: the texts.
            dropout: the probability with which a pair that could be joined is passed over.
            seed: of the draws.

        Raises:
            ValueError: the model is not BPE.
        """
        if not self._is_bpe:
            raise ValueError(f"dropout={dropout} is for BPE, which this model is not; leave dropout at 0")
        # of 32 bits
        _library().set_random_generator_seed(seed % 2**32)
        sample = self._model.encode
        return [sample(line, enable_sampling=True, alpha=dropout, nbest_size=-1) for line in lines]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, unknown pieces as "⁇", other special tokens left out."""
        text: str = self._model.decode(list(ids))
        return text.replace(_APART, UNKNOWN) if self.special[-1] in ids else text

    def content(self) -> bytes:
        """Return the model, as it was read."""
        return self._content

    def digest(self) -> str:
        """Return the sha256 of the model, in hexadecimal."""
        return hashlib.sha256(self._content).hexdigest()


def _library() -> ModuleType:
    try:
        import sentencepiece
    except ImportError as error:
        reason = f"a model of SentencePiece needs its package ({error})"
        raise RuntimeError(f"{reason}: pip install 'nlpfast[nmt]'") from error
    return sentencepiece
