"""Train a vocabulary of subwords, or cut text into its pieces and put it together again.

wordpiece  the one of BERT. Its files, in --output-dir, are those that transformers'
           `BertTokenizer.from_pretrained` reads.
bpe        the one of translation; joint for two languages if both are given. "▁" marks the first piece
           of a word. Its file is a tokenizer.json for transformers' `PreTrainedTokenizerFast`.
encode     a line of pieces with spaces between them for each line of text, by the bpe of a folder or a
           model of SentencePiece. Characters that are unknown become <unk>.
decode     the text of each line of pieces.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from nlpfast.cli.options import add_action, add_options, build
from nlpfast.data.biographies import biographies
from nlpfast.data.invented_languages import invented_pairs
from nlpfast.data.lines import DataError, ReadReport, read_lines
from nlpfast.data.subwords import FILES as SUBWORD_FILES
from nlpfast.data.subwords import Subwords
from nlpfast.data.wordpiece import FILES, WordPiece
from nlpfast.train.config import ConfigError, check_options, option

# embedded biographies, or sentences of each invented language, where no text is given
BIOGRAPHIES = 2000
SENTENCES = 4000
# lines that are encoded at a time
_LINES = 1000
_STDIN = "/dev/stdin"


@dataclasses.dataclass(kw_only=True)
class VocabularyOptions:
    """How many pieces there are to be, and where the vocabulary goes.

    Raises:
        ConfigError: a value outside its bounds, or no folder.
    """

    output_dir: str | None = option(None, "folder for the vocabulary", metavar="DIR")
    size: int = option(8000, "pieces of the vocabulary, at most", least=6, most=1_000_000)
    min_frequency: int = option(
        2, "rarer pairs of pieces are not joined, rarer characters left out", least=1, below=2**63
    )
    overwrite: bool = option(False, "replace the vocabulary in --output-dir")

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if not self.output_dir:
            raise ConfigError("output_dir", self.output_dir, "the vocabulary goes there, name a folder")


@dataclasses.dataclass(kw_only=True)
class WordPieceOptions(VocabularyOptions):
    """The same, and what becomes of capitals."""

    size: int = option(30522, "pieces of the vocabulary, at most", least=6, most=1_000_000)
    cased: bool = option(False, "keep capitals and accents")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the kinds, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    wordpiece = add_action(kinds, "wordpiece", "words and pieces of words (`pip install nlpfast[bert]`)")
    bpe = add_action(kinds, "bpe", "pieces that come of joining pairs (`pip install nlpfast[nmt]`)")
    for kind, embedded in ((wordpiece, "embedded biographies"), (bpe, "two invented languages")):
        kind.add_argument(
            "texts", nargs="*", metavar="TEXT", help=f"UTF-8 text, perhaps by gzip ({embedded})"
        )
    add_options(wordpiece, WordPieceOptions, "vocabulary")
    add_options(bpe, VocabularyOptions, "vocabulary")
    encode = add_action(kinds, "encode", "cut each line of a text into pieces")
    decode = add_action(kinds, "decode", "put the pieces of each line together")
    for action, text in ((encode, "UTF-8 text"), (decode, "lines of pieces with spaces between them")):
        action.add_argument("folder", metavar="DIR", help="of `nlpfast vocab bpe`, or a SentencePiece .model")
        action.add_argument("file", metavar="FILE", nargs="?", default="-", help=f"{text}; - for stdin [-]")


def run(args: argparse.Namespace) -> int:
    """Train a vocabulary and print its figures on stdout, or encode or decode lines to stdout.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: a text or a vocabulary is missing or damaged, there are no words in a text, or too many
            characters, or a piece is not in the vocabulary.
        RuntimeError: tokenizers or sentencepiece is not installed.
    """
    {"wordpiece": _wordpiece, "bpe": _bpe, "encode": _encode, "decode": _decode}[args.kind](args)
    return 0


def _wordpiece(args: argparse.Namespace) -> None:
    options = build(WordPieceOptions, args)
    folder = Path(str(options.output_dir))
    _check_folder(folder, FILES, options.overwrite)
    text = _Text(args.texts, "embedded biographies", lambda: biographies(BIOGRAPHIES))
    wordpiece = WordPiece.train(
        text,
        options.size,
        lowercase=not options.cased,
        min_frequency=options.min_frequency,
        source=text.name,
    )
    counts = _pieces(text, wordpiece)
    wordpiece.save(folder)
    begins = [not continues for continues in wordpiece.continues]
    _print(wordpiece, begins, text, counts, folder)


def _bpe(args: argparse.Namespace) -> None:
    options = build(VocabularyOptions, args)
    folder = Path(str(options.output_dir))
    _check_folder(folder, SUBWORD_FILES, options.overwrite)
    text = _Text(args.texts, "two invented languages", _invented)
    subwords = Subwords.train(text, options.size, min_frequency=options.min_frequency, source=text.name)
    counts = _pieces(text, subwords)
    subwords.save(folder)
    _print(subwords, subwords.begins, text, counts, folder)


def _invented() -> list[str]:
    pairs = invented_pairs(SENTENCES)
    return [*pairs.source, *pairs.target]


def _encode(args: argparse.Namespace) -> None:
    subwords = Subwords.from_folder(args.folder)
    for part in _parts(read_lines(_path(args.file))):
        for ids in subwords.encode_batch(part):
            print(" ".join(subwords.pieces(ids)))


def _decode(args: argparse.Namespace) -> None:
    subwords, path = Subwords.from_folder(args.folder), _path(args.file)
    numbers = {token: number for number, token in enumerate(subwords.tokens)}
    for line, text in enumerate(read_lines(path), 1):
        pieces = [piece for piece in text.split(" ") if piece]
        for piece in pieces:
            if piece not in numbers:
                reason = f"{piece!r} is not a piece of {args.folder}"
                raise DataError(f"{path}:{line}: {reason}; use the vocabulary that encoded the text")
        print(subwords.decode([numbers[piece] for piece in pieces]))


def _path(file: str) -> str:
    return _STDIN if file == "-" else file


def _parts(lines: Iterable[str]) -> Iterator[list[str]]:
    """Yield lines, so many at a time as are encoded together."""
    rest = iter(lines)
    while part := list(islice(rest, _LINES)):
        yield part


class _Text:
    """The lines of all files that are not empty; to be gone through more than once."""

    def __init__(self, paths: Sequence[str], embedded: str, lines: Callable[[], list[str]]) -> None:
        """Name the files, and what is there without any: its name and its lines."""
        self.paths = paths
        self.name = ", ".join(paths) or embedded
        self.lines = lines
        self.reports: list[ReadReport] = []

    def __iter__(self) -> Iterator[str]:
        # of the last time
        self.reports = [ReadReport(path) for path in self.paths or [self.name]]
        if not self.paths:
            lines = self.lines()
            self.reports[0].read = len(lines)
            yield from lines
        for path, report in zip(self.paths, self.reports, strict=False):
            for line in read_lines(path, report):
                if line:
                    yield line
                else:
                    report.skip("empty")


def _check_folder(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raise unless files can be written to a folder, which is made later."""
    for part in (folder, *folder.parents):
        if part.is_symlink() and not part.exists():
            raise ConfigError("output_dir", str(folder), f"{part} is a link to nothing, name another folder")
        if part.exists():
            break
    if not part.is_dir():
        raise ConfigError("output_dir", str(folder), f"{part} is a file, name a folder")
    if not os.access(part, os.W_OK | os.X_OK):
        raise ConfigError("output_dir", str(folder), f"{part} cannot be written to, name another folder")
    for name in names:
        if (folder / name).exists() and not overwrite:
            raise ConfigError(
                "output_dir", str(folder), f"has a {name}, name another folder or add --overwrite"
            )


def _pieces(text: _Text, vocabulary: WordPiece | Subwords) -> Counter[int]:
    """Return how often each piece is in a text."""
    counts: Counter[int] = Counter()
    for part in _parts(text):
        counts.update(chain.from_iterable(vocabulary.encode_batch(part)))
    return counts


def _print(
    vocabulary: WordPiece | Subwords,
    begins: Sequence[bool],
    text: _Text,
    counts: Counter[int],
    folder: Path,
) -> None:
    pieces = counts.total()
    # each word has one piece that begins it
    words = sum(count for number, count in counts.items() if begins[number])
    used = sum(report.used for report in text.reports)
    skipped = sum(report.read for report in text.reports) - used
    print(f"pieces           {len(vocabulary)}")
    print(f"lines            {used} used, {skipped} skipped as they are empty")
    print(f"pieces per word  {pieces / words:.3f}")
    print(f"unknown          {100 * counts[vocabulary.unk_id] / pieces:.3f} % of the pieces")
    print(f"folder           {folder}")
