r"""Questions and answers, and documents with a hole: the data of CS224N's assignment 5.

    question   "Where was Ada Abbott born?⁇Rome⁇□□□"      the answer alone counts in the loss
    document   "Ada Abb⁇n in Rome.⁇ott was bor⁇□□"        every character counts

Both are strings of `block_size` characters, of which x are all but the last and y all but the first. ⁇ (MASK)
marks where something is left out and where it comes; □ (PAD) fills up, and as a target it is what the loss
ignores.

With `prefix` the question with its mark, and the document with its hole and both marks, are given to the
model to read in both directions (UniLM, Dong et al. 2019). What is to be written alone counts then, and an
item has the length of its prefix as a third part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from nlpfast.data.lines import DataError
from nlpfast.data.packed_sentences import filled
from nlpfast.data.text import CharVocabulary

__all__ = [
    "MASK",
    "PAD",
    "PAD_ID",
    "CharCorruptionDataset",
    "NameDataset",
    "corpus_vocabulary",
    "packed",
    "padded",
]

PAD, MASK = "\u25a1", "\u2047"
# Numbers of PAD, the targets that do not count, and of MASK.
PAD_ID, MASK_ID = 0, 1
_WORD = re.compile(r"[^\W_][\w'-]*")
# Documents are cut to a random length, from so many characters on.
SHORTEST = 4


def corpus_vocabulary(documents: Iterable[str], source: str = "corpus") -> CharVocabulary:
    r"""Return PAD, MASK, and all characters of a corpus in the order of their code points, \n among them.

    Args:
        documents: the lines of the corpus, without their ends.
        source: what messages call the corpus, its file for example.

    Raises:
        DataError: PAD or MASK is in the corpus; names the line.
    """
    characters = {"\n"}
    for number, document in enumerate(documents, 1):
        for char in (PAD, MASK):
            if char in document:
                raise DataError(f"{source}:{number}: has {char!r}, which marks what is no text; remove it")
        characters.update(document)
    return CharVocabulary([PAD, MASK, *sorted(characters)])


class NameDataset(Dataset[tuple[Tensor, ...]]):
    """Questions with their answers: item i is (x, y), or (x, y, length of the prefix), of line i.

    Attributes:
        vocabulary: numbers of the characters.
        block_size: length of an item's string.
    """

    def __init__(
        self,
        rows: Sequence[str],
        vocabulary: CharVocabulary,
        block_size: int,
        *,
        prefix: bool = False,
        source: str = "names",
    ) -> None:
        """Encode all lines.

        Args:
            rows: lines "question<TAB>answer", without their ends.
            vocabulary: of the corpus.
            block_size: the most characters that the model reads at once.
            prefix: questions are read in both directions.
            source: the file, for messages.

        Raises:
            DataError: a line without or with two answers, too long, or with a character that is not in the
                vocabulary; names file and line.
        """
        self.vocabulary, self.block_size, self._source = vocabulary, block_size, source
        self._x = torch.zeros(len(rows), block_size - 1, dtype=torch.int64)
        self._y = torch.zeros(len(rows), block_size - 1, dtype=torch.int64)
        self._prefixes = torch.zeros(len(rows), dtype=torch.int64) if prefix else None
        for i, row in enumerate(rows):
            question, *answers = row.split("\t")
            if len(answers) != 1:
                found = f"{len(answers)} answers after the question"
                raise DataError(f"{self.source(i)}: has {found}; write question, tab, answer")
            text = question + MASK + answers[0] + MASK
            if len(text) > block_size:
                rule = f"block_size={block_size} takes {block_size - 2} with question and answer"
                raise DataError(f"{self.source(i)}: has {len(text) - 2} characters, {rule}; shorten it")
            try:
                numbers = vocabulary.encode(text)
            except DataError as error:
                raise DataError(f"{self.source(i)}: {error}") from error
            padded = torch.full((block_size,), PAD_ID)
            padded[: len(text)] = numbers
            self._x[i], self._y[i] = padded[:-1], padded[1:]
            # the first target that counts is the mark before the answer, unless that is seen beforehand
            self._y[i, : max(len(question) - 1 + prefix, 0)] = PAD_ID
            if self._prefixes is not None:
                self._prefixes[i] = len(question) + 1

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._x)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return x and y, int64 [block_size - 1] each, and perhaps the length of the prefix."""
        prefix = () if self._prefixes is None else (self._prefixes[index],)
        return self._x[index], self._y[index], *prefix

    def source(self, index: int) -> str:
        """Return where an item is from, as ``file:line``."""
        return f"{self._source}:{index + 1}"


