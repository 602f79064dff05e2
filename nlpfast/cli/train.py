"""Train a model.

Tasks: lm, a GPT or an RNN on the characters of a text, or on its sentences; bert, a BERT on sentences with
masked words; translation, a Transformer or an RNN on sentences and their translations; mrt, such a model on
how good its own translations are; dual, two such models of opposite directions, which teach each other.
Writes log.jsonl and the checkpoints last/ and best/ to --output-dir. SIGINT, SIGTERM and SIGUSR1 save the run
and end it; --resume DIR goes on with it.
Several processes: torchrun --nproc_per_node=2 -m nlpfast train lm ...
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nlpfast.cli.options import UsageError, add_action, add_options, build, given
from nlpfast.cli.resumed import resumed_options, resumed_run
from nlpfast.train.bert_options import BertPretrainingOptions
from nlpfast.train.config import TrainerConfig
from nlpfast.train.dual_options import WITHOUT as DUAL_WITHOUT
from nlpfast.train.dual_options import DualConfig, DualOptions
from nlpfast.train.language_model_options import LanguageModelOptions
from nlpfast.train.mrt_options import MrtConfig, MrtOptions
from nlpfast.train.translation_options import WITHOUT, TranslationConfig, TranslationOptions

if TYPE_CHECKING:
    from nlpfast.train.dual import DualRun
    from nlpfast.train.translation import TranslationRun

TASKS: dict[str, tuple[type[Any], type[TrainerConfig], str]] = {
    "lm": (LanguageModelOptions, TrainerConfig, "train a language model on characters or sentences"),
    "bert": (BertPretrainingOptions, TrainerConfig, "pretrain a BERT on sentences with masked words"),
    "translation": (TranslationOptions, TranslationConfig, "train a model that translates"),
    "mrt": (MrtOptions, MrtConfig, "train a model that translates by the rewards of its translations"),
    "dual": (DualOptions, DualConfig, "train two translators of opposite directions, which teach each other"),
}
# tasks on sentences and their translations, with the settings that they have no use for
PAIRS = {"translation": WITHOUT, "mrt": WITHOUT, "dual": DUAL_WITHOUT}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the tasks, each with options of its own.

    Args:
        parser: the verb's parser.
    """
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    for name, (options, config, text) in TASKS.items():
        task = add_action(tasks, name, text)
        if name == "bert":
            help_ = "as --text: sentences, one a line, blank lines between documents"
            task.add_argument("corpus", nargs="?", metavar="CORPUS", help=help_)
        elif name in PAIRS:
            help_ = "as --source and --target: two texts, line by line, or one TSV file"
            task.add_argument("texts", nargs="*", metavar="TEXT", help=help_)
        task.add_argument(
            "--resume",
            metavar="DIR",
            help="go on with the run in DIR; options that are not given are those of the run",
        )
        add_options(task, options, "text, model and results")
        add_options(task, config, "training", without=PAIRS.get(name, ()))


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
    for text, field in zip(_texts(args), ("source", "target"), strict=False):
        if hasattr(args, field):
            raise UsageError(f"--{field} {getattr(args, field)}: it is given with {text}: leave one out")
        setattr(args, field, text)
    kind, training, _ = TASKS[args.task]
    config = build(training, args)
    if args.resume is None:
        options = build(kind, args)
        if hasattr(args, "text") and hasattr(args, "biographies"):
            raise UsageError("--biographies is given with --text, which takes their place: leave one out")
    else:
        # imports torch: a wrong option is reported without waiting for it
        from nlpfast.train.resume import saved_options

        saved = resumed_run(args)
        options = resumed_options(kind, saved, args)
        config = saved_options(training, saved.config, given(training, args))
    tasks: dict[str, Callable[..., dict[str, object]]]
    tasks = {"lm": _lm, "bert": _bert, "translation": _translation, "mrt": _mrt, "dual": _dual}
    results = tasks[args.task](options, config, args.resume)
    if int(os.environ.get("RANK", "0")) == 0:
        for name, value in results.items():
            print(f"{name:<16} {value}")
    return 0


def _texts(args: argparse.Namespace) -> list[str]:
    """Return the texts of a translation that are named without an option."""
    texts: list[str] = getattr(args, "texts", [])
    if len(texts) > 2:
        raise UsageError(f"{texts[2]}: give two texts, line by line, or one TSV file")
    return texts


# all import torch: a wrong option is reported without waiting for it
def _lm(options: LanguageModelOptions, config: TrainerConfig, resume: str | None) -> dict[str, object]:
    if options.vocab is not None:
        return _sentence_lm(options, config, resume)
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


def _sentence_lm(
    options: LanguageModelOptions, config: TrainerConfig, resume: str | None
) -> dict[str, object]:
    from nlpfast.train.sentence_language_model import perplexity, train_sentence_language_model

    result = train_sentence_language_model(options, config, resume=resume)
    state = result.state
    now, best = (perplexity(loss) for loss in (state.val_loss, state.best_loss))
    return {
        "steps": state.step,
        "parameters": result.parameters,
        "validation loss": f"{state.val_loss:.4f} (best {state.best_loss:.4f})",
        "perplexity": f"{now:.4f} (best {best:.4f})",
        "seconds": f"{state.seconds:.1f}",
        "model": result.folder,
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


def _translation(
    options: TranslationOptions, config: TranslationConfig, resume: str | None
) -> dict[str, object]:
    from nlpfast.train.translation import train_translation

    return _translator(train_translation(options, config, resume=resume))


def _mrt(options: MrtOptions, config: MrtConfig, resume: str | None) -> dict[str, object]:
    from nlpfast.train.mrt import train_mrt

    return _translator(train_mrt(options, config, resume=resume))


def _translator(result: TranslationRun) -> dict[str, object]:
    return {**_progress(result), "model": result.folder}


def _dual(options: DualOptions, config: DualConfig, resume: str | None) -> dict[str, object]:
    from nlpfast.train.dual import train_dual

    result = train_dual(options, config, resume=resume)
    forward, backward = result.folders
    return {**_progress(result), "forward model": forward, "backward model": backward}


def _progress(result: TranslationRun | DualRun) -> dict[str, object]:
    figures = {
        name.replace("_", " "): f"{value:.4f}" for name, value in result.figures.items() if name != "score"
    }
    return {
        "steps": result.state.step,
        "parameters": result.parameters,
        **figures,
        "seconds": f"{result.state.seconds:.1f}",
    }
