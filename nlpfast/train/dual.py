"""Dual supervised learning: two translators of opposite directions teach each other (Xia et al. 2017).

Both are trained on the same pairs, each with cross entropy and with what they disagree by, given two
language models that stay as they are: see `nlpfast.nn.dual_loss`. Any two translation models will do, of
different kinds if wanted. The language models are asked once for the whole corpus, before training, so that a
step has two networks.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from nlpfast.data.lines import DataError
from nlpfast.data.subwords import Subwords
from nlpfast.data.translation_batches import TranslationDataset, count_targets_of, first
from nlpfast.metrics import corpus_scores
from nlpfast.models.language_model_files import load_language_model, load_vocabulary
from nlpfast.models.seq2seq import Seq2Seq
from nlpfast.models.sequence_log_probabilities import translation_log_probabilities
from nlpfast.models.transformer import Transformer
from nlpfast.models.translation_files import save_vocabularies
from nlpfast.models.translator import Translator
from nlpfast.nn.dual_loss import DualLoss, dual_supervised_loss
from nlpfast.optim import build_optimizer, linear_weights_and_rest
from nlpfast.train import checkpoint
from nlpfast.train.config import ConfigError
from nlpfast.train.device import autocast, to_device
from nlpfast.train.distributed import Processes
from nlpfast.train.dual_batches import DualBatch, DualDataset, count_pairs_of
from nlpfast.train.dual_options import DualConfig, DualOptions
from nlpfast.train.language_model_scores import language_model_scores, scores_key
from nlpfast.train.random_state import set_seed
from nlpfast.train.task_run import own_dropout, run_task
from nlpfast.train.trainer import Trainer, TrainState
from nlpfast.train.translation_data import TranslationData, read_translation_data

__all__ = ["BACKWARD", "FORWARD", "DualRun", "DualTranslators", "pair_losses", "train_dual"]

# folders of the two models in a run
FORWARD, BACKWARD = "forward", "backward"
QUANTILES = (0.1, 0.5, 0.9)


@dataclasses.dataclass
class DualRun:
    """What a run gave.

    Attributes:
        state: progress, with the figures of the best evaluation.
        figures: of the last evaluation, by name.
        folders: the translators of the best evaluation, with their vocabularies: forward and backward.
        parameters: number of weights of both.
    """

    state: TrainState
    figures: dict[str, float]
    folders: tuple[Path, Path]
    parameters: int


class DualTranslators(nn.Module):
    """Two translators, which a trainer takes for one model.

    Attributes:
        source_to_target: the one.
        target_to_source: the other.
    """

    def __init__(self, source_to_target: nn.Module, target_to_source: nn.Module) -> None:
        """Take over two models, which share no weight."""
        super().__init__()
        self.source_to_target, self.target_to_source = source_to_target, target_to_source

    @property
    def clipped_apart(self) -> tuple[nn.Module, nn.Module]:
        """Return the two: the gradient of one is not to be made small as the other's is large."""
        return self.source_to_target, self.target_to_source

    def configure_optimizers(self, config: Any) -> torch.optim.Optimizer:
        """Return one optimizer of both; the weights of linear layers decay.

        Args:
            config: see `nlpfast.optim.build_optimizer`.
        """
        return build_optimizer(*linear_weights_and_rest(self), config)

    def forward(self, batch: DualBatch) -> tuple[Tensor, Tensor]:
        """Return log p(y|x) and log p(x|y) of the pairs of a batch, both [B].

        Args:
            batch: on the models' device.
        """
        there = translation_log_probabilities(self.source_to_target, batch.there)
        return there, translation_log_probabilities(self.target_to_source, batch.back)


def pair_losses(model: nn.Module, batch: DualBatch, *, length_norm: bool = False) -> DualLoss:
    """Return the losses of the pairs of a batch, in both directions.

    Args:
        model: `DualTranslators`, or what shares them between processes.
        batch: on their device.
        length_norm: let log-probabilities of tokens agree, not of sentences.
    """
    forward, backward = model(batch)
    tokens: dict[str, Any] = {}
    if length_norm:
        pairs = batch.there.sentences
        tokens = {
            "source_tokens": batch.there.source_cu.diff()[:pairs],
            "target_tokens": batch.there.target_cu.diff()[:pairs],
        }
    scores = batch.lm_source.to(forward.dtype), batch.lm_target.to(forward.dtype)
    return dual_supervised_loss(forward, backward, *scores, batch.dsl_lambda, **tokens)


