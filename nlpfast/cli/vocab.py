"""Train a vocabulary of subwords.

Kinds: wordpiece, the one of BERT. Its files, in --output-dir, are those that transformers'
`BertTokenizer.from_pretrained` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

from nlpfast.cli.options import add_action, add_options, build
from nlpfast.data.biographies import biographies
from nlpfast.data.lines import ReadReport, read_lines
from nlpfast.data.wordpiece import FILES, WordPiece
from nlpfast.train.config import ConfigError, check_options, option

# embedded biographies, where no text is given
BIOGRAPHIES = 2000
# lines that are encoded at a time
_LINES = 1000


@dataclasses.dataclass(kw_only=True)
class WordPieceOptions:
    """What becomes of a text, and where the vocabulary goes.

    Raises:
        ConfigError: a value outside its bounds, or no folder.
    """

    output_dir: str | None = option(None, "folder for the vocabulary", metavar="DIR")
    size: int = option(30522, "pieces of the vocabulary, at most", least=6, most=1_000_000)
    cased: bool = option(False, "keep capitals and accents")
    min_frequency: int = option(
        2, "rarer pairs of pieces are not joined, rarer characters left out", least=1, below=2**63
    )
    overwrite: bool = option(False, "replace the vocabulary in --output-dir")

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if not self.output_dir:
            raise ConfigError("output_dir", self.output_dir, "the vocabulary goes there, name a folder")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the kinds, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    wordpiece = add_action(kinds, "wordpiece", "words and pieces of words (`pip install nlpfast[bert]`)")
    wordpiece.add_argument(
        "texts", nargs="*", metavar="TEXT", help="UTF-8 text, perhaps by gzip (embedded biographies)"
    )
    add_options(wordpiece, WordPieceOptions, "vocabulary")


def run(args: argparse.Namespace) -> int:
    """Train a vocabulary, and print its size and what it makes of the text on stdout.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: a text is missing or damaged, or there are no words in it, or too many characters.
        RuntimeError: tokenizers is not installed.
    """
    {"wordpiece": _wordpiece}[args.kind](args)
    return 0


def _wordpiece(args: argparse.Namespace) -> None:
    options = build(WordPieceOptions, args)
    folder = Path(str(options.output_dir))
    _check_folder(folder, FILES, options.overwrite)
    text = _Text(args.texts)
    wordpiece = WordPiece.train(
        text,
        options.size,
        lowercase=not options.cased,
        min_frequency=options.min_frequency,
        source=", ".join(args.texts) or "embedded biographies",
    )
    counts = _pieces(text, wordpiece)
    wordpiece.save(folder)
    _print(wordpiece, text, counts, folder)


class _Text:
    """The lines of all files that are not empty; to be gone through more than once."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = paths
        self.reports: list[ReadReport] = []

    def __iter__(self) -> Iterator[str]:
        # of the last time
        self.reports = [ReadReport(path) for path in self.paths or ["embedded biographies"]]
        if not self.paths:
            lines = biographies(BIOGRAPHIES)
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


def _pieces(text: _Text, wordpiece: WordPiece) -> Counter[int]:
    """Return how often each piece is in a text."""
    counts: Counter[int] = Counter()
    lines = iter(text)
    while part := list(islice(lines, _LINES)):
        counts.update(chain.from_iterable(wordpiece.encode_batch(part)))
    return counts


def _print(wordpiece: WordPiece, text: _Text, counts: Counter[int], folder: Path) -> None:
    pieces = counts.total()
    # each word begins with a piece that continues none
    words = sum(count for number, count in counts.items() if not wordpiece.continues[number])
    used = sum(report.used for report in text.reports)
    skipped = sum(report.read for report in text.reports) - used
    print(f"pieces           {len(wordpiece)}")
    print(f"lines            {used} used, {skipped} skipped as they are empty")
    print(f"pieces per word  {pieces / words:.3f}")
    print(f"unknown          {100 * counts[wordpiece.unk_id] / pieces:.3f} % of the pieces")
    print(f"folder           {folder}")