class CharCorruptionDataset(Dataset[tuple[Tensor, ...]]):
    """Documents with a hole: item i is a random cut of document i, with a random span moved to its end.

    An item is (x, y), or (x, y, length of the prefix).

    The cut has 4 to 7/8 of `block_size` characters, as far as the document has them, and the span a quarter
    of the cut on average. Draws depend on the seed, the epoch and the index alone, whichever process makes
    them.

    ``spans="names"`` moves a name, one or more words with capitals, where the cut has one that was not there
    before: facts are asked for, rather than words (salient spans, Guu et al. 2020, "REALM").

    The seed's code drew the span from the length that was asked for, not from what the document has: a short
    one lost less than a quarter, often nothing, and a long one 0.233. ``compat="seed"`` draws like that.

    Attributes:
        vocabulary: numbers of the characters.
        block_size: length of an item's string.
        epoch: of the draws.
    """

    def __init__(
        self,
        documents: Sequence[str],
        vocabulary: CharVocabulary,
        block_size: int,
        *,
        seed: int = 0,
        compat: str | None = None,
        prefix: bool = False,
        spans: str = "random",
        source: str = "corpus",
    ) -> None:
        """Keep the documents.

        Args:
            documents: lines of the corpus, without their ends.
            vocabulary: of the corpus.
            block_size: the most characters that the model reads at once, at least 6.
            seed: of the draws, below 2^64.
            compat: "seed" for the distribution of the seed's code.
            prefix: what is left of the document is read in both directions.
            spans: "random", or "names".
            source: the file, for messages.

        Raises:
            ValueError: `block_size` is below 6, or `compat` or `spans` is unknown.
            DataError: there is no document.
        """
        if block_size < SHORTEST + 2:
            rule = f"must be at least {SHORTEST + 2}; two marks take part of it"
            raise ValueError(f"block_size={block_size} {rule}")
        if compat not in (None, "seed"):
            raise ValueError(f"compat={compat!r} must be None or 'seed'; pass one of them")
        if spans not in ("random", "names"):
            raise ValueError(f"spans={spans!r} must be 'random' or 'names'; pass one of them")
        if not documents:
            raise DataError(f"{source}: has no documents; give a corpus with one a line")
        self.documents, self.vocabulary, self.block_size = documents, vocabulary, block_size
        self.epoch, self._seed, self._compat, self._source = 0, seed, compat, source
        self._prefix, self._spans = prefix, spans
        self._longest = min(block_size * 7 // 8, block_size - 2)

    def __len__(self) -> int:
        """Return the number of documents."""
        return len(self.documents)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        """Return x and y, int64 [block_size - 1] each, and perhaps the length of the prefix."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} documents")
        # as many streams as there are numbers: nothing is drawn twice
        stream = np.random.Philox(key=self._seed, counter=[0, index, self.epoch, 0])
        start, stop, cut = self._span(self.documents[index], np.random.Generator(stream))
        text = cut[:start] + MASK + cut[stop:] + MASK + cut[start:stop]
        numbers = torch.full((self.block_size,), PAD_ID)
        numbers[: len(text)] = self.vocabulary.encode(text)
        if not self._prefix:
            return numbers[:-1], numbers[1:]
        prefix, y = len(text) - (stop - start), numbers[1:].clone()
        y[: prefix - 1] = PAD_ID
        return numbers[:-1], y, torch.tensor(prefix)

    def _span(self, document: str, draws: np.random.Generator) -> tuple[int, int, str]:
        """Return where the span begins and ends, and the cut that it is of."""
        length = int(draws.integers(SHORTEST, self._longest, endpoint=True))
        cut = document[:length]
        if self._spans == "names":
            names = _names(cut)
            if names:
                start, stop = names[int(draws.integers(len(names)))]
                return start, stop, cut
        if self._compat == "seed":
            quarter = length // 4
            size, starts = int(draws.integers(1, 2 * quarter)), length - quarter + 1
        else:
            # a whole number, whose mean is a quarter of what there is
            quarter = len(cut) // 4 + int(draws.random() < len(cut) % 4 / 4)
            size = min(int(draws.integers(1, 2 * max(quarter, 1))), len(cut))
            starts = len(cut) - size + 1
        start = int(draws.integers(starts))
        return min(start, len(cut)), min(start + size, len(cut)), cut

    def source(self, index: int) -> str:
        """Return where an item is from, as ``file:line``."""
        return f"{self._source}:{index + 1}"


def _names(text: str) -> list[tuple[int, int]]:
    """Return where the names in a text begin and end, but those that cannot be told from what is before.

    A name is one or more words with capitals and single spaces between them. Left out are what stood in the
    text before, what is at its beginning, and at its end, where it may go on.
    """
    found: list[tuple[int, int]] = []
    for word in _WORD.finditer(text):
        start, stop = word.span()
        if not text[start].isupper():
            continue
        if found and text[found[-1][1] : start] == " ":
            start = found.pop()[0]
        found.append((start, stop))
    return [(i, j) for i, j in found if i > 0 and text.find(text[i:j]) == i and j < len(text) - 1]


def packed(items: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor, int]:
    """Make a batch without padding: what is after an item's last target that counts is left out.

    Further tokens, PAD with targets that do not count, follow as sequences of their own: see
    `nlpfast.data.packed_sentences.filled`.

    Args:
        items: (x, y) of one of the data sets above, without a prefix.

    Returns:
        tokens and targets of all items, int64 [N] each, N a multiple of `ROUNDED`; the cumulative numbers of
        tokens, int64 [number of sequences + 1]; and the largest number of a sequence.
    """
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    lengths = _ends(y)
    within = torch.arange(y.shape[1]) < lengths[:, None]
    cu_seqlens, missing = filled(lengths.tolist())
    tokens, targets = (F.pad(part[within], (0, missing), value=PAD_ID) for part in (x, y))
    return tokens, targets, cu_seqlens, int(lengths.max())


def padded(items: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Make a batch as wide as its longest item, up to the last target that counts.

    Args:
        items: (x, y), or (x, y, length of the prefix).

    Returns:
        x and y, int64 [len(items), T] each, and lengths of prefixes, [len(items)].
    """
    x, y, *rest = (torch.stack(column) for column in zip(*items, strict=True))
    longest = int(_ends(y).max())
    return x[:, :longest], y[:, :longest], *rest


def _ends(y: Tensor) -> Tensor:
    """Return the place after the last target of each row that counts, at least 1."""
    places = torch.arange(1, y.shape[1] + 1)
    return ((y != PAD_ID) * places).amax(1).clamp(min=1)
