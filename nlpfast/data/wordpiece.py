"""WordPiece, BERT's vocabulary of words and pieces of words (Devlin et al. 2019), through `tokenizers`.

A word that the vocabulary lacks is cut into the longest pieces that it has, from the front, and "##" marks
those that continue a word:

    unaffable    un ##aff ##able

Before that, text is cleaned, perhaps put into lower case without accents, and split at spaces and
punctuation. Ids are those of transformers' BertTokenizer for the same folder. As there, the name of a special
token in a text, such as "a [MASK] sat", is that token; none are added otherwise.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from nlpfast.data.lines import DataError, read_lines, text_blocks
from nlpfast.files import replacing

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["FILES", "SPECIAL", "WordPiece"]

# In the order in which a vocabulary that is trained here begins.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json")
_PARTS = ("WordPiece", "BertNormalizer", "BertPreTokenizer")
_CONTINUES = "##"
# What tokenizer_config.json calls the options of BertNormalizer.
_OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class WordPiece:
    """A vocabulary, and the rules by which text becomes its ids.

    Attributes:
        tokens: the pieces in the order of their ids; "##" is before those that continue a word.
        continues: whether the piece of an id continues a word, in the same order.
        pad_id, unk_id, cls_id, sep_id, mask_id: ids of the special tokens.
        special_ids: these five, and those of other special tokens that a folder names.
    """

    def __init__(self, tokenizer: Tokenizer, source: str | Path = "tokenizer") -> None:
        """Take over a tokenizer of BERT, and turn off its padding and truncation.

        Args:
            tokenizer: with the model, the normalizer and the pre-tokenizer of BERT.
            source: what messages call it, its file for example.

        Raises:
            DataError: it is another tokenizer, or lacks a special token.
        """
        library, ids = _library(), tokenizer.get_vocab()
        _check(tokenizer, ids, source)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        # what a file may lack; names of special tokens mean them, and have their ids already
        tokenizer.add_special_tokens(list(SPECIAL))
        tokenizer.decoder = library.decoders.WordPiece(prefix=_CONTINUES)
        # for other programs that read what is saved; `encode` adds no tokens
        around = [(token, ids[token]) for token in ("[SEP]", "[CLS]")]
        tokenizer.post_processor = library.processors.BertProcessing(*around)
        self._tokenizer = tokenizer
        self.tokens: list[str] = sorted(ids, key=ids.__getitem__)
        self.continues = [token.startswith(_CONTINUES) for token in self.tokens]
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (ids[token] for token in SPECIAL)
        added = tokenizer.get_added_tokens_decoder().items()
        self.special_ids = frozenset(number for number, token in added if token.special)

    @classmethod
    def from_folder(cls, path: str | Path) -> WordPiece:
        """Read the tokenizer of a BERT model that Hugging Face's libraries or `save` wrote.

        That is tokenizer.json or, where there is none, vocab.txt with a piece a line. As in transformers,
        what tokenizer_config.json says of lower case, accents and Chinese characters goes before the former.

        Args:
            path: the folder.

        Raises:
            DataError: a file is missing or damaged, or not that of a BERT model; names it, and the line.
            RuntimeError: tokenizers is not installed.
        """
        library, folder = _library(), Path(path)
        whole, pieces, settings = (folder / name for name in FILES)
        config = _read_config(settings) if settings.exists() else {}
        source = whole if whole.exists() else pieces
        if not source.exists():
            reason = f"has no {whole.name} or {pieces.name}"
            raise DataError(f"{folder}: {reason}; give the folder of a BERT model")
        if source == pieces:
            tokenizer = _tokenizer(_read_pieces(pieces))
        else:
            text = "".join(text_blocks(whole))
            try:
                tokenizer = library.Tokenizer.from_str(text)
            # it raises nothing more exact
            except Exception as error:
                raise DataError(f"{whole}: is no tokenizer ({error}); save it again") from error
        found = cls(tokenizer, source)
        for token in config.pop("added", ()):
            if token not in found.tokens:
                reason = f"has the token {token!r}, which {source.name} lacks"
                raise DataError(f"{settings}: {reason}; save the tokenizer again, with a {whole.name}")
        for option, value in config.items():
            setattr(found._tokenizer.normalizer, option, value)
        return found

    @classmethod
    def train(
        cls,
        lines: Iterable[str],
        vocab_size: int,
        *,
        lowercase: bool = True,
        min_frequency: int = 2,
        source: str = "lines",
    ) -> WordPiece:
        """Learn a vocabulary: the special tokens, characters, and what comes of joining frequent pairs.

        The same lines give the same vocabulary. By itself the trainer of tokenizers does not do that: it
        numbers "##a", "##b" and so on in the order of a hash map with a random key, and of equally frequent
        pairs joins the one with the lower numbers. Here characters get their numbers beforehand, in the order
        of their code points. As a piece comes of one pair alone, and all of a pair in one step, nothing else
        depends on the map.

        Args:
            lines: text; gone through twice, and kept in memory if that cannot be done.
            vocab_size: of the vocabulary, at most; there are fewer pieces if there are no more pairs to join.
            lowercase: put text into lower case and take off accents.
            min_frequency: rarer pairs are not joined, and rarer characters left out.
            source: what messages call the lines, their file for example.

        Raises:
            ValueError: `min_frequency` is below 1.
            DataError: there are no words in the lines, or their characters alone are more than `vocab_size`.
            RuntimeError: tokenizers is not installed.
        """
        if min_frequency < 1:
            raise ValueError(f"min_frequency={min_frequency} must be at least 1; 1 keeps all that occurs")
        library = _library()
        lines = list(lines) if isinstance(lines, Iterator) else lines
        tokenizer = _tokenizer(SPECIAL, lowercase)
        first = [*SPECIAL, *_characters(lines, tokenizer, min_frequency)]
        if len(first) == len(SPECIAL):
            reason = f"there are no words, or no characters that occur min_frequency={min_frequency} times"
            raise DataError(f"{source}: {reason}; give more text")
        if len(first) > vocab_size:
            reason = f"special tokens and characters are {len(first)}, more than vocab_size={vocab_size}"
            raise DataError(f"{source}: {reason}; give as many or a higher min_frequency")
        trainer = library.trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=first,
            # no characters but those above
            limit_alphabet=0,
            show_progress=False,
        )
        tokenizer.train_from_iterator(lines, trainer)
        ids = tokenizer.get_vocab()
        # a new one, to which characters are no special tokens
        return cls(_tokenizer(sorted(ids, key=ids.__getitem__), lowercase), source)

    @property
    def lowercase(self) -> bool:
        """Return whether text is put into lower case."""
        return bool(self._tokenizer.normalizer.lowercase)

    def __len__(self) -> int:
        """Return the number of pieces."""
        return len(self.tokens)

    def __reduce__(self) -> tuple[type[WordPiece], tuple[Tokenizer]]:
        """Return what a pickle has: the tokenizer alone."""
        return type(self), (self._tokenizer,)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without [CLS] and [SEP] around them."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of several texts, as `encode` does, with all processors."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the words of ids with single spaces, and none before a full stop and its like.

        Args:
            ids: special tokens among them have their names.

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        for number in ids:
            self.token(number)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token(self, number: int) -> str:
        """Return the piece of an id.

        Args:
            number: the id.

        Raises:
            IndexError: it is not in the vocabulary.
        """
        if not 0 <= number < len(self.tokens):
            raise IndexError(f"id {number} is not in 0..{len(self) - 1}; use the vocabulary that it is from")
        return self.tokens[number]

    def save(self, folder: str | Path) -> None:
        """Write the files that `from_folder` and transformers' BertTokenizer and AutoTokenizer read.

        All are written before the first one takes the place of an older one. The last to do so is
        tokenizer.json, which alone would do.

        Args:
            folder: made when missing; other files in it stay.

        Raises:
            OSError: a file cannot be written; names it.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{folder}: cannot be made ({error.strerror}); name another folder") from error
        last = max(self._tokenizer.get_vocab(with_added_tokens=False).values())
        contents = (
            self._tokenizer.to_str(pretty=True),
            "".join(f"{token}\n" for token in self.tokens[: last + 1]),
            json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n",
        )
        with contextlib.ExitStack() as stack:
            for name, content in zip(FILES, contents, strict=True):
                stack.enter_context(replacing(folder / name)).write(content.encode())

    def _config(self) -> dict[str, Any]:
        """Return what tokenizer_config.json has."""
        normalizer = self._tokenizer.normalizer
        added = sorted(self._tokenizer.get_added_tokens_decoder().items())
        return {
            "tokenizer_class": "BertTokenizer",
            **{name: getattr(normalizer, option) for name, option in _OPTIONS.items()},
            **{f"{token[1:-1].lower()}_token": token for token in SPECIAL},
            "added_tokens_decoder": {str(number): token.__getstate__() for number, token in added},
        }


