"""BPE, pieces that come of joining the most frequent pairs (Sennrich et al. 2016), through `tokenizers`.

Words are what spaces and tabs separate, and their first piece begins with "▁", as in SentencePiece:

    Ein Hund, der bellt.    ▁Ein ▁Hund , ▁der ▁bel lt .

A piece is never part of two words, and a sign that is no letter, digit or "_" is a piece of its own, perhaps
with the "▁" before it. Text is not normalised. A character that the vocabulary lacks is <unk>; so is "▁"
itself, which would be taken for the beginning of a word. Names of special tokens in a text are text.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random
from types import ModuleType
from typing import TYPE_CHECKING

from nlpfast.data.lines import DataError, text_blocks

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["BEGINS", "BPE", "SPECIAL", "UNKNOWN"]

# with the ids 0 to 3, as in CS224N's assignment 4
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
BEGINS = "▁"
# what decoded text has for <unk>, as in SentencePiece
UNKNOWN = "⁇"

_SPACES = r"[ \t]+"
_PARTS = rf"{BEGINS}?(?:\w+|[^\w])"
# no character, and so never one of a vocabulary
_NOTHING = "\uffff"
_UNK = SPECIAL.index("<unk>")


class BPE:
    """Pieces, and the pairs of them that are joined, the earlier ones first.

    Attributes:
        file: the name of the file in which it is saved.
        tokens: the pieces in the order of their ids: special tokens, characters, joined pairs.
        special: ids of <pad>, <s>, </s> and <unk>.
    """

    file = "tokenizer.json"
    special: tuple[int, ...] = (0, 1, 2, 3)

    def __init__(self, tokens: Sequence[str], merges: Sequence[Sequence[str]]) -> None:
        """Make the vocabulary of pieces and pairs that are known.

        Args:
            tokens: the pieces, with those of `SPECIAL` in front.
            merges: the pairs, in the order in which they were learnt.

        Raises:
            RuntimeError: tokenizers is not installed.
        """
        self.tokens = list(tokens)
        self._merges = [(left, right) for left, right in merges]
        self._tokenizer = _tokenizer(self.tokens, self._merges)
        self._ids = {token: number for number, token in enumerate(self.tokens)}
        # ids of a pair: when it is joined, and the id of what becomes of it
        self._joined = {
            (self._ids[left], self._ids[right]): (rank, self._ids[left + right])
            for rank, (left, right) in enumerate(self._merges)
        }

    @classmethod
    def train(cls, lines: Iterable[str], size: int, min_frequency: int, source: str) -> BPE:
        """Learn pieces; see `nlpfast.data.subwords.Subwords.train`."""
        if min_frequency < 1:
            raise ValueError(f"min_frequency={min_frequency} must be at least 1; 1 keeps all that occurs")
        library = _library()
        lines = list(lines) if isinstance(lines, Iterator) else lines
        characters = _characters(lines, min_frequency)
        if not characters:
            reason = f"there are no words, or no characters that occur min_frequency={min_frequency} times"
            raise DataError(f"{source}: {reason}; give more text")
        characters.append(BEGINS)
        first = len(SPECIAL) + len(characters)
        if first > size:
            reason = f"special tokens and characters are {first}, more than size={size}"
            raise DataError(f"{source}: {reason}; give as many or a higher min_frequency")
        trainer = library.trainers.BpeTrainer(
            vocab_size=size,
            min_frequency=min_frequency,
            special_tokens=list(SPECIAL),
            # these and no others; the trainer sorts them
            initial_alphabet=characters,
            limit_alphabet=len(characters),
            show_progress=False,
        )
        tokenizer = _tokenizer(SPECIAL, ())
        tokenizer.train_from_iterator(lines, trainer)
        return cls(*_tokens_and_merges(tokenizer))

    @classmethod
    def from_file(cls, path: str | Path) -> BPE:
        """Read what `content` gave.

        Args:
            path: the file.

        Raises:
            DataError: it is missing, damaged or of another kind; names it.
            RuntimeError: tokenizers is not installed.
        """
        library, text = _library(), "".join(text_blocks(path))
        try:
            tokenizer = library.Tokenizer.from_str(text)
        # it raises nothing more exact
        except Exception as error:
            raise DataError(f"{path}: is no tokenizer ({error}); save it again") from error
        kind = type(tokenizer.model).__name__
        if kind != "BPE":
            raise DataError(f"{path}: is {kind}, not BPE; give a folder of `nlpfast vocab bpe`")
        tokens, merges = _tokens_and_merges(tokenizer)
        if tuple(tokens[: len(SPECIAL)]) != SPECIAL or BEGINS not in tokens:
            reason = f"does not begin with {', '.join(SPECIAL)}, or has no {BEGINS}"
            raise DataError(f"{path}: {reason}; give a folder of `nlpfast vocab bpe`")
        found = cls(tokens, merges)
        # nothing else may be in the file, as it would change the ids
        expected, state = (json.loads(of.to_str()) for of in (found._tokenizer, tokenizer))
        for part, value in expected.items():
            if state[part] != value:
                raise DataError(f"{path}: has another {part}; give a folder of `nlpfast vocab bpe`")
        return found

    def __reduce__(self) -> tuple[type[BPE], tuple[list[str], list[tuple[str, str]]]]:
        """Return what a pickle has."""
        return type(self), (self.tokens, self._merges)

    def encode_batch(self, lines: Sequence[str]) -> list[list[int]]:
        """Return the ids of each line, with all processors."""
        encodings = self._tokenizer.encode_batch_fast(list(lines), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def sample_batch(self, lines: Sequence[str], dropout: float, seed: int) -> list[list[int]]:
        """Return the ids of each line by BPE-dropout (Provilkov et al. 2020, algorithm 1).

        The library can do that, but not twice the same.

        Args:
            lines: the texts.
            dropout: the probability with which a place where a pair could be joined is passed over, each time
                that a pair is chosen. 0 gives what `encode_batch` gives, 1 gives characters.
            seed: of the draws.
        """
        draws = Random(seed)
        return [list(self._sampled(line, dropout, draws)) for line in lines]

    def _sampled(self, line: str, dropout: float, draws: Random) -> Iterator[int]:
        text = self._tokenizer.normalizer.normalize_str(line)
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text):
            ids = [self._ids.get(character, _UNK) for character in word]
            while places := [
                (*self._joined[pair], place)
                for place, pair in enumerate(itertools.pairwise(ids))
                if pair in self._joined and draws.random() >= dropout
            ]:
                _, number, place = min(places)
                ids[place : place + 2] = [number]
            yield from ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, <unk> as "⁇", other special tokens left out."""
        pieces = [UNKNOWN if number == _UNK else self.tokens[number] for number in ids if number >= _UNK]
        return "".join(pieces).replace(BEGINS, " ").removeprefix(" ")

    def content(self) -> bytes:
        """Return a tokenizer.json."""
        return self._tokenizer.to_str(pretty=True).encode()

    def digest(self) -> str:
        """Return the sha256 of the pieces and pairs, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.tokens, self._merges]).encode()).hexdigest()


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(f"BPE needs tokenizers ({error}): pip install 'nlpfast[nmt]'") from error
    return tokenizers


def _tokenizer(tokens: Sequence[str], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    library = _library()
    ids = {token: number for number, token in enumerate(tokens)}
    before = library.pre_tokenizers
    tokenizer: Tokenizer = library.Tokenizer(library.models.BPE(ids, list(merges), unk_token=SPECIAL[_UNK]))
    tokenizer.normalizer = library.normalizers.Replace(BEGINS, _NOTHING)
    tokenizer.pre_tokenizer = before.Sequence(
        [
            before.Split(library.Regex(_SPACES), "removed"),
            before.Metaspace(replacement=BEGINS, prepend_scheme="always", split=False),
            before.Split(library.Regex(_PARTS), "isolated"),
        ]
    )
    tokenizer.decoder = library.decoders.Metaspace(replacement=BEGINS, prepend_scheme="always")
    # for other programs, which leave them out of text; their names in a text are text here
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.encode_special_tokens = True
    return tokenizer


def _tokens_and_merges(tokenizer: Tokenizer) -> tuple[list[str], list[list[str]]]:
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), model["merges"]


def _characters(lines: Iterable[str], min_frequency: int) -> list[str]:
    """Return the characters of words that are frequent enough."""
    counts: Counter[str] = Counter()
    for line in lines:
        counts.update(line)
    for character in (" ", "\t", BEGINS, _NOTHING):
        counts.pop(character, None)
    return [character for character, count in counts.items() if count >= min_frequency]
