"""Train a model.

Tasks: lm, a GPT on the characters of a text; bert, a BERT on sentences with masked words. Writes log.jsonl
and the checkpoints last/ and best/ to --output-dir. SIGINT, SIGTERM and SIGUSR1 save the run and end it;
--resume DIR goes on with it. Several processes: torchrun --nproc_per_node=2 -m nlpfast train lm ...
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from nlpfast.cli.options import UsageError, add_action, add_options, build, given
from nlpfast.cli.resumed import resumed_options, resumed_run
from nlpfast.train.bert_options import BertPretrainingOptions
from nlpfast.train.config import LanguageModelOptions, TrainerConfig

TASKS: dict[str, tuple[type[Any], str]] = {
    "lm": (LanguageModelOptions, "train a GPT on the characters of a text"),
    "bert": (BertPretrainingOptions, "pretrain a BERT on sentences with masked words"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tasks, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, (options, text) in TASKS.items():
        task = add_action(tasks, name, text)
        if name == "bert":
            help_ = "as --text: sentences, one a line, blank lines between documents"
            task.add_argument("corpus", nargs="?", metavar="CORPUS", help=help_)
        task.add_argument(
            "--resume",
            metavar="DIR",
            help="go on with the run in DIR; options that are not given are those of the run",
        )
        add_options(task, options, "text, model and results")
        add_options(task, TrainerConfig, "training")


def run(args: argparse.Namespace) -> int:
    """Train, and print the final figures and the checkpoint's folder on stdout.

    Args:
        args: the parsed command line.

    Returns:
        0.
    """
    if getattr(args, "corpus", None) is not None:
        if hasattr(args, "text"):
            raise UsageError(f"--text {args.text}: it is given with {args.corpus}: leave one out")
        args.text = args.corpus
    kind = TASKS[args.task][0]
    options, config = build(kind, args), build(TrainerConfig, args)
    if args.resume is not None:
        # imports torch: a wrong option is reported without waiting for it
        from nlpfast.train.resume import saved_options

        saved = resumed_run(args)
        options = resumed_options(kind, saved, args)
        config = saved_options(TrainerConfig, saved.config, given(TrainerConfig, args))
    elif hasattr(args, "text") and hasattr(args, "biographies"):
        raise UsageError("--biographies is given with --text, which takes their place: leave one out")
    train = _lm if args.task == "lm" else _bert
    results = train(options, config, args.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        for name, value in results.items():
            print(f"{name:<16} {value}")
    return 0


# both import torch: a wrong option is reported without waiting for it
def _lm(options: LanguageModelOptions, config: TrainerConfig, resume: str | None) -> dict[str, object]:
    from nlpfast.train.language_model import train_language_model

    result = train_language_model(options, config, resume=resume)
    state = result.state
    return {
        "steps": state.step,
        "parameters": result.parameters,
        "validation loss": f"{state.val_loss:.4f} (best {state.best_loss:.4f})",
        "seconds": f"{state.seconds:.1f}",
        "checkpoint": result.checkpoint,
    }


def _bert(options: BertPretrainingOptions, config: TrainerConfig, resume: str | None) -> dict[str, object]:
    from nlpfast.train.bert_pretraining import pretrain_bert

    result = pretrain_bert(options, config, resume=resume)
    figures = {
        name.replace("_", " "): f"{value:.4f}"
        for name, value in result.figures.items()
        if name not in ("val_loss", "score")
    }
    return {
        "steps": result.state.step,
        "parameters": result.parameters,
        "unigram entropy": f"{result.unigram_entropy:.4f}",
        **figures,
        "seconds": f"{result.state.seconds:.1f}",
        "model": result.folder,
    }
