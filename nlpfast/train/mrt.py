"""Minimum risk training: a translator makes those of its own translations more probable that are good.

The risk of a model is what its translations lack, on average, of the full reward of 1. Its gradient is

    d risk / d w = -E[(reward of y - what is expected) * d log p(y | x) / d w],   y drawn from p(y | x)

whatever is expected, as long as it does not depend on y (Williams 1992, "Simple statistical
gradient-following algorithms for connectionist reinforcement learning"; Shen et al. 2016, "Minimum risk
training for neural machine translation"). Translations are drawn by the cached decoder and without a graph,
and one ordinary pass over them, with a weight for each, has the gradient.

The model learns without dropout: translations are drawn by the very probabilities that the gradient is of. A
sample that is cut off at the longest length counts without its end. PAD and BOS are not drawn, and what
little probability they have is left out of the formula.

Shapes: B sentences, K translations of each that are drawn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nlpfast.data.subwords import Subwords
from nlpfast.data.translation_batches import IGNORED, TranslationBatch, TranslationDataset, first, make_batch
from nlpfast.hypotheses import Hypothesis, SpecialTokens
from nlpfast.models.seq2seq import Seq2Seq
from nlpfast.models.sequence_log_probabilities import translation_log_probabilities
from nlpfast.models.transformer import Transformer
from nlpfast.models.translation_files import save_vocabularies
from nlpfast.models.translator import Translator
from nlpfast.nn.losses import LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing
from nlpfast.sampling import sample
from nlpfast.sentence_rewards import REWARDS
from nlpfast.train.config import ConfigError
from nlpfast.train.device import to_device
from nlpfast.train.distributed import Processes
from nlpfast.train.mrt_options import MrtConfig, MrtOptions
from nlpfast.train.random_state import set_seed
from nlpfast.train.task_run import own_dropout, run_task
from nlpfast.train.trainer import Trainer
from nlpfast.train.translation import TranslationLoss, TranslationRun, Validation, finished
from nlpfast.train.translation_data import TranslationData, read_translation_data

__all__ = [
    "MinimumRisk",
    "RewardedBatch",
    "RewardedDataset",
    "advantages",
    "count_sentences_of",
    "sample_batch",
    "train_mrt",
]


class RewardedBatch(NamedTuple):
    """A batch of B pairs, on the CPU.

    Attributes:
        pairs: sentences and their translations.
        references: the translations as text, with which samples are compared.
    """

    pairs: TranslationBatch
    references: list[str]


def count_sentences_of(batch: RewardedBatch) -> int:
    """Return the number of sentences in a batch: what the risk is the mean of."""
    return batch.pairs.sentences


class RewardedDataset(Dataset[RewardedBatch]):
    """The batches of a `TranslationDataset`, with the text of the translations."""

    def __init__(self, batches: TranslationDataset) -> None:
        """Take over the batches."""
        self._batches = batches

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self._batches)

    def __getitem__(self, index: int) -> RewardedBatch:
        """Return a batch."""
        pairs = self._batches.pairs
        rows = pairs.rows[self._batches.rows(index)].tolist()
        return RewardedBatch(self._batches[index], [pairs.text.target[row] for row in rows])

    def source(self, index: int) -> str:
        """Return where the first pairs of a batch are from."""
        return self._batches.source(index)


def advantages(rewards: Tensor, samples: int) -> Tensor:
    """Return by how much samples are better than expected.

    Args:
        rewards: [B, K], of independent samples.
        samples: the first so many of each sentence are meant. The others say what is expected, their mean; if
            there are none, that is the mean of the samples but the one that is compared, and 0 for a single
            one.

    Returns:
        [B, samples].
    """
    meant, others = rewards[:, :samples], rewards[:, samples:]
    if others.shape[1]:
        return meant - others.mean(1, keepdim=True)
    if samples == 1:
        return meant
    return meant - (meant.sum(1, keepdim=True) - meant) / (samples - 1)


def sample_batch(
    sources: Sequence[Sequence[int]], samples: Sequence[Hypothesis], special: SpecialTokens
) -> TranslationBatch:
    """Return sampled translations as a batch to learn from, on the CPU.

    Args:
        sources: tokens of each sentence, without EOS.
        samples: one for each. EOS after one that was cut off does not count: its end was not drawn.
        special: ids of PAD, BOS and EOS.
    """
    ids = {name: getattr(special, name) for name in ("pad_id", "bos_id", "eos_id")}
    batch = make_batch(sources, [drawn.tokens for drawn in samples], **ids)
    cut = torch.tensor([not drawn.finished for drawn in samples])
    ends = batch.target_cu[1 : batch.sentences + 1] - 1
    return batch._replace(target_out=batch.target_out.index_fill(0, ends[cut], IGNORED))


class MinimumRisk:
    """The risk of a batch, for a trainer: a loss with the gradient of the risk."""

    def __init__(self, model: Transformer | Seq2Seq, vocabulary: Subwords, options: MrtOptions) -> None:
        """Take over what draws translations.

        Args:
            model: the one that is trained, itself, even if several processes share it.
            vocabulary: of the target.
            options: how many translations are drawn, and what counts.
        """
        self.model, self.vocabulary, self.options = model, vocabulary, options

    def __call__(self, model: nn.Module, batch: RewardedBatch) -> Tensor:
        """Return 1 minus the mean reward of all samples, plus the weighted nll of a sentence; a scalar.

        Only its gradient goes by the samples of `options.samples`. Draws from torch's global generator.

        Args:
            model: the same, or what shares it between processes.
            batch: on the model's device.
        """
        options, pairs = self.options, batch.pairs
        drawn = self.draw(pairs)
        rewards = self.rewards(drawn, batch.references)
        chosen = [found for row in drawn for found in row[: options.samples]]
        weights = advantages(rewards, options.samples).flatten() / options.samples
        sources = _sentences(pairs.source, pairs.source_cu, pairs.sentences)
        repeated = [source for source in sources for _ in range(options.samples)]
        if options.nll_weight:
            right = _sentences(pairs.target_out, pairs.target_cu, pairs.sentences)
            chosen += [Hypothesis(tokens, 0.0, 0.0, True) for tokens in right]
            weights = torch.cat((weights, weights.new_full((pairs.sentences,), options.nll_weight)))
            repeated += sources
        together = sample_batch(repeated, chosen, self.model.config)
        found = translation_log_probabilities(model, to_device(together, pairs.source.device))
        loss = -(weights.to(found) * found).sum() / pairs.sentences
        risk = 1 - float(rewards.mean())
        if options.nll_weight:
            risk -= options.nll_weight * float(found.detach()[-pairs.sentences :].mean())
        # the value is the risk, the gradient that of the loss
        return risk + (loss - loss.detach())

    def draw(self, pairs: TranslationBatch) -> list[list[Hypothesis]]:
        """Return K translations of each sentence, those of the gradient first.

        Args:
            pairs: on the model's device.
        """
        options = self.options
        cu = pairs.source_cu[: pairs.sentences + 1]
        padded = Packing(cu, pairs.source_longest).padded(pairs.source[: int(cu[-1])])
        return sample(
            *(self.model, padded, cu.diff()),
            samples=options.samples + options.baseline_samples,
            temperature=options.temperature,
            max_len_a=options.max_len_a,
            max_len_b=options.max_len_b,
        )

    def rewards(self, drawn: Sequence[Sequence[Hypothesis]], references: Sequence[str]) -> Tensor:
        """Return the rewards of translations, float64 [B, K], on the CPU.

        Args:
            drawn: K translations of each of B sentences.
            references: B correct ones, as text.
        """
        reward, decode = REWARDS[self.options.reward], self.vocabulary.decode
        rows = [
            [reward(decode(found.tokens), reference) for found in row]
            for row, reference in zip(drawn, references, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.float64)


def _sentences(tokens: Tensor, cu_seqlens: Tensor, sentences: int) -> list[list[int]]:
    """Return the tokens of packed sentences, each without its last one, EOS."""
    flat, ends = tokens.tolist(), cu_seqlens[: sentences + 1].tolist()
    return [flat[begin : end - 1] for begin, end in itertools.pairwise(ends)]


def train_mrt(
    options: MrtOptions, config: MrtConfig, *, resume: str | None = None, quiet: bool = False
) -> TranslationRun:
    """Train, and write log and checkpoints to `options.output_dir`, the vocabulary to `vocab/` in it.

    The "loss" of the log is the risk, 1 minus the mean reward. At the end `model/` has the mean of the kept
    models or the one with the best BLEU, with the vocabulary. Seeds the generators of Python, NumPy and
    PyTorch with `config.seed`. See `nlpfast.train.task_run.run_task` for what is found before anything is
    written, for processes and for exceptions.

    Args:
        options: text, model, rewards and folder.
        config: the training loop's settings.
        resume: go on from the latest checkpoint in this folder.
        quiet: print nothing; otherwise progress goes to stderr.
    """
    if config.strategy == "fsdp":
        raise ConfigError("strategy", "fsdp", "samples are drawn from whole models, use ddp")
    made: list[TranslationData] = []
    prepare = functools.partial(_prepared, made=made)
    trainer, state = run_task(options, config, prepare, resume=resume, quiet=quiet)
    return finished(trainer, state, made[0])


def _prepared(
    options: MrtOptions, config: MrtConfig, quiet: bool, made: list[TranslationData]
) -> tuple[Trainer, str]:
    """Return the trainer at the start of a run, and what there is to say of it; `made` gets the data."""
    translator = Translator.from_folder(cast(str, options.model))
    model = translator.model
    kind = "rnn" if isinstance(model, Seq2Seq) else "transformer"
    _check_longest(options, model)
    given = options.of_translation(kind)
    data = read_translation_data(given, config.seed, vocabularies=(translator.source, translator.target))
    made.append(data)
    set_seed(config.seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    # those that accumulate, and of all processes, are one step
    together = config.accumulation_steps * Processes().world_size
    planned = config.planned(-(-len(data.train) // together))
    nll = TranslationLoss(LabelSmoothedCrossEntropyWithAlignment(0.0, ignore_index=IGNORED))
    trainer = Trainer(
        *(model, cast(Any, RewardedDataset(data.train)), planned),
        loss_fn=cast(Any, MinimumRisk(model, data.target, options)),
        count_fn=cast(Any, count_sentences_of),
        collate_fn=cast(Any, first),
        score_fn=Validation(data, given, planned, nll),
        output_dir=options.output_dir,
        metadata={**data.facts, "options": dataclasses.asdict(options)},
        quiet=quiet,
        width=model.config.hidden_size if isinstance(model, Seq2Seq) else model.config.d_model,
    )
    # samples, too, differ between processes
    own_dropout(trainer)
    if trainer.processes.rank == 0:
        # all that can be wrong has been found, and the first checkpoint needs it
        save_vocabularies(options.output_dir, data.source, data.target)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    last = (
        f"{kind} of {parameters:,} parameters; {trainer.total_steps():,} steps on {config.device}, "
        f"{config.dtype}"
    )
    return trainer, "\n".join([*data.words, last])


def _check_longest(options: MrtOptions, model: Transformer | Seq2Seq) -> None:
    """Raise ConfigError if a sample may be longer than the model writes."""
    longest = math.floor(options.max_len_a * options.max_length) + options.max_len_b
    if isinstance(model, Transformer) and longest + 1 > model.config.max_positions:
        rule = (
            f"a sample of {longest} subwords is possible, the model writes {model.config.max_positions - 1}"
        )
        raise ConfigError("max_len_b", options.max_len_b, f"{rule}; lower it, --max-len-a or --max-length")
