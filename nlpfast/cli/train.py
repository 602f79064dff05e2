"""Train a model.

Tasks: lm, a GPT on the characters of a text. Writes log.jsonl and the checkpoints last/ and best/ to
--output-dir.
"""

from __future__ import annotations

import argparse

from nlpfast.cli.options import add_options, build
from nlpfast.train.config import LanguageModelOptions, TrainerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tasks, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    text = "train a GPT on the characters of a text"
    lm = tasks.add_parser("lm", help=text, description=text[0].upper() + text[1:] + ".")
    lm.add_argument("--debug", action="store_true", help="print the traceback of an error")
    add_options(lm, LanguageModelOptions, "text, model and results")
    add_options(lm, TrainerConfig, "training")


def run(args: argparse.Namespace) -> int:
    """Train, and print the final figures and the checkpoint's folder on stdout.

    Args:
        args: the parsed command line.

    Returns:
        0.
    """
    options, config = build(LanguageModelOptions, args), build(TrainerConfig, args)
    # imports torch: a wrong option is reported without waiting for it
    from nlpfast.train.language_model import train_language_model

    result = train_language_model(options, config)
    print(f"steps            {result.state.step}")
    print(f"parameters       {result.parameters}")
    print(f"validation loss  {result.state.val_loss:.4f} (best {result.state.best_loss:.4f})")
    print(f"seconds          {result.state.seconds:.1f}")
    print(f"checkpoint       {result.checkpoint}")
    return 0
