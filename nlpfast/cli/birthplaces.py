"""Answer "Where was X born?", the task of CS224N's assignment 5.

A character GPT is pretrained on documents with a hole, finetuned on questions with answers, and evaluated on
others. Actions and options are those of the assignment's run.py; options are also taken with hyphens. demo
tells the story on invented people.
"""

from __future__ import annotations

import argparse
import sys

from nlpfast.cli.options import UsageError, add_action, add_options, build
from nlpfast.train.birthplaces_options import VARIANTS, BirthplacesOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    texts = {
        "pretrain": "learn from documents to fill their holes",
        "finetune": "learn from questions with answers",
        "evaluate": "answer questions, and count the right answers",
    }
    for name, text in texts.items():
        action = add_action(actions, name, text)
        action.add_argument("variant", choices=VARIANTS, help="without or with a bottleneck")
        action.add_argument("pretrain_corpus_path", metavar="CORPUS", help="documents, one a line")
        add_options(action, BirthplacesOptions, "data, model and recipe", underscores=True)
    baseline = add_action(actions, "baseline", "give one answer to all, and count where it is right")
    _add(baseline, "eval_corpus_path", metavar="FILE", required=True, help="questions with answers")
    baseline.add_argument("--answer", default="London", metavar="WORDS", help="what is answered [London]")
    demo = add_action(actions, "demo", "pretrain, finetune and evaluate both variants on invented people")
    _add(demo, "output_dir", metavar="DIR", default="runs/birthplaces", help="[runs/birthplaces]")


def _add(parser: argparse.ArgumentParser, name: str, **arguments: object) -> None:
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **arguments)  # type: ignore[arg-type]


def run(args: argparse.Namespace) -> int:
    """Train, or print how many answers are right on stdout.

    Args:
        args: the parsed command line.

    Returns:
        0.

    Raises:
        DataError: a file is missing or damaged, or does not fit the others.
    """
    {"baseline": _baseline, "demo": _demo}.get(args.action, _model)(args)
    return 0


def _model(args: argparse.Namespace) -> None:
    from nlpfast.train.birthplaces_options import needed

    options = build(BirthplacesOptions, args)
    needed(options, args.action, args.variant)
    # imports torch: a wrong option is reported without waiting for it
    if args.action != "evaluate":
        from nlpfast.train.birthplaces import train

        train(args.action, args.variant, args.pretrain_corpus_path, options)
        return
    from nlpfast.train.birthplaces_answers import evaluate

    score = evaluate(args.variant, args.pretrain_corpus_path, options)
    if score.correct is None:
        print(f"Predictions written to {options.outputs_path}; no targets provided")
    else:
        print(_correct(score.correct, score.total))


def _correct(correct: int, total: int) -> str:
    return f"Correct: {correct} out of {total}: {round(100 * correct / total, 2)}%"


def _baseline(args: argparse.Namespace) -> None:
    from nlpfast.data.birthplaces_files import read_questions

    asked = read_questions(args.eval_corpus_path)
    if asked.answers is None:
        raise UsageError(
            f"--eval_corpus_path {args.eval_corpus_path}: it has no answers, give a file that has"
        )
    print(_correct(asked.answers.count(args.answer), len(asked.answers)))


def _demo(args: argparse.Namespace) -> None:
    from nlpfast.train.birthplaces_demo import demo

    for line in demo(args.output_dir):
        print(line, flush=True)
    print("the files are in", args.output_dir, file=sys.stderr)
