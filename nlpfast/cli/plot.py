"""Draw pictures, PNG files, by matplotlib (`pip install nlpfast[plot]`).

curves     losses, scores and learning rate of one training run or several.
attention  what each subword of a translation attends to, all heads of a layer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nlpfast.cli.options import UsageError, add_action


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    curves = add_action(actions, "curves", "losses, scores and learning rate over the steps, from log.jsonl")
    curves.add_argument(
        "runs", nargs="+", metavar="RUN", help="folder of a run, or its log; several are compared"
    )
    attention = add_action(actions, "attention", "what a translation attends to, by a translation model")
    attention.add_argument("model", metavar="RUN", help="folder of a run of `nlpfast train translation`")
    attention.add_argument("source", metavar="SENTENCE", help="to be translated")
    attention.add_argument("--target", metavar="SENTENCE", help="its translation (the model's own)")
    attention.add_argument(
        "--layer", type=int, metavar="N", help="decoder layer, from 0 or -1 (the aligned one)"
    )
    for action in (curves, attention):
        action.add_argument(
            "--output", required=True, metavar="FILE.png", help="the picture, replaced if there is one"
        )


def run(args: argparse.Namespace) -> int:
    """Write a picture, and print its name on stdout; on stderr what was left out.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: a run has no log, or a damaged one, or nothing in it to draw; a sentence is too long.
        ValueError: a model is damaged, or has no such layer.
        RuntimeError: matplotlib is not installed.
        OSError: the picture cannot be written.
    """
    output = Path(args.output)
    _check_output(output)
    {"curves": _curves, "attention": _attention}[args.action](args, output)
    print(f"{'picture':<24} {output}")
    return 0


def _curves(args: argparse.Namespace, output: Path) -> None:
    from nlpfast.plot import curves
    from nlpfast.plot_run import read_log

    curves(args.runs, output)
    for name in args.runs:
        records, report = read_log(name)
        if report.skipped:
            print(f"nlpfast: {report}", file=sys.stderr)
        print(f"{'records':<24} {len(records)} of {name}")


def _attention(args: argparse.Namespace, output: Path) -> None:
    from nlpfast.models.translator import Translator
    from nlpfast.plot import attention

    translator = Translator.from_folder(args.model)
    probabilities, source, target = translator.attention(args.source, args.target, layer=args.layer)
    attention(probabilities, source, target, output)
    print(f"{'subwords':<24} {' '.join(target)}")


def _check_output(path: Path) -> None:
    """Raise if there can be no PNG file of this name, before anything is drawn."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"--output {path}: pictures are PNG files, give a name that ends in .png")
    if not path.parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.parent}, create it first")
    if path.is_dir():
        raise UsageError(f"--output {path}: it is a folder, name a file")
