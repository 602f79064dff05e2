"""Language models of sentences: from a text, a vocabulary and options to a model with its vocabulary on disk.

The perplexity is exp of the mean negative log-likelihood over what is predicted: the tokens of a sentence and
EOS. BOS is read, and never predicted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from nlpfast.data.lines import DataError
from nlpfast.data.sentence_batches import SentenceBatch
from nlpfast.data.sentence_dataset import (
    SentenceDataset,
    SentenceText,
    count_sentence_targets,
    read_sentence_text,
)
from nlpfast.data.subwords import Subwords
from nlpfast.models.language_model_files import load_language_model, save_vocabulary
from nlpfast.nn.packing import Packing
from nlpfast.train.average import AVERAGED
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.evaluation import Evaluation
from nlpfast.train.language_model import build_language_model, model_width
from nlpfast.train.language_model_options import LanguageModelOptions
from nlpfast.train.random_state import set_seed
from nlpfast.train.task_run import own_dropout, run_task
from nlpfast.train.trainer import Trainer, TrainState

__all__ = [
    "SentenceLanguageModelRun",
    "perplexity",
    "sentence_loss",
    "train_sentence_language_model",
]

# of a text without a file to evaluate on, the last so much, and at most so many sentences
VALIDATION_SHARE, MOST_VALIDATION = 0.05, 1000


@dataclasses.dataclass
class SentenceLanguageModelRun:
    """What a run gave.

    Attributes:
        state: progress, with the validation losses.
        folder: model and vocabulary: the best model, or the mean of the last evaluations' models.
        parameters: number of weights.
    """

    state: TrainState
    folder: Path
    parameters: int


def perplexity(loss: float | None) -> float:
    """Return exp of a mean negative log-likelihood in nats, as far as float64 has it; NaN of None."""
    return math.nan if loss is None else math.exp(min(loss, 700.0))


def sentence_loss(model: nn.Module, batch: SentenceBatch) -> Tensor:
    """Return the mean negative log-likelihood of the tokens and of EOS; there are never all logits at once.

    Args:
        model: a `GPT` or an `RNNLM`, or what shares it between processes.
        batch: on the model's device.
    """
    loss: Tensor = model(
        batch.tokens_in,
        batch.tokens_out,
        return_logits=False,
        packing=Packing(batch.cu_seqlens, batch.longest),
    )[1]
    return loss


class _Evaluation(Evaluation):
    """An evaluation whose record has the perplexity too."""

    def into(self, record: dict[str, Any], model: nn.Module) -> bool:
        best = super().into(record, model)
        record["perplexity"] = perplexity(record["val_loss"])
        return best


def train_sentence_language_model(
    options: LanguageModelOptions, config: TrainerConfig, *, resume: str | None = None, quiet: bool = False
) -> SentenceLanguageModelRun:
    """Train a model on sentences, and write log and checkpoints to `options.output_dir`.

    At the end `model/` in it has the model of the lowest validation loss, or with `config.average` the mean
    of the kept ones, with the vocabulary. Seeds the generators of Python, NumPy and PyTorch with
    `config.seed`. See `nlpfast.train.task_run.run_task` for what is found before anything is written, for
    processes and for exceptions.

    Args:
        options: text, vocabulary, model and folder.
        config: the training loop's settings.
        resume: go on from the latest checkpoint in this folder.
        quiet: print nothing; otherwise progress goes to stderr.
    """
    made: list[Subwords] = []
    trainer, state = run_task(
        *(options, config, functools.partial(_prepared, made=made)), resume=resume, quiet=quiet
    )
    folder = Path(options.output_dir)
    if trainer.processes.rank == 0:
        best = folder / (AVERAGED if config.average else "best")
        load_language_model(best).save_pretrained(folder / "model")
        save_vocabulary(folder / "model", made[0])
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return SentenceLanguageModelRun(state, folder / "model", parameters)


def _read(options: LanguageModelOptions) -> tuple[SentenceText, SentenceText]:
    """Return the sentences to train on, and those to evaluate on."""
    assert options.text is not None
    text = read_sentence_text(options.text)
    if options.valid is not None:
        return text, read_sentence_text(options.valid)
    held = min(math.ceil(VALIDATION_SHARE * len(text)), MOST_VALIDATION)
    cut = len(text) - held
    if cut < 1:
        reason = "has 1 sentence, and another is needed to evaluate on"
        raise DataError(f"{text.path}: {reason}; name a --valid file")
    return text.part(0, cut, "kept to evaluate on"), text.part(cut, len(text), "for training")


def _digest(vocabulary: Subwords, *texts: SentenceText) -> str:
    """Return what tells vocabulary and texts apart: no sentence has the characters that end one or a text."""
    digest = hashlib.sha256(vocabulary.digest().encode())
    for text in texts:
        digest.update("".join(f"\n{sentence}" for sentence in text.sentences).encode() + b"\0")
    return digest.hexdigest()


def _prepared(
    options: LanguageModelOptions, config: TrainerConfig, quiet: bool, made: list[Subwords]
) -> tuple[Trainer, str]:
    """Return the trainer at the start of a run, and what to say of it; `made` gets the vocabulary."""
    if options.vocab is None:
        raise ConfigError("vocab", None, "sentences need a vocabulary, name the folder of one")
    vocabulary = Subwords.from_folder(options.vocab)
    made.append(vocabulary)
    texts = _read(options)
    train, validation = (SentenceDataset.of_text(text, vocabulary, options.max_length) for text in texts)
    set_seed(config.seed)
    special = {"pad_id": vocabulary.pad_id, "bos_id": vocabulary.bos_id, "eos_id": vocabulary.eos_id}
    # with BOS a sentence is as long as with EOS
    model = build_language_model(options, config, len(vocabulary), options.max_length, **special)
    reports = [part.report for part in (train, validation) if part.report is not None]
    facts = {"train": reports[0].as_dict(), "validation": reports[1].as_dict()}
    trainer = Trainer(
        *(model, train, config),
        validation=validation,
        loss_fn=cast(Callable[[nn.Module, Any], Tensor], sentence_loss),
        count_fn=cast(Callable[[Any], int], count_sentence_targets),
        collate_fn=cast(Callable[[list[Any]], Any], train.collate),
        output_dir=options.output_dir,
        metadata={
            "text": options.text,
            "digest": _digest(vocabulary, *texts),
            "data": facts,
            "options": dataclasses.asdict(options),
        },
        quiet=quiet,
        width=model_width(options),
    )
    whole = trainer.evaluation
    trainer.evaluation = _Evaluation(trainer.steps, whole.feed, None, whole.pause)
    own_dropout(trainer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tokens = f"{len(train.tokens.flat):,} of text and {len(validation.tokens.flat):,} to evaluate on"
    return trainer, "\n".join(
        [
            *map(str, reports),
            f"{len(vocabulary):,} subwords in the vocabulary; {tokens}",
            f"{options.model.upper()} of {parameters:,} parameters; {trainer.total_steps():,} steps on "
            f"{config.device}, {config.dtype}",
        ]
    )
