"""Train a model.

Tasks: lm, a GPT on the characters of a text. Writes log.jsonl and the checkpoints last/ and best/ to
--output-dir. SIGINT, SIGTERM and SIGUSR1 save the run and end it; --resume DIR goes on with it. Several
processes: torchrun --nproc_per_node=2 -m nlpfast train lm ...
"""

from __future__ import annotations

import argparse
import os

from nlpfast.cli.options import UsageError, add_action, add_options, build, given, option_name
from nlpfast.train.config import LanguageModelOptions, TrainerConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tasks, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    lm = add_action(tasks, "lm", "train a GPT on the characters of a text")
    lm.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the run in DIR; options that are not given are those of the run",
    )
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

    if args.resume is not None:
        options, config = _resumed(args)
    elif hasattr(args, "text") and hasattr(args, "biographies"):
        raise UsageError("--biographies is given with --text, which takes their place: leave one out")
    result = train_language_model(options, config, resume=args.resume)
    if int(os.environ.get("RANK", "0")) > 0:
        return 0
    print(f"steps            {result.state.step}")
    print(f"parameters       {result.parameters}")
    print(f"validation loss  {result.state.val_loss:.4f} (best {result.state.best_loss:.4f})")
    print(f"seconds          {result.state.seconds:.1f}")
    print(f"checkpoint       {result.checkpoint}")
    return 0


def _resumed(args: argparse.Namespace) -> tuple[LanguageModelOptions, TrainerConfig]:
    """Return the options of the run in `--resume`, but for those that are given."""
    from nlpfast.train import checkpoint
    from nlpfast.train.resume import saved_options

    for option in ("output_dir", "overwrite"):
        if hasattr(args, option):
            raise UsageError(
                f"{option_name(option)} is given with --resume, which goes on in its folder: leave it out"
            )
    found = checkpoint.find_latest(args.resume)
    saved = checkpoint.load(found)
    folder = found.parent if found.name.partition(".")[0] in ("best", "last") else found
    options = {**saved.metadata.get("options", {}), "output_dir": str(folder), "overwrite": False}
    return (
        saved_options(LanguageModelOptions, options, given(LanguageModelOptions, args)),
        saved_options(TrainerConfig, saved.config, given(TrainerConfig, args)),
    )
