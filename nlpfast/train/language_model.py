"""Character language models: from a text and options to a trained model on disk."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, cast

from torch.utils.data import Dataset, Subset

from nlpfast.data.characters import read_characters
from nlpfast.data.text import CharDataset, CharVocabulary, DataError, biography_text, read_text
from nlpfast.data.token_cache import Tokens
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.rnnlm import RNNLM, RNNLMConfig
from nlpfast.train.config import ConfigError, TrainerConfig
from nlpfast.train.language_model_options import LanguageModelOptions
from nlpfast.train.objective import loss_alone
from nlpfast.train.random_state import set_seed
from nlpfast.train.task_run import own_dropout, run_task
from nlpfast.train.trainer import Trainer, TrainState

TRAINING_SHARE = 0.9


@dataclasses.dataclass
class LanguageModelRun:
    """What a run gave.

    Attributes:
        model: the trained model, as of the last step.
        state: progress, with the validation losses.
        checkpoint: folder of the best checkpoint.
        parameters: number of weights.
    """

    model: GPT | RNNLM
    state: TrainState
    checkpoint: Path
    parameters: int


def split_tokens(
    tokens: Tokens, vocabulary: CharVocabulary, block_size: int, source: str
) -> tuple[CharDataset, Dataset[object]]:
    """Return training windows and validation windows of a text.

    The first 90 % of the characters are for training, all their windows; the last 10 % are for validation, in
    windows that do not overlap, so that each character is predicted once.

    Args:
        tokens: numbers of at least block_size + 1 characters in the last tenth.
        vocabulary: of the whole text.
        block_size: characters in a window.
        source: what messages call the text, its file for example.

    Raises:
        DataError: the text is too short.
    """
    size = len(tokens)
    cut = int(size * TRAINING_SHARE)
    if min(cut, size - cut) < block_size + 1:
        raise DataError(
            f"{source}: {size} characters are too few: the validation tenth needs block_size + 1 = "
            f"{block_size + 1}, so give about {10 * (block_size + 1)} characters or a smaller block_size"
        )
    training, validation = (
        CharDataset.from_tokens(tokens, block_size, vocabulary, source=source, start=start, stop=stop)
        for start, stop in ((0, cut), (cut, size))
    )
    return training, Subset(validation, range(0, len(validation), block_size))


def _read(options: LanguageModelOptions, seed: int) -> tuple[Tokens, CharVocabulary, dict[str, Any]]:
    """Return the characters of the text, and what a checkpoint tells of it."""
    if options.text is not None and (os.path.isfile(options.text) or not os.path.exists(options.text)):
        corpus = read_characters(options.text)
        about = {"digest": corpus.digest, "data": corpus.report.as_dict()}
        return corpus.tokens, corpus.vocabulary, {"text": options.text, **about}
    # a pipe can be read once
    text = biography_text(options.biographies, seed) if options.text is None else read_text(options.text)
    vocabulary = CharVocabulary.from_text(text)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    about = {"text": options.text or "embedded biographies", "digest": digest}
    return vocabulary.encode(text).numpy(), vocabulary, about


def build_language_model(
    options: LanguageModelOptions, config: TrainerConfig, tokens: int, longest: int, **special: int | None
) -> GPT | RNNLM:
    """Return a new model.

    Args:
        options: its kind and sizes.
        config: the training loop's settings.
        tokens: of the vocabulary.
        longest: the most tokens that a GPT reads; an RNN reads any number.
        **special: pad_id, bos_id and eos_id, which an RNN's configuration holds; None of those that the
            vocabulary has not.

    Raises:
        ConfigError: the processes of the run cannot share this kind of model.
    """
    if options.model == "rnn":
        if config.strategy == "fsdp":
            raise ConfigError("strategy", "fsdp", "an RNN is not shared in parts, use ddp")
        sizes: dict[str, Any] = {"embed_size": options.embed_size, "hidden_size": options.hidden_size}
        sizes |= {"layers": options.n_layer, "dropout": options.dropout, **special}
        return RNNLM(RNNLMConfig(vocab_size=tokens, **sizes))
    names = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
    sizes = {"n_layer": options.n_layer, "n_head": options.n_head, "n_embd": options.n_embd}
    return GPT(GPTConfig(tokens, longest, **sizes, **dict.fromkeys(names, options.dropout)))


def model_width(options: LanguageModelOptions) -> int:
    """Return the channels of a model, for the schedule "noam"."""
    return options.n_embd if options.model == "gpt" else options.hidden_size


def train_language_model(
    options: LanguageModelOptions, config: TrainerConfig, *, resume: str | None = None, quiet: bool = False
) -> LanguageModelRun:
    """Train a model on characters and write `log.jsonl`, `last/` and `best/` to `options.output_dir`.

    Everything that can be wrong with options and text is found before anything is written. Seeds the
    generators of Python, NumPy and PyTorch with `config.seed`. Under torchrun each of its processes calls
    this, and they train one model together.

    Args:
        options: text, model and folder.
        config: the training loop's settings.
        resume: go on from the latest checkpoint in this folder, with the bits of a run that never stopped.
        quiet: print nothing; otherwise progress goes to stderr.

    Raises:
        ConfigError: an option that cannot be served, or that a run which is resumed cannot change.
        DataError: the text cannot be read, is too short, or is not that of the run.
        CheckpointError: there is nothing to resume, or it is damaged.
        TrainingError: the run cannot go on.
        OSError: a file cannot be written.
        KeyboardInterrupt: after SIGINT, once the run is saved.
        Terminated: after SIGTERM or SIGUSR1, once the run is saved.
    """
    if options.vocab is not None:
        rule = "sentences are for train_sentence_language_model, call that or leave it out"
        raise ConfigError("vocab", options.vocab, rule)
    trainer, state = run_task(options, config, _prepared, resume=resume, quiet=quiet)
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    return LanguageModelRun(
        cast(GPT | RNNLM, trainer.model), state, Path(options.output_dir) / "best", parameters
    )


def _prepared(options: LanguageModelOptions, config: TrainerConfig, quiet: bool) -> tuple[Trainer, str]:
    """Return the trainer at the start of a run, and what there is to say of it."""
    tokens, vocabulary, metadata = _read(options, config.seed)
    source = metadata["text"]
    train, validation = split_tokens(tokens, vocabulary, options.block_size, source)
    set_seed(config.seed)
    # none of the characters is a special one
    special = dict.fromkeys(("pad_id", "bos_id", "eos_id"))
    model = build_language_model(options, config, len(vocabulary), options.block_size, **special)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    lines = f"{metadata['data']['used']:,} lines used, " if "data" in metadata else ""
    metadata |= {"vocabulary": vocabulary.chars, "options": dataclasses.asdict(options)}
    trainer = Trainer(
        *(model, train, config),
        loss_fn=loss_alone,
        validation=validation,
        output_dir=options.output_dir,
        metadata=metadata,
        quiet=quiet,
        width=model_width(options),
    )
    own_dropout(trainer)
    return trainer, (
        f"{source}: {lines}{len(tokens):,} characters, {len(vocabulary)} distinct; "
        f"{options.model.upper()} of {parameters:,} parameters; "
        f"{trainer.total_steps():,} steps on {config.device}, {config.dtype}"
    )