def _library() -> ModuleType:
    try:
        import tokenizers
    except ImportError as error:
        raise RuntimeError(f"WordPiece needs tokenizers ({error}): pip install 'nlpfast[bert]'") from error
    return tokenizers


def _tokenizer(tokens: Sequence[str], lowercase: bool = True) -> Tokenizer:
    library = _library()
    ids = {token: number for number, token in enumerate(tokens)}
    tokenizer: Tokenizer = library.Tokenizer(library.models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = library.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _check(tokenizer: Tokenizer, ids: Mapping[str, int], source: str | Path) -> None:
    """Raise unless a tokenizer is one of BERT."""
    parts = (tokenizer.model, tokenizer.normalizer, tokenizer.pre_tokenizer)
    for expected, part in zip(_PARTS, parts, strict=True):
        if type(part).__name__ != expected:
            found = type(part).__name__
            raise DataError(f"{source}: has {found} for {expected}; give the tokenizer of a BERT model")
    if tokenizer.model.continuing_subword_prefix != _CONTINUES:
        found = repr(tokenizer.model.continuing_subword_prefix)
        raise DataError(f"{source}: continues words by {found}, not by '##'; give that of a BERT model")
    for token in SPECIAL:
        if token not in ids:
            raise DataError(f"{source}: has no {token}; give the vocabulary of a BERT model")
    if sorted(ids.values()) != list(range(len(ids))):
        raise DataError(f"{source}: its {len(ids)} ids are not 0..{len(ids) - 1}; save the tokenizer again")


def _read_config(path: Path) -> dict[str, Any]:
    """Return the options of BertNormalizer that a tokenizer_config.json has, and "added": added tokens."""
    text = "".join(text_blocks(path))
    try:
        config = json.loads(text)
        tokens = config.get("added_tokens_decoder", {}).values()
        found: dict[str, Any] = {"added": [str(token["content"]) for token in tokens]}
    except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise DataError(f"{path}: is no such file ({error}); save the tokenizer again") from error
    for name, option in _OPTIONS.items():
        value = config.get(name, True)
        if not (isinstance(value, bool) or (value is None and name == "strip_accents")):
            raise DataError(f"{path}: {name} is {value!r}, expected true or false; correct it")
        if name in config:
            found[option] = value
    return found


def _read_pieces(path: Path) -> list[str]:
    numbers: dict[str, int] = {}
    for number, token in enumerate(read_lines(path), 1):
        if token in numbers:
            reason = f"repeats {token!r} of line {numbers[token]}, a piece has one id"
            raise DataError(f"{path}:{number}: {reason}; get the file again")
        numbers[token] = number
    return list(numbers)


def _characters(lines: Iterable[str], tokenizer: Tokenizer, min_frequency: int) -> list[str]:
    """Return the characters of words, and after them, with "##", those that can continue one."""

    def words(text: str) -> list[str]:
        split = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
        return [word for word, _ in split]

    found: Counter[str] = Counter()
    for line in lines:
        found.update(line)
    # in lower case a character of the text may be several, or that of another one
    counts: Counter[str] = Counter()
    continuing: set[str] = set()
    for character, count in found.items():
        for part in "".join(words(character)):
            counts[part] += count
        for word in words("a" + character):
            continuing.update(word[1:])
    kept = sorted(part for part, count in counts.items() if count >= min_frequency)
    return [*kept, *(_CONTINUES + part for part in kept if part in continuing)]
