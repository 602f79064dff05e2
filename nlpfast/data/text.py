r"""Text as characters: reading a file, the vocabulary, and the windows a language model trains on.

Shapes: T block size, V vocabulary. Lines end at \n and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from nlpfast.data.biographies import Person, biographies, biography_text, people
from nlpfast.data.lines import DataError, text_blocks
from nlpfast.data.token_cache import MappedTokens

__all__ = [
    "CharDataset",
    "CharVocabulary",
    "DataError",
    "Person",
    "biographies",
    "biography_text",
    "code_points",
    "line_of",
    "people",
    "read_text",
]

# tokens in which newlines are counted at a time
_COUNTED = 1 << 24


def read_text(path: str | Path) -> str:
    r"""Read a UTF-8 text file, exactly.

    Like ``Path(path).read_text(encoding="utf-8")`` without the translation of line ends; a byte order mark at
    the start is taken off, gzip is unpacked. All policies are at the top of `nlpfast.data.lines`.

    Args:
        path: the file.

    Returns:
        The text, at least one character.

    Raises:
        DataError: when the file is missing, a folder, unreadable or empty; with ``file:line: reason`` when it
            holds bytes that are not UTF-8, or NUL, or gzip data that is damaged.
    """
    return "".join(text_blocks(path))


class CharVocabulary:
    """A fixed list of characters and their numbers.

    Attributes:
        chars: the characters; the number of a character is its place in this list.
        stoi: character to number.
        itos: number to character.
    """

    def __init__(self, chars: Sequence[str]) -> None:
        """Number the characters in the order given.

        Args:
            chars: distinct strings of one character each, at least one; a string will do.

        Raises:
            DataError: when the list is empty, an entry is not one character, or an entry comes twice.
        """
        self.chars = list(chars)
        if not self.chars:
            raise DataError("vocabulary is empty; give at least one character")
        self.stoi: dict[str, int] = {}
        for number, char in enumerate(self.chars):
            if not isinstance(char, str) or len(char) != 1:
                raise DataError(
                    f"vocabulary entry {number} is {char!r}, expected one character; split or drop it"
                )
            if char in self.stoi:
                raise DataError(
                    f"vocabulary entry {number} repeats entry {self.stoi[char]} ({char!r}); drop one"
                )
            self.stoi[char] = number
        self.itos = dict(enumerate(self.chars))
        codes = code_points("".join(self.chars))
        # one row per code point up to the largest, so that encoding is a single look-up for the whole text
        self._number_of = np.full(int(codes.max()) + 2, -1, dtype=np.int64)
        self._number_of[codes] = np.arange(len(codes))
        self._codes = codes

    @classmethod
    def from_text(cls, text: str) -> CharVocabulary:
        """Return the vocabulary of all characters of a text, sorted by code point.

        Args:
            text: at least one character.

        Raises:
            DataError: when the text is empty.
        """
        return cls([chr(code) for code in np.unique(code_points(text)).tolist()])

    def __len__(self) -> int:
        """Return the number of characters, V."""
        return len(self.chars)

    def __reduce__(self) -> tuple[type[CharVocabulary], tuple[str]]:
        """Return what a pickle has: the characters, without the table that is made of them."""
        return type(self), ("".join(self.chars),)

    def encode(self, text: str) -> Tensor:
        """Return the numbers of the characters of a text.

        The same as ``torch.tensor([stoi[char] for char in text])``.

        Args:
            text: any length.

        Returns:
            int64 of shape [len(text)].

        Raises:
            DataError: when a character is not in the vocabulary; names the first one and its place.
        """
        codes = code_points(text)
        # larger code points share the last row, which is never a character of the vocabulary
        numbers = self._number_of[np.minimum(codes, len(self._number_of) - 1)]
        unknown = numbers < 0
        if unknown.any():
            where = int(unknown.argmax())
            line = text.count("\n", 0, where) + 1
            char = text[where]
            raise DataError(
                f"text has {char!r} (U+{ord(char):04X}) at position {where}, line {line}, which is not among "
                f"the {len(self)} characters of the vocabulary; remove it or use a vocabulary that has it"
            )
        return torch.from_numpy(numbers)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """Return the text of a sequence of numbers.

        The same as ``"".join(itos[i] for i in ids)``.

        Args:
            ids: a one-dimensional integer tensor on any device, or integers.

        Raises:
            DataError: when a number is outside 0..V-1; names the first one and its place.
        """
        numbers = ids.cpu().numpy() if isinstance(ids, Tensor) else np.array(list(ids), dtype=np.int64)
        if numbers.ndim != 1:
            raise DataError(f"ids has shape {list(numbers.shape)}, expected one dimension; decode row by row")
        outside = (numbers < 0) | (numbers >= len(self))
        if outside.any():
            where = int(outside.argmax())
            raise DataError(
                f"ids has {int(numbers[where])} at position {where}, outside 0..{len(self) - 1}; "
                "decode with the vocabulary of the model that wrote it"
            )
        return self._codes[numbers].tobytes().decode("utf-32-le", errors="surrogatepass")


class CharDataset(Dataset[tuple[Tensor, Tensor]]):
    """All windows of a text: item i is characters i..i+T-1 and the same shifted by one.

    Attributes:
        block_size: T.
        vocabulary: the characters and their numbers; `stoi`, `itos` and `vocab_size` are taken from it.
    """

    def __init__(
        self, text: str, block_size: int, vocabulary: CharVocabulary | Sequence[str] | None = None
    ) -> None:
        """Encode the text once.

        Args:
            text: at least block_size + 1 characters.
            block_size: characters per item, >= 1.
            vocabulary: shared with other texts; None takes the sorted characters of this text.

        Raises:
            ValueError: when `block_size` is below 1.
            DataError: when the text is too short, or has a character that is not in `vocabulary`.
        """
        _check_windows("text", len(text), block_size)
        if vocabulary is None:
            vocabulary = CharVocabulary.from_text(text)
        elif not isinstance(vocabulary, CharVocabulary):
            vocabulary = CharVocabulary(vocabulary)
        self._take(vocabulary.encode(text).numpy(), block_size, vocabulary, "text", slice(0, len(text)))

    @classmethod
    def from_tokens(
        cls,
        tokens: NDArray[np.integer[Any]],
        block_size: int,
        vocabulary: CharVocabulary,
        *,
        source: str = "text",
        start: int = 0,
        stop: int | None = None,
    ) -> CharDataset:
        """Return the windows of a text that is encoded already, such as a corpus of `read_characters`.

        Tokens are never copied as a whole, nor by pickling where they are a map of a file.

        Args:
            tokens: the number of each character of the text, of any integer type; may be read-only.
            block_size: characters per item, >= 1.
            vocabulary: what the numbers mean.
            source: the file that the text is from, for `source`.
            start: windows begin at this character or later.
            stop: windows end before this character; None is the end of the text.

        Raises:
            ValueError: when `block_size` is below 1, or `start` and `stop` are no part of the text.
            DataError: when the part is too short.
        """
        stop = len(tokens) if stop is None else stop
        if not 0 <= start <= stop <= len(tokens):
            raise ValueError(f"start={start}, stop={stop} must be in order and in 0..{len(tokens)}")
        _check_windows(source, stop - start, block_size)
        made = cls.__new__(cls)
        made._take(tokens, block_size, vocabulary, source, slice(start, stop))
        return made

    def _take(
        self,
        tokens: NDArray[np.integer[Any]],
        block_size: int,
        vocabulary: CharVocabulary,
        source: str,
        part: slice,
    ) -> None:
        self.vocabulary = vocabulary
        self.block_size = block_size
        self.stoi = vocabulary.stoi
        self.itos = vocabulary.itos
        self.vocab_size = len(vocabulary)
        # slices of a plain array are made faster than those of a numpy.memmap
        self._tokens = np.asarray(tokens)
        self._source = source
        self._start: int = part.start
        self._length: int = part.stop - part.start

    @property
    def data(self) -> Tensor:
        """Return all characters as numbers, int64; a copy if the tokens are read-only or of another type."""
        return self._numbers(self._start, self._start + self._length)

    def __len__(self) -> int:
        """Return the number of windows, characters - block_size."""
        return self._length - self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return window `index` as (x, y), int64 of shape [T] each, with y one character further."""
        start = self._place(index)
        window = self._numbers(start, start + self.block_size + 1)
        return window[:-1], window[1:]

    def source(self, index: int) -> str:
        """Return where the first character of window `index` is from, as ``file:line``, for messages."""
        line = line_of(self._tokens, self._place(index), self.vocabulary)
        return f"{self._source}:{line}"

    def _numbers(self, start: int, stop: int) -> Tensor:
        # PyTorch knows no read-only memory
        copy = not self._tokens.flags.writeable
        return torch.from_numpy(self._tokens[start:stop].astype(np.int64, copy=copy))

    def _place(self, index: int) -> int:
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} is outside the {count} windows of this text")
        return self._start + index % count

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle has: tokens that are a map of a file by its name."""
        return {**self.__dict__, "_tokens": MappedTokens.of(self._tokens) or self._tokens}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what a pickle has, and map the file again."""
        tokens = state["_tokens"]
        mapped = tokens.open() if isinstance(tokens, MappedTokens) else tokens
        self.__dict__.update(state, _tokens=mapped)

    def encode(self, text: str) -> Tensor:
        """Return the numbers of a text; see `CharVocabulary.encode`."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """Return the text of numbers; see `CharVocabulary.decode`."""
        return self.vocabulary.decode(ids)


def _check_windows(source: str, length: int, block_size: int) -> None:
    if block_size < 1:
        raise ValueError(f"block_size={block_size} must be >= 1; it is the number of characters per item")
    if length < block_size + 1:
        raise DataError(
            f"{source} has {length} characters, block_size={block_size} needs at least {block_size + 1}; "
            "give a longer text or a smaller block_size"
        )


def line_of(tokens: NDArray[np.integer[Any]], position: int, vocabulary: CharVocabulary) -> int:
    r"""Return the line, from 1, of a character of an encoded text, by counting each \n before it.

    Args:
        tokens: the numbers of the text's characters.
        position: place of the character, from 0.
        vocabulary: what the numbers mean.
    """
    newline = vocabulary.stoi.get("\n", -1)
    # a map that is larger than memory is compared part by part
    starts = range(0, position, _COUNTED)
    parts = (tokens[start : min(start + _COUNTED, position)] for start in starts)
    return 1 + sum(int(np.count_nonzero(part == newline)) for part in parts)


def code_points(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """Return the number that Unicode gives each character of a text.

    Args:
        text: any length.
    """
    # lone surrogates can be in a Python string; they are characters like others here
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
