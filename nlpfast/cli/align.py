"""Score, combine and make word alignments in Pharaoh format.

A line of Pharaoh format has the links of a sentence, source-target, both counted from 0: `0-0 1-2 2-1`.
"""

from __future__ import annotations

import argparse
import sys

from nlpfast.alignment import METHODS
from nlpfast.cli.options import add_action
from nlpfast.train.aligner import MODELS

_METHOD = "grow-diag-final-and"
_SWAP_HELP = "the pairs of %s are target-source, as of an aligner that was run with the two texts exchanged"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    score = add_action(actions, "score", "print the alignment error rate, precision and recall, in percent")
    score.add_argument("hypothesis", metavar="HYP", help="alignments in Pharaoh format")
    score.add_argument(
        "--gold", required=True, help="gold standard, one line a sentence: i-j sure, ipj or i?j possible"
    )
    score.add_argument("--gold-one-based", action="store_true", help="the gold standard counts words from 1")
    score.add_argument("--target-source", action="store_true", help=_SWAP_HELP % "HYP")
    combine = add_action(actions, "symmetrize", "combine the alignments of the two directions of an aligner")
    combine.add_argument("forward", metavar="FWD", help="alignments of the source to target direction")
    combine.add_argument(
        "reverse", metavar="REV", help="of the other one, source-target too, as `fast_align -r` prints them"
    )
    combine.add_argument("--target-source", action="store_true", help=_SWAP_HELP % "REV")
    train = add_action(actions, "train", "align the words of parallel text (`pip install nlpfast[align]`)")
    train.add_argument("source", metavar="SRC", help="UTF-8 text, a sentence a line, words between spaces")
    train.add_argument("target", metavar="TGT", help="its translation, line by line")
    train.add_argument("--model", choices=MODELS, default=MODELS[0], help=f"which aligner [{MODELS[0]}]")
    extract = add_action(actions, "extract", "align the words of parallel text by a translation model")
    extract.add_argument("model", metavar="RUN", help="folder of a run of `nlpfast train translation`")
    extract.add_argument("source", metavar="SRC", help="UTF-8 text, a sentence a line")
    extract.add_argument("target", metavar="TGT", help="its translation, which the model is made to write")
    extract.add_argument("--subwords", action="store_true", help="link the model's subwords instead of words")
    extract.add_argument(
        "--layer", type=int, metavar="N", help="decoder layer, from 0 or -1 (the aligned one)"
    )
    extract.add_argument("--heads", type=int, metavar="N", help="the first N of its heads (those that align)")
    extract.add_argument("--device", default="auto", metavar="WORD", help="auto, cpu, cuda or cuda:N [auto]")
    for action in (combine, train):
        action.add_argument("--method", choices=METHODS, default=_METHOD, help=f"how to combine [{_METHOD}]")


def run(args: argparse.Namespace) -> int:
    """Print figures or alignments on stdout, and what was left out on stderr.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: a file is missing or damaged, or two files do not belong together.
        RuntimeError: the aligner is not installed.
        OSError: there is no model.
        ValueError: the model is damaged, or has no such layer or heads.
    """
    {"score": _score, "symmetrize": _symmetrize, "train": _train, "extract": _extract}[args.action](args)
    return 0


def _score(args: argparse.Namespace) -> None:
    from nlpfast.alignment import alignment_error_rate
    from nlpfast.data.alignments import check_same_length, read_alignments
    from nlpfast.data.text import DataError

    hypothesis = read_alignments(args.hypothesis)
    gold = read_alignments(args.gold, one_based=args.gold_one_based, possible=True)
    check_same_length(args.hypothesis, hypothesis, args.gold, gold)
    if not len(gold.pairs):
        raise DataError(f"{args.gold}: no links in it, so there is nothing to score against; check the file")
    if args.target_source:
        hypothesis = hypothesis.swapped()
    score = alignment_error_rate(hypothesis.links(), gold.sure_links(), gold.links())
    _tell_duplicates(args.hypothesis, hypothesis.duplicates)
    _tell_duplicates(args.gold, gold.duplicates)
    print(f"AER        {100 * score.aer:.2f}")
    print(f"precision  {100 * score.precision:.2f}")
    print(f"recall     {100 * score.recall:.2f}")
    print(f"links      {score.links}")
    print(f"sentences  {len(gold)}")


def _symmetrize(args: argparse.Namespace) -> None:
    from nlpfast.alignment import symmetrize
    from nlpfast.data.alignments import check_same_length, format_links, read_alignments

    forward, reverse = read_alignments(args.forward), read_alignments(args.reverse)
    check_same_length(args.forward, forward, args.reverse, reverse)
    _tell_duplicates(args.forward, forward.duplicates)
    _tell_duplicates(args.reverse, reverse.duplicates)
    there, back, other = forward.links(), reverse.links(), reverse.swapped().links()
    if args.target_source:
        back, other = other, back
    # two directions of one text agree on most links, unless one of them is read the wrong way round
    agreed, otherwise = (sum(len(a & b) for a, b in zip(there, way, strict=True)) for way in (back, other))
    if otherwise > agreed:
        change = "leave out" if args.target_source else "add"
        print(
            f"nlpfast: warning: {agreed} links agree, and {otherwise} would with {args.reverse} read the "
            f"other way round; {change} --target-source?",
            file=sys.stderr,
        )
    for a, b in zip(there, back, strict=True):
        print(format_links(symmetrize(a, b, args.method)))


def _train(args: argparse.Namespace) -> None:
    from nlpfast.data.alignments import format_links
    from nlpfast.data.parallel import read_parallel
    from nlpfast.train.aligner import align_words

    source, target = read_parallel(args.source, args.target)
    aligned = align_words(source, target, model=args.model, method=args.method)
    reasons = (("a side is empty", aligned.empty), ("too long for the aligner", aligned.too_long))
    for reason, sentences in reasons:
        if sentences:
            place = f"the first {args.source}:{sentences[0]}"
            print(
                f"nlpfast: {len(sentences)} of {len(source)} sentences without links, as {reason}; {place}",
                file=sys.stderr,
            )
    for links in aligned.links:
        print(format_links(links))


def _extract(args: argparse.Namespace) -> None:
    from nlpfast.data.alignments import format_links
    from nlpfast.data.lines import read_lines_together
    from nlpfast.models.translator import Translator
    from nlpfast.train.device import resolve_device

    translator = Translator.from_folder(args.model, device=resolve_device(args.device))
    asked = {"layer": args.layer, "heads": args.heads}
    options = {name: value for name, value in asked.items() if value is not None}
    source, target = zip(*read_lines_together((args.source, args.target)), strict=True)
    found = translator.align(
        translator.source.encode_batch(source),
        translator.target.encode_batch(target),
        place=lambda row: f"{args.source}:{row + 1}",
        **options,
    )
    for alignment in found:
        links = set(alignment.links()) if args.subwords else translator.word_links(alignment)
        print(format_links(links))


def _tell_duplicates(path: str, count: int) -> None:
    if count:
        print(f"nlpfast: {path}: links that come twice in their line, counted once: {count}", file=sys.stderr)
