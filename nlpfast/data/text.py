r"""Text as characters: reading a file, the vocabulary, and the windows a language model trains on.

Shapes: T block size, V vocabulary. Lines end at \n and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nlpfast.data.biographies import Person, biographies, biography_text, people

__all__ = [
    "CharDataset",
    "CharVocabulary",
    "DataError",
    "Person",
    "biographies",
    "biography_text",
    "people",
    "read_text",
]


class DataError(ValueError):
    """Say what is wrong with a user's data, in one line; the command line exits with 65 on it."""


def read_text(path: str | Path) -> str:
    r"""Read a UTF-8 text file, exactly.

    Like ``Path(path).read_text(encoding="utf-8")`` without the translation of line ends: \r\n stays \r\n,
    U+2028 is a character like any other. A byte order mark at the start is taken off. NUL is refused, as it
    is the mark of a binary or UTF-16 file.

    Args:
        path: the file.

    Returns:
        The text, at least one character.

    Raises:
        DataError: when the file is missing, a folder, unreadable or empty; with ``file:line: reason`` when it
            holds bytes that are not UTF-8, or NUL.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; give a text file") from None
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror or error}); check its permissions"
        ) from None
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data:
        raise DataError(f"{path}: the file is empty; give a file with text")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        bad = f"byte 0x{data[error.start]:02x} is not UTF-8 ({error.reason})"
        raise DataError(f"{path}:{line}: {bad}; convert the file to UTF-8") from None
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise DataError(
            f"{path}:{line}: NUL byte; this is not a UTF-8 text file, convert it or remove the byte"
        )
    return text


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
        codes = _code_points("".join(self.chars))
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
        return cls([chr(code) for code in np.unique(_code_points(text)).tolist()])

    def __len__(self) -> int:
        """Return the number of characters, V."""
        return len(self.chars)

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
        codes = _code_points(text)
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
        data: the whole text as numbers, int64; items are views of it.
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
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be >= 1; it is the number of characters per item")
        if len(text) < block_size + 1:
            raise DataError(
                f"text has {len(text)} characters, block_size={block_size} needs at least {block_size + 1}; "
                "give a longer text or a smaller block_size"
            )
        if vocabulary is None:
            vocabulary = CharVocabulary.from_text(text)
        elif not isinstance(vocabulary, CharVocabulary):
            vocabulary = CharVocabulary(vocabulary)
        self.vocabulary = vocabulary
        self.block_size = block_size
        self.data = vocabulary.encode(text)
        self.stoi = vocabulary.stoi
        self.itos = vocabulary.itos
        self.vocab_size = len(vocabulary)

    def __len__(self) -> int:
        """Return the number of windows, len(data) - block_size."""
        return len(self.data) - self.block_size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return window `index` as (x, y), int64 of shape [T] each, with y one character further."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} is outside the {count} windows of this text")
        start = index % count
        return self.data[start : start + self.block_size], self.data[start + 1 : start + 1 + self.block_size]

    def encode(self, text: str) -> Tensor:
        """Return the numbers of a text; see `CharVocabulary.encode`."""
        return self.vocabulary.encode(text)

    def decode(self, ids: Tensor | Iterable[int]) -> str:
        """Return the text of numbers; see `CharVocabulary.decode`."""
        return self.vocabulary.decode(ids)


def _code_points(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    # lone surrogates can be in a Python string; they are characters like others here
    return np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
