"""Train BERT on sentence tasks, as CS224N's minBERT project does.

classify: one task, sentiment (sst, cfimdb) or any file of examples with classes. multitask: sentiment,
paraphrases and similarity on one encoder. Without files both train on embedded examples, and without --model
on a new BERT. Predictions for dev and test files are written as the project writes them. text and split make
files: a text to pretrain on, and parts of a file with examples.
"""

from __future__ import annotations

import argparse
import sys

from nlpfast.cli.options import UsageError, add_action, add_options, build
from nlpfast.cli.resumed import resumed_options, resumed_run
from nlpfast.train.sentences_options import ClassifyOptions, MultitaskOptions, SentencesOptions

KINDS: dict[str, tuple[type[SentencesOptions], str]] = {
    "classify": (ClassifyOptions, "one task: classes of sentences, or of pairs"),
    "multitask": (MultitaskOptions, "sentiment, paraphrases and similarity on one encoder"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, (options, about) in KINDS.items():
        action = add_action(actions, name, about)
        help_ = "go on with the run in DIR; options that are not given are those of the run"
        action.add_argument("--resume", metavar="DIR", help=help_)
        add_options(action, options, "data, model and recipe", underscores=True)
    text = add_action(actions, "text", "print the sentences of files with examples, one a line")
    text.add_argument("files", nargs="+", metavar="FILE", help="id, one or two sentences, perhaps a label")
    split = add_action(actions, "split", "divide a file with examples at random, line by line")
    split.add_argument("file", metavar="FILE", help="a header, then an example a line")
    split.add_argument("--seed", type=int, default=0, metavar="N", help="chooses the lines [0]")
    split.add_argument(
        "--parts",
        nargs="+",
        required=True,
        metavar="NAME=N",
        help="file of each part, and its examples; one N may be 'rest'",
    )


def run(args: argparse.Namespace) -> int:
    """Train and print the figures on stdout, or make files.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: a file is missing or damaged.
    """
    if args.action == "text":
        _text(args)
    elif args.action == "split":
        _split(args)
    else:
        _train(args)
    return 0


def _train(args: argparse.Namespace) -> None:
    kind = KINDS[args.action][0]
    options = build(kind, args)
    if args.resume is not None:
        options = resumed_options(kind, resumed_run(args), args)
    # files are looked for before torch is imported, which takes a while
    options.files()
    from nlpfast.train.sentences import train_sentences

    result = train_sentences(options, resume=args.resume)
    print(f"{'steps':<24} {result.state.step}")
    for name, value in result.figures.items():
        print(f"{name:<24} {value:.4f}")
    print(f"{'seconds':<24} {result.state.seconds:.1f}")
    for path in result.predictions:
        print(f"{'predictions':<24} {path}")
    print(f"{'model':<24} {result.folder}")


def _text(args: argparse.Namespace) -> None:
    from nlpfast.data.sentence_files import PARAPHRASE, SST, raw_rows, read_examples

    for path in args.files:
        pairs = PARAPHRASE.columns[1] in next(raw_rows(path), "").split("\t")
        # labels are not read: the column may have any name
        examples, report = read_examples(path, PARAPHRASE if pairs else SST, labelled=False)
        for example in examples:
            for sentence in filter(None, (" ".join(text.split()) for text in example.sentences)):
                print(sentence)
        print(report, file=sys.stderr)


def _split(args: argparse.Namespace) -> None:
    from nlpfast.data.lines import DataError
    from nlpfast.data.sentence_files import raw_rows
    from nlpfast.data.sentences import split
    from nlpfast.files import replacing

    parts = _parts(args.parts)
    header, *rows = raw_rows(args.file)
    sizes = [size for _, size in parts if size is not None]
    if sum(sizes) > len(rows):
        raise DataError(f"{args.file}: has {len(rows):,} examples, the parts need {sum(sizes):,}; lower them")
    *found, rest = split(rows, sizes, args.seed)
    for name, size in parts:
        lines = rest if size is None else found.pop(0)
        with replacing(name) as file:
            file.write("".join(f"{line}\n" for line in (header, *lines)).encode())
        print(f"{name:<24} {len(lines)}")


def _parts(words: list[str]) -> list[tuple[str, int | None]]:
    """Return the file of each part and its examples, None for the rest."""
    found: list[tuple[str, int | None]] = []
    for word in words:
        name, equals, size = word.rpartition("=")
        if not (name and equals and (size == "rest" or (size.isascii() and size.isdecimal()))):
            raise UsageError(f"--parts {word}: write NAME=N, or NAME=rest")
        found.append((name, None if size == "rest" else int(size)))
    if [size for _, size in found].count(None) > 1 or len({name for name, _ in found}) < len(found):
        raise UsageError(f"--parts {' '.join(words)}: give each file once, and rest to one of them")
    return found
