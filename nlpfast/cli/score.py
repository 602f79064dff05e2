"""Score translations against references: BLEU, chrF and TER, by sacreBLEU (`pip install nlpfast[nmt]`).

HYP and each REF are UTF-8 text, one sentence a line, as people read it: not in subwords and not tokenised.
Line i of each belongs to line i of the others; empty lines are sentences too. A line of the result has the
metric, its score in percent, and sacreBLEU's signature, which says how it was computed.
"""

from __future__ import annotations

import argparse
import sys

from nlpfast.cli.options import UsageError
from nlpfast.data.lines import ReadReport, read_lines_together
from nlpfast.metrics import BLEU_TOKENIZERS, CORPUS_METRICS, corpus_scores

_METRICS, _TOKENIZER = ("bleu", "chrf", "ter"), "13a"
_STDIN = "/dev/stdin"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument("hypothesis", metavar="HYP", help="translations; - for stdin")
    parser.add_argument("references", nargs="+", metavar="REF", help="correct translations, perhaps several")
    parser.add_argument(
        "--metric",
        nargs="+",
        choices=CORPUS_METRICS,
        default=_METRICS,
        help=f"which scores, after the files [{' '.join(_METRICS)}]",
    )
    parser.add_argument("--lowercase", action="store_true", help="compare without case; TER always does")
    parser.add_argument(
        "--tokenize", choices=BLEU_TOKENIZERS, default=_TOKENIZER, help=f"how BLEU makes words [{_TOKENIZER}]"
    )


def run(args: argparse.Namespace) -> int:
    """Print a score a line on stdout, and what is odd about the text on stderr.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: a file is missing or damaged, or the files differ in their number of lines.
        RuntimeError: sacreBLEU is not installed.
    """
    if "-" in args.references:
        raise UsageError("REF -: only HYP may be read from stdin, name a file")
    paths = [_STDIN if args.hypothesis == "-" else args.hypothesis, *args.references]
    report = ReadReport(paths[0])
    hypotheses, *references = map(list, zip(*read_lines_together(paths, report), strict=True))
    scores = corpus_scores(
        hypotheses, references, args.metric, lowercase=args.lowercase, tokenize=args.tokenize
    )
    if report.byte_order_marks:
        print(f"nlpfast: byte order marks taken off: {report.byte_order_marks}", file=sys.stderr)
    for path, lines in zip(paths, (hypotheses, *references), strict=True):
        _tell(path, [not line.strip() for line in lines], "are empty, and scored")
    tokenized = [line.rstrip().endswith(" .") for line in hypotheses]
    if args.tokenize != "none" and 2 * sum(tokenized) > len(tokenized):
        _tell(paths[0], tokenized, "end in ' .' as tokenised text does, of which the scores mean little")
    for name, score, signature in scores:
        print(f"{name:<8} {score:6.2f}  {signature}")
    return 0


def _tell(path: str, those: list[bool], what: str) -> None:
    """Say how many lines are so, and which is the first."""
    if any(those):
        place = f"the first {path}:{those.index(True) + 1}"
        print(f"nlpfast: {path}: {sum(those):,} of {len(those):,} lines {what}; {place}", file=sys.stderr)