def _mean_loss(model: nn.Module, batch: DualBatch, *, length_norm: bool) -> Tensor:
    """Return the loss of both translators, the mean over pairs."""
    losses = pair_losses(model, batch, length_norm=length_norm)
    return (losses.forward + losses.backward).mean()


class _Validation:
    """How well both translate, and by how much they disagree."""

    def __init__(self, batches: DualDataset, data: TranslationData, options: DualOptions, config: DualConfig):
        self.batches, self.data, self.options, self.config = batches, data, options, config
        self.latest: dict[str, float] = {}

    def __call__(self, model: nn.Module, pause: Callable[[], None]) -> dict[str, float]:
        device, gaps = torch.device(self.config.device), list[Tensor]()
        nll, targets = [0.0, 0.0], [0, 0]
        for number in range(len(self.batches)):
            pause()
            batch = to_device(self.batches[number], device)
            with autocast(device, self.config.dtype):
                losses = pair_losses(model, batch, length_norm=self.options.length_norm)
            gaps.append(losses.gap.double().cpu())
            both = ((losses.forward, batch.there), (losses.backward, batch.back))
            for side, (loss, part) in enumerate(both):
                nll[side] += float(loss.double().sum())
                targets[side] += count_targets_of(part)
        there, back = (total / count for total, count in zip(nll, targets, strict=True))
        gap = torch.cat(gaps)
        names = (f"gap_{round(100 * share)}" for share in QUANTILES)
        spread = zip(names, gap.quantile(torch.tensor(QUANTILES, dtype=gap.dtype)).tolist(), strict=True)
        figures = {
            "val_loss": there,
            "backward_loss": back,
            "ppl": math.exp(min(there, 700.0)),
            "backward_ppl": math.exp(min(back, 700.0)),
            "gap": float(gap.abs().mean()),
            **dict(spread),
            **self._bleu(cast(DualTranslators, model), pause),
        }
        mean = (figures["bleu"] + figures["backward_bleu"]) / 2
        self.latest = {**figures, "score": mean if self.options.choose_by == "bleu" else -(there + back) / 2}
        return self.latest

    def _bleu(self, model: DualTranslators, pause: Callable[[], None]) -> dict[str, float]:
        sides, most = (self.data.sentences.source, self.data.sentences.target), self.options.eval_sentences
        vocabularies, found = (self.data.source, self.data.target), {}
        for name, translates, way in (
            ("bleu", model.source_to_target, 1),
            ("backward_bleu", model.target_to_source, -1),
        ):
            (lines, references), (source, target) = sides[::way], vocabularies[::way]
            dtype = getattr(torch, self.config.dtype)
            translator = Translator(cast(Any, translates), source, target, dtype=dtype)
            best = translator.translate(lines[:most], beam=self.options.eval_beam, pause=pause)
            texts = [translations[0].text for translations in best]
            [(_, found[name], _)] = corpus_scores(texts, [references[:most]], ("bleu",))
        return found


def train_dual(
    options: DualOptions, config: DualConfig, *, resume: str | None = None, quiet: bool = False
) -> DualRun:
    """Train two translators together, and write log and checkpoints to `options.output_dir`.

    At the end `forward/` and `backward/` in it are translation models with their vocabularies, those of the
    best evaluation. Seeds the generators of Python, NumPy and PyTorch with `config.seed`. See
    `nlpfast.train.task_run.run_task` for what is found before anything is written, for processes and for
    exceptions.

    Args:
        options: text, models and folder.
        config: the training loop's settings.
        resume: go on from the latest checkpoint in this folder.
        quiet: print nothing; otherwise progress goes to stderr.
    """
    if config.strategy == "fsdp":
        raise ConfigError("strategy", "fsdp", "evaluations translate with whole models, use ddp")
    if config.average:
        raise ConfigError(
            "average", config.average, "the mean of two translators is not written, leave it out"
        )
    made: list[TranslationData] = []
    trainer, state = run_task(
        *(options, config, functools.partial(_prepared, made=made)), resume=resume, quiet=quiet
    )
    folder, data = Path(options.output_dir), made[0]
    model = cast(DualTranslators, trainer.model)
    if trainer.processes.rank == 0:
        checkpoint.load(folder / "best", model)
        for name, part, sides in (
            (FORWARD, model.source_to_target, (data.source, data.target)),
            (BACKWARD, model.target_to_source, (data.target, data.source)),
        ):
            cast(Any, part).save_pretrained(folder / name)
            save_vocabularies(folder / name, *sides)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures = cast(_Validation, trainer.score_fn).latest
    return DualRun(state, figures, (folder / FORWARD, folder / BACKWARD), parameters)


