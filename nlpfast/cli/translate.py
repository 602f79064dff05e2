"""Translate text with a model that `nlpfast train translation` trained.

Reads FILE or stdin, one sentence a line, and prints a line for each: its translation. With --n-best or
--scores a translation is a line `number ||| text ||| score`, the number of its sentence counted from 0. With
--print-alignment a tab comes after the text, and what its words are aligned to: `hard`, pairs source-target
of words, from 0; `soft`, for each subword of the translation and EOS the probabilities of the subwords of the
source and EOS.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from nlpfast.cli.options import add_options, build
from nlpfast.data.lines import read_lines
from nlpfast.train.config import DTYPES, ConfigError, check_options, option

if TYPE_CHECKING:
    from nlpfast.models.translator import Translation, Translator

_STDIN = "/dev/stdin"
# sentences that are read before the first of them is translated
_LINES = 2048
_PENALTIES = ("length", "gnmt", "none")


@dataclasses.dataclass(kw_only=True)
class TranslateOptions:
    """How translations are searched for, and what is printed of them.

    Raises:
        ConfigError: a value outside its bounds.
    """

    beam: int = option(5, "hypotheses that go on; 1 is greedy", least=1, most=1000)
    n_best: int = option(1, "translations of a sentence", least=1)
    scores: bool = option(False, "print scores, too")
    length_penalty: str = option("length", "what scores are divided by", choices=_PENALTIES)
    alpha: float = option(1.0, "its strength; 0.6 is usual for gnmt", least=0, most=10)
    max_len_a: float = option(1.5, "a translation has at most a * subwords of the source + b", least=0)
    max_len_b: int = option(20, "b", least=1, most=1000)
    min_length: int = option(0, "subwords that a translation has at least", least=0)
    no_repeat_ngram: int = option(0, "no n-gram of this size comes twice (any may)", least=0)
    print_alignment: str | None = option(None, "what words are aligned to", choices=("hard", "soft"))
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes CUDA where there is one")
    dtype: str = option("float32", "precision, through autocast", choices=DTYPES)

    def __post_init__(self) -> None:
        """Check every value."""
        check_options(self)
        if self.n_best > self.beam:
            raise ConfigError("n_best", self.n_best, f"give at most --beam, which is {self.beam}")

    def search(self) -> dict[str, Any]:
        """Return the arguments of `Translator.translate`."""
        others = ("scores", "print_alignment", "device", "dtype")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument("model", metavar="RUN", help="folder of the run, or of its model")
    parser.add_argument("file", nargs="?", metavar="FILE", help="text to translate (stdin)")
    add_options(parser, TranslateOptions, "search and output")


def run(args: argparse.Namespace) -> int:
    """Print the translations on stdout.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: the text is missing or damaged, or a sentence is longer than the model reads.
        OSError: there is no model.
        ValueError: the model is damaged.
    """
    options = build(TranslateOptions, args)
    path = _STDIN if args.file in (None, "-") else args.file
    # imports torch: a wrong option is reported without waiting for it
    import torch

    from nlpfast.models.translator import Translator
    from nlpfast.train.device import resolve_device

    translator = Translator.from_folder(
        args.model, device=resolve_device(options.device), dtype=getattr(torch, options.dtype)
    )
    lines = read_lines(path)
    # who types sentences sees each translated before the next
    size = 1 if path == _STDIN and sys.stdin.isatty() else _LINES
    begin = 0
    while part := list(itertools.islice(lines, size)):
        for line in _translated(translator, part, path, begin, options):
            print(line)
        sys.stdout.flush()
        begin += len(part)
    return 0


def _translated(
    translator: Translator, lines: list[str], path: str, begin: int, options: TranslateOptions
) -> Iterator[str]:
    """Yield what is printed of the sentences from the line `begin`, counted from 0, on."""

    def place(row: int) -> str:
        return f"{path}:{begin + row + 1}"

    found = translator.translate(lines, place=place, **options.search())
    # of each translation
    rows = [row for row, best in enumerate(found) for _ in best]
    translations = [translation for best in found for translation in best]
    alignments = [""] * len(rows)
    if options.print_alignment is not None:
        alignments = _alignments(translator, [lines[row] for row in rows], translations, options)
    for row, translation, alignment in zip(rows, translations, alignments, strict=True):
        text = translation.text
        if options.scores or options.n_best > 1:
            text = f"{begin + row} ||| {text} ||| {translation.score:.6f}"
        yield text + ("" if options.print_alignment is None else f"\t{alignment}")


def _alignments(
    translator: Translator, lines: list[str], translations: list[Translation], options: TranslateOptions
) -> list[str]:
    from nlpfast.data.alignments import format_links

    sources = translator.source.encode_batch(lines)
    found = translator.align(sources, [translation.tokens for translation in translations])
    if options.print_alignment == "hard":
        return [format_links(translator.word_links(alignment)) for alignment in found]
    tables = [alignment.probabilities.tolist() for alignment in found]
    return [" ".join(",".join(f"{p:.6f}" for p in row) for row in table) for table in tables]
