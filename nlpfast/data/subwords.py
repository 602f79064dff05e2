"""Subwords of translation: a vocabulary of BPE that is trained here, or a model of SentencePiece.

Both mark the piece that begins a word by "▁", which gives the words of a translation back:

    ids -> pieces       ▁Ein ▁Hund , ▁der ▁bel lt .
        -> words         0    1    1  2    3    3  3
        -> text         Ein Hund, der bellt.

How text is cut is in `nlpfast.data.bpe`. A joint vocabulary of two languages is one trained on the texts of
both.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path

from nlpfast.data.bpe import BEGINS, BPE
from nlpfast.data.lines import DataError
from nlpfast.data.sentencepiece import SentencePiece
from nlpfast.files import replacing

__all__ = ["FILES", "Subwords"]

# a folder has one of them
FILES = (BPE.file, SentencePiece.file)


class Subwords:
    """A vocabulary, and the rules by which text becomes its ids and ids become text.

    Attributes:
        tokens: the pieces in the order of their ids.
        begins: whether the piece of an id begins a word, in the same order.
        pad_id, bos_id, eos_id, unk_id: ids of the special tokens; 0 to 3 in what is trained here.
    """

    def __init__(self, pieces: BPE | SentencePiece) -> None:
        """Take over pieces and what cuts text into them; see `train`, `from_folder`, `from_sentencepiece`.

        Args:
            pieces: of either kind.
        """
        self._pieces = pieces
        self.tokens = pieces.tokens
        self.begins = [token.startswith(BEGINS) for token in pieces.tokens]
        self.pad_id, self.bos_id, self.eos_id, self.unk_id = pieces.special

    @classmethod
    def train(
        cls, lines: Iterable[str], size: int, *, min_frequency: int = 2, source: str = "lines"
    ) -> Subwords:
        """Learn BPE: the special tokens, characters, and what comes of joining frequent pairs.

        The same lines give the same vocabulary: characters have the order of their code points, and of
        equally frequent pairs the one with the lower ids is joined.

        Args:
            lines: text; gone through twice, and kept in memory if that cannot be done.
            size: of the vocabulary, at most; there are fewer pieces if there are no more pairs to join.
            min_frequency: rarer pairs are not joined, and rarer characters left out.
            source: what messages call the lines, their file for example.

        Raises:
            ValueError: `min_frequency` is below 1.
            DataError: there are no words in the lines, or their characters alone are more than `size`.
            RuntimeError: tokenizers is not installed.
        """
        return cls(BPE.train(lines, size, min_frequency, source))

    @classmethod
    def from_folder(cls, path: str | Path) -> Subwords:
        """Read what `save` wrote, or a .model file of SentencePiece.

        Args:
            path: the folder, with a tokenizer.json or a sentencepiece.model; or a file with such a model.

        Raises:
            DataError: a file is missing, damaged or of another kind; names it.
            RuntimeError: the package that reads it is not installed.
        """
        folder = Path(path)
        if folder.is_file():
            return cls.from_sentencepiece(folder)
        pairs, model = (folder / name for name in FILES)
        if pairs.exists() and model.exists():
            raise DataError(f"{folder}: has {pairs.name} and {model.name}; remove the one that is not meant")
        if model.exists():
            return cls.from_sentencepiece(model)
        if not pairs.exists():
            reason = f"has no {pairs.name} or {model.name}"
            raise DataError(f"{folder}: {reason}; give a folder of `nlpfast vocab bpe`")
        return cls(BPE.from_file(pairs))

    @classmethod
    def from_sentencepiece(cls, model_file: str | Path) -> Subwords:
        """Read a model of SentencePiece; ids are those that it has.

        Its rules for text are its own: most models put characters into another form (NFKC), which decoding
        does not undo, and a no-break space is a space to them.

        Args:
            model_file: the .model file.

        Raises:
            DataError: it is missing or damaged, or has no pad, bos or eos; names it.
            RuntimeError: sentencepiece is not installed.
        """
        return cls(SentencePiece.from_file(model_file))

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.tokens)

    def __reduce__(self) -> tuple[type[Subwords], tuple[BPE | SentencePiece]]:
        """Return what a pickle has: what the pieces are made of."""
        return type(self), (self._pieces,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without special tokens around them."""
        return self._pieces.encode_batch([text])[0]

    def encode_batch(
        self, lines: Sequence[str], *, dropout: float = 0.0, seed: int | None = None
    ) -> list[list[int]]:
        """Return the ids of each of several texts, without special tokens around them.

        Args:
            lines: the texts.
            dropout: that of BPE-dropout, 0 to 1: how often a pair that could be joined is passed over
                (Provilkov et al. 2020, who take 0.1). 0: the same ids each time.
            seed: of the draws, needed where there are some; the same lines and seed give the same ids.

        Raises:
            ValueError: `dropout` is not in 0..1, has no seed, or the model knows none.
        """
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout={dropout} must be at least 0 and at most 1; 0.1 is common")
        if not dropout:
            return self._pieces.encode_batch(lines)
        if seed is None or seed < 0:
            raise ValueError(f"seed={seed} must be at least 0 with dropout={dropout}; give a number")
        return self._pieces.sample_batch(lines, dropout, seed)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids.

        The ids of a text give the text back, with single spaces and none at its ends, if no character of it
        is unknown (and a model of SentencePiece leaves its characters as they are).

        Args:
            ids: special tokens among them are left out, but an unknown piece is "⁇".

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        self.pieces(ids)
        return self._pieces.decode(ids)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the piece of each id, special tokens by their names.

        Args:
            ids: numbers of pieces.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        for number in ids:
            if not 0 <= number < len(self.tokens):
                raise IndexError(
                    f"id {number} is not in 0..{len(self) - 1}; use the vocabulary that it is from"
                )
        return [self.tokens[number] for number in ids]

    def word_numbers(self, ids: Sequence[int]) -> list[int]:
        """Return for each id the number of the word that its piece is a part of, from 0.

        Words are those between the spaces of a text; see `nlpfast.alignment.words_of`.

        Args:
            ids: of a sentence, without special tokens. The first piece begins a word, whatever it is.
        """
        begins = (place == 0 or self.begins[number] for place, number in enumerate(ids))
        return [words - 1 for words in itertools.accumulate(begins)]

    def save(self, folder: str | Path) -> None:
        """Write the one file that `from_folder` reads.

        That is a tokenizer.json, which `tokenizers` and transformers' PreTrainedTokenizerFast read too (a
        name of a special token in a text, such as "</s>", is text here, and that token there), or the model
        of SentencePiece as it was.

        Args:
            folder: made when missing; a vocabulary of the other kind is removed, other files in it stay.

        Raises:
            OSError: a file cannot be written; names it.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
        with replacing(folder / self._pieces.file) as file:
            file.write(self._pieces.content())
        for name in FILES:
            if name != self._pieces.file:
                with contextlib.suppress(FileNotFoundError):
                    (folder / name).unlink()

    def digest(self) -> str:
        """Return the sha256, in hexadecimal, of what determines the ids of a text; another is another."""
        return self._pieces.digest()