def _prepared(
    options: DualOptions, config: DualConfig, quiet: bool, made: list[TranslationData]
) -> tuple[Trainer, str]:
    """Return the trainer at the start of a run, and what there is to say of it; `made` gets the data."""
    there, back = (Translator.from_folder(cast(str, run)) for run in (options.forward, options.backward))
    source, target = there.source, there.target
    for run, side, wanted in (
        (options.backward, back.source, target),
        (options.backward, back.target, source),
    ):
        _check_vocabulary(cast(str, run), side, wanted)
    padded = any(isinstance(translator.model, Seq2Seq) for translator in (there, back))
    given = options.of_translation("rnn" if padded else "transformer")
    data = read_translation_data(given, config.seed, vocabularies=(source, target))
    made.append(data)
    (train, validation), digest = _with_scores(options, config, data)
    set_seed(config.seed)
    model = DualTranslators(cast(nn.Module, there.model), cast(nn.Module, back.model)).train()
    config = config.planned(-(-len(train) // (config.accumulation_steps * Processes().world_size)))
    trainer = Trainer(
        *(model, cast(Any, train), config),
        loss_fn=cast(Any, functools.partial(_mean_loss, length_norm=options.length_norm)),
        count_fn=cast(Any, count_pairs_of),
        collate_fn=cast(Any, first),
        score_fn=_Validation(validation, data, options, config),
        output_dir=options.output_dir,
        metadata={**data.facts, "digest": digest, "options": dataclasses.asdict(options)},
        quiet=quiet,
        width=_width(there.model),
    )
    own_dropout(trainer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    last = (
        f"two translators of {parameters:,} parameters; {trainer.total_steps():,} steps on {config.device}, "
        f"{config.dtype}"
    )
    return trainer, "\n".join([*data.words, last])


def _width(model: Transformer | Seq2Seq) -> int:
    return model.config.d_model if isinstance(model, Transformer) else model.config.hidden_size


def _check_vocabulary(run: str, found: Subwords, wanted: Subwords) -> None:
    if found.digest() != wanted.digest():
        rule = "train all models of a run with --vocab of the same folders"
        raise DataError(f"{run}: its vocabulary is not that of the forward translator; {rule}")


def _with_scores(
    options: DualOptions, config: DualConfig, data: TranslationData
) -> tuple[list[DualDataset], str]:
    """Return training and validation with the scores of the language models, and a digest of all that."""
    special: dict[str, Any] = {name: getattr(data.source, name) for name in ("pad_id", "bos_id", "eos_id")}
    digest, found = hashlib.sha256(data.facts["digest"].encode()), list[list[Any]]([[], []])
    for run, vocabulary, side in (
        (options.lm_source, data.source, "source"),
        (options.lm_target, data.target, "target"),
    ):
        place = cast(str, run)
        folder = next((p for p in (Path(place) / "model", Path(place)) if p.is_dir()), Path(place))
        _check_vocabulary(place, load_vocabulary(folder), vocabulary)
        model = load_language_model(folder).to(config.device)
        for part, scored in zip((data.train, data.validation), found, strict=True):
            sentences = getattr(part.pairs, side)
            try:
                scored.append(language_model_scores(model, sentences, **special))
            except ValueError as error:
                raise DataError(f"{place}: {error}") from error
            digest.update(scores_key(model, sentences, tuple(special.values())).encode())
    names = {name: special[name] for name in ("pad_id", "bos_id")}
    weight = {"dsl_lambda": options.dsl_lambda, "warmup_epochs": options.dsl_warmup_epochs}
    parts: list[tuple[TranslationDataset, list[Any], dict[str, Any]]]
    parts = [(data.train, found[0], weight), (data.validation, found[1], {"dsl_lambda": 0.0})]
    return [DualDataset(batches, tuple(scores), **names, **rest) for batches, scores, rest in parts], (
        digest.hexdigest()
    )
