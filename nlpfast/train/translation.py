"""Training of translation models: from parallel text and options to a folder that `nlpfast translate` reads.

An evaluation computes the negative log-likelihood of the validation text, and the BLEU of its translation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nlpfast.data.translation_batches import (
    IGNORED,
    TranslationBatch,
    count_targets_of,
    first,
)
from nlpfast.metrics import corpus_scores
from nlpfast.models.seq2seq import Seq2Seq, Seq2SeqConfig
from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.models.translation_files import load_model, save_vocabularies
from nlpfast.models.translator import Translator
from nlpfast.nn.losses import AlignedLoss, LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing
from nlpfast.train.average import AVERAGED
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.device import autocast, to_device
from nlpfast.train.distributed import Processes
from nlpfast.train.random_state import set_seed
from nlpfast.train.task_run import own_dropout, run_task
from nlpfast.train.trainer import Trainer, TrainState
from nlpfast.train.translation_data import TranslationData, read_translation_data
from nlpfast.train.translation_options import TranslationConfig, TranslationOptions

__all__ = [
    "TranslationLoss",
    "TranslationRun",
    "Validation",
    "build_model",
    "finished",
    "packings",
    "prepared",
    "train_translation",
]


@dataclasses.dataclass
class TranslationRun:
    """What a run gave.

    Attributes:
        state: progress, with the figures of the best evaluation.
        figures: of the last evaluation, by name.
        folder: model and vocabulary: the mean of the last evaluations' models, or the best one.
        parameters: number of weights.
    """

    state: TrainState
    figures: dict[str, float]
    folder: Path
    parameters: int


def packings(batch: TranslationBatch) -> tuple[Packing, Packing]:
    """Return where the sentences of the source and of the target begin and end."""
    return Packing(batch.source_cu, batch.source_longest), Packing(batch.target_cu, batch.target_longest)


class TranslationLoss:
    """The mean loss of a batch over its targets.

    Attributes:
        criterion: what it is, summed.
    """

    def __init__(self, criterion: LabelSmoothedCrossEntropyWithAlignment) -> None:
        """Take over the criterion."""
        self.criterion = criterion

    def __call__(self, model: nn.Module, batch: TranslationBatch) -> Tensor:
        """Return the mean loss; its parts are in `parts`.

        Args:
            model: a translation model, or what shares it between processes.
            batch: on its device.
        """
        found = self.parts(model, batch)
        return found.loss / found.sample_size

    def parts(self, model: nn.Module, batch: TranslationBatch) -> AlignedLoss:
        """Return the sums over a batch.

        Args:
            model: as of a call.
            batch: likewise.
        """
        found: AlignedLoss = model(
            *(batch.source, batch.target_in, *packings(batch)),
            criterion=self.criterion,
            target_out=batch.target_out,
            pairs=batch.pairs,
        )
        return found


def build_model(
    options: TranslationOptions, source: int, target: int, **special: int
) -> Transformer | Seq2Seq:
    """Return a new model.

    Args:
        options: its kind and sizes.
        source: subwords of the source's vocabulary.
        target: of the target's.
        special: pad_id, bos_id and eos_id.
    """
    config = Seq2SeqConfig if options.model == "rnn" else TransformerConfig
    names = {field.name for field in dataclasses.fields(config)}
    sizes: dict[str, Any] = {k: v for k, v in dataclasses.asdict(options).items() if k in names}
    sizes |= {"source_vocab": source, "target_vocab": target, **special}
    if options.model == "rnn":
        return Seq2Seq(Seq2SeqConfig(**{**sizes, "tied": options.tied == "decoder"}))
    return Transformer(TransformerConfig(**sizes))


class Validation:
    """Loss and BLEU of the validation text, for a trainer.

    Attributes:
        latest: figures of the last evaluation, by name.
    """

    def __init__(
        self, data: TranslationData, options: TranslationOptions, config: TrainerConfig, loss: TranslationLoss
    ) -> None:
        """Take over the text and how it is evaluated.

        Args:
            data: of the run.
            options: how many sentences are translated, how, and what makes an evaluation the best.
            config: device and precision.
            loss: of which the parts are logged.
        """
        self.batches, self.options, self.config, self.loss = data.validation, options, config, loss
        self.vocabularies = (data.source, data.target)
        text = data.sentences
        most = options.eval_sentences
        self.text = dataclasses.replace(text, source=text.source[:most], target=text.target[:most])
        self.latest: dict[str, float] = {}

    def __call__(self, model: nn.Module, pause: Callable[[], None]) -> dict[str, float]:
        """Return the figures; see `score_fn` of a trainer.

        Args:
            model: in evaluation mode.
            pause: is called between batches.
        """
        sums = dict.fromkeys(("smoothed", "nll", "accuracy"), 0.0)
        targets, device = 0, torch.device(self.config.device)
        for number in range(len(self.batches)):
            pause()
            batch = to_device(self.batches[number], device)
            with autocast(device, self.config.dtype):
                logged = self.loss.parts(model, batch).logged
            targets += count_targets_of(batch)
            for name, part in (("smoothed", "loss"), ("nll", "nll"), ("accuracy", "correct")):
                sums[name] += float(logged[part])
        means = {name: value / targets for name, value in sums.items()}
        translator = Translator(cast(Any, model), *self.vocabularies, dtype=getattr(torch, self.config.dtype))
        found = translator.translate(self.text.source, beam=self.options.eval_beam, pause=pause)
        [(_, bleu, _)] = corpus_scores([best[0].text for best in found], [self.text.target], ("bleu",))
        score = bleu if self.options.choose_by == "bleu" else -means["nll"]
        figures = {"val_loss": means["nll"], "ppl": math.exp(min(means["nll"], 700.0)), "bleu": bleu}
        self.latest = {
            **figures,
            "smoothed_loss": means["smoothed"],
            "accuracy": means["accuracy"],
            "score": score,
        }
        return self.latest


def train_translation(
    options: TranslationOptions,
    config: TranslationConfig,
    *,
    resume: str | None = None,
    quiet: bool = False,
) -> TranslationRun:
    """Train, and write log and checkpoints to `options.output_dir`, the vocabulary to `vocab/` in it.

    At the end `model/` in it has the mean of the kept models or the best one, with the vocabulary. Seeds the
    generators of Python, NumPy and PyTorch with `config.seed`. See `nlpfast.train.task_run.run_task` for what
    is found before anything is written, for processes and for exceptions.

    Args:
        options: text, model and folder.
        config: the training loop's settings.
        resume: go on from the latest checkpoint in this folder.
        quiet: print nothing; otherwise progress goes to stderr.
    """
    if config.strategy == "fsdp":
        raise ConfigError("strategy", "fsdp", "evaluations translate with whole models, use ddp")
    made: list[TranslationData] = []
    trainer, state = run_task(
        *(options, config, functools.partial(prepared, made=made)), resume=resume, quiet=quiet
    )
    return finished(trainer, state, made[0])


def finished(trainer: Trainer, state: TrainState, data: TranslationData) -> TranslationRun:
    """Write `model/`, the mean of the kept models or the best one, with the vocabulary, and say what it is.

    Args:
        trainer: at the end of a run, with `Validation` for its scores.
        state: of the run.
        data: likewise.
    """
    folder = cast(Path, trainer.output_dir)
    if trainer.processes.rank == 0:
        best = folder / (AVERAGED if trainer.config.average else "best")
        load_model(best).save_pretrained(folder / "model")
        save_vocabularies(folder / "model", data.source, data.target)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return TranslationRun(state, cast(Validation, trainer.score_fn).latest, folder / "model", parameters)


def prepared(
    options: TranslationOptions, config: TranslationConfig, quiet: bool, made: list[TranslationData]
) -> tuple[Trainer, str]:
    """Return the trainer at the start of a run, and what there is to say of it.

    Args:
        options: text, model and folder, which gets the vocabulary.
        config: the training loop's settings.
        quiet: of the trainer.
        made: gets the data.
    """
    data = read_translation_data(options, config.seed)
    made.append(data)
    set_seed(config.seed)
    special = {"pad_id": data.source.pad_id, "bos_id": data.source.bos_id, "eos_id": data.source.eos_id}
    model = build_model(options, len(data.source), len(data.target), **special)
    # those that accumulate, and of all processes, are one step
    together = config.accumulation_steps * Processes().world_size
    config = config.planned(-(-len(data.train) // together))
    loss = TranslationLoss(
        LabelSmoothedCrossEntropyWithAlignment(
            *(options.label_smoothing, options.alignment_lambda),
            align_shift=options.align_shift,
            ignore_index=IGNORED,
        )
    )
    trainer = Trainer(
        *(model, cast(Any, data.train), config),
        loss_fn=cast(Callable[[nn.Module, Any], Tensor], loss),
        count_fn=cast(Callable[[Any], int], count_targets_of),
        collate_fn=cast(Callable[[list[Any]], Any], first),
        score_fn=Validation(data, options, config, loss),
        output_dir=options.output_dir,
        metadata={**data.facts, "options": dataclasses.asdict(options)},
        quiet=quiet,
        width=options.d_model if options.model == "transformer" else options.hidden_size,
    )
    own_dropout(trainer)
    if trainer.processes.rank == 0:
        # all that can be wrong has been found, and the first checkpoint needs it
        save_vocabularies(options.output_dir, data.source, data.target)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    last = (
        f"{options.model} of {parameters:,} parameters; {trainer.total_steps():,} steps on {config.device}, "
        f"{config.dtype}"
    )
    return trainer, "\n".join([*data.words, last])
