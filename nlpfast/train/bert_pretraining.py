"""Pretraining of BERT: from a text and options to a model in Hugging Face's form.

The last tenth of the documents is for validation. Targets of it are those of epoch 0, the same in every
evaluation.
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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nlpfast.data.lines import DataError, file_digest
from nlpfast.data.masked_text import (
    MaskedBatch,
    MaskedTextDataset,
    collate_masked,
    count_masked,
    unigram_entropy,
)
from nlpfast.data.text_documents import Document, embedded_documents, read_documents_of_sentences
from nlpfast.data.wordpiece import WordPiece
from nlpfast.models.bert import BertConfig, BertForPreTraining
from nlpfast.models.bert_files import local_folder
from nlpfast.nn.packing import Packing
from nlpfast.train.bert_options import SIZES, BertPretrainingOptions
from nlpfast.train.config import TrainerConfig
from nlpfast.train.device import autocast, to_device
from nlpfast.train.random_state import set_seed
from nlpfast.train.task_run import own_dropout, run_task
from nlpfast.train.trainer import Trainer, TrainState

__all__ = [
    "BertRun",
    "bert_config",
    "check_vocabulary",
    "new_vocabulary",
    "pretrain_bert",
    "pretraining_loss",
]

VALIDATION_SHARE = 0.1
HEAD_CHANNELS = 64


@dataclasses.dataclass
class BertRun:
    """What a run gave.

    Attributes:
        model: as of the last step.
        state: progress, with the validation losses.
        figures: of the last evaluation, by name.
        unigram_entropy: of the masked pieces, in nats: the loss of who knows no neighbours.
        folder: model and vocabulary of the best evaluation.
        parameters: number of weights.
    """

    model: BertForPreTraining
    state: TrainState
    figures: dict[str, float]
    unigram_entropy: float
    folder: Path
    parameters: int


def bert_config(size: str, vocabulary: int, dropout: float) -> BertConfig:
    """Return the configuration of a new model.

    Args:
        size: one of SIZES.
        vocabulary: number of pieces.
        dropout: of hidden states and attention.
    """
    layers, channels = SIZES[size]
    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=channels // HEAD_CHANNELS,
        intermediate_size=4 * channels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def new_vocabulary(
    model: str | None, vocab: str | None, lines: Callable[[], list[str]], *, size: int, cased: bool
) -> WordPiece:
    """Return the vocabulary of a folder, of the model, or one that is made.

    Args:
        model: a folder, or a name on the hub, whose vocabulary is taken unless another is named.
        vocab: folder of the vocabulary.
        lines: the text to make one of.
        size: pieces of one that is made.
        cased: it has capitals.

    Raises:
        DataError: there is none in the folder, or it is damaged.
        OSError: the model cannot be had.
    """
    if vocab is not None:
        return WordPiece.from_folder(vocab)
    if model is not None:
        files = (("tokenizer.json", "vocab.txt"), "tokenizer_config.json")
        return WordPiece.from_folder(local_folder(model, files))
    return WordPiece.train(lines(), size, lowercase=not cased)


def check_vocabulary(model: str, config: BertConfig, pieces: int) -> None:
    """Raise unless a model has embeddings for all pieces.

    Args:
        model: its name, for the message.
        config: of it.
        pieces: of the vocabulary.

    Raises:
        DataError: it has fewer.
    """
    if config.vocab_size < pieces:
        found = f"has {config.vocab_size} pieces, the vocabulary {pieces}"
        raise DataError(f"{model}: {found}; name the vocabulary that belongs to it")


def pretraining_loss(model: nn.Module, batch: MaskedBatch) -> Tensor:
    """Return the loss of a batch: that of its masked pieces, and with pairs that of what follows what.

    Args:
        model: BertForPreTraining.
        batch: on the model's device.
    """
    loss: Tensor = model(*_inputs(batch), return_logits=False, **_options(batch)).loss
    return loss


def _inputs(batch: MaskedBatch) -> tuple[Tensor, None, Tensor]:
    return batch.packed.input_ids, None, batch.packed.token_type_ids


def _options(batch: MaskedBatch) -> dict[str, Any]:
    packing = Packing(batch.packed.cu_seqlens, batch.packed.longest)
    # Hugging Face's class 0 is "follows"
    label = None if batch.is_next is None else 1 - batch.is_next
    return {
        "packing": packing,
        "rows": batch.rows,
        "labels": batch.targets,
        "next_sentence_label": label,
    }


class _Validation:
    """Losses and accuracies of the validation data: of its masked pieces, and of what follows what."""

    def __init__(self, dataset: MaskedTextDataset, batch_size: int, config: TrainerConfig) -> None:
        self.dataset, self.batch_size, self.config = dataset, batch_size, config
        self.latest: dict[str, float] = {}

    def __call__(self, model: nn.Module, pause: Callable[[], None]) -> dict[str, float]:
        sums = dict.fromkeys(("mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"), 0.0)
        targets = pairs = 0
        collate = cast(Callable[[Any], Any], collate_masked)
        device = torch.device(self.config.device)
        for data in DataLoader(cast(Any, self.dataset), self.batch_size, collate_fn=collate):
            pause()
            batch: MaskedBatch = to_device(data, device)
            options = _options(batch)
            following = options.pop("next_sentence_label")
            with autocast(device, self.config.dtype):
                out = model(*_inputs(batch), **options)
            targets += (count := count_masked(batch))
            sums["mlm_loss"] += float(out.loss) * count
            sums["mlm_accuracy"] += int((out.prediction_logits.argmax(1) == batch.targets).sum())
            if following is not None:
                relation = out.seq_relationship_logits[: len(following)].float()
                pairs += len(following)
                sums["nsp_loss"] += float(F.cross_entropy(relation, following, reduction="sum"))
                sums["nsp_accuracy"] += int((relation.argmax(1) == following).sum())
        numbers = {"mlm": targets, "nsp": pairs}
        figures = {key: value / numbers[key[:3]] for key, value in sums.items() if numbers[key[:3]]}
        loss = figures["mlm_loss"] + figures.get("nsp_loss", 0.0)
        self.latest = {"val_loss": loss, **figures, "score": -loss}
        return self.latest


def pretrain_bert(
    options: BertPretrainingOptions,
    config: TrainerConfig,
    *,
    resume: str | None = None,
    quiet: bool = False,
) -> BertRun:
    """Pretrain a BERT, and write log and checkpoints to `options.output_dir`, and to `model/` in it the best.

    `model/` is a folder of Hugging Face's form with the vocabulary. Seeds the generators of Python, NumPy and
    PyTorch with `config.seed`. See `nlpfast.train.task_run.run_task` for what is found before anything is
    written, for processes and for exceptions.

    Args:
        options: text, model and folder.
        config: the training loop's settings.
        resume: go on from the latest checkpoint in this folder.
        quiet: print nothing; otherwise progress goes to stderr.
    """
    made: list[WordPiece] = []
    trainer, state = run_task(
        *(options, config, functools.partial(_prepared, made=made)), resume=resume, quiet=quiet
    )
    folder = Path(options.output_dir)
    if trainer.processes.rank == 0:
        BertForPreTraining.from_pretrained(folder / "best").save_pretrained(folder / "model")
        made[0].save(folder / "model")
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    validation = cast(_Validation, trainer.score_fn)
    return BertRun(
        model=cast(BertForPreTraining, trainer.model),
        state=state,
        figures=validation.latest,
        unigram_entropy=unigram_entropy(validation.dataset),
        folder=folder / "model",
        parameters=parameters,
    )


def _read(options: BertPretrainingOptions, seed: int) -> tuple[list[Document], dict[str, Any]]:
    """Return the documents, and what a checkpoint tells of them."""
    if options.text is None:
        documents = embedded_documents(options.biographies, seed)
        text = "\n".join("\n".join(document) for document in documents)
        return documents, {
            "text": "embedded biographies",
            "digest": hashlib.sha256(text.encode()).hexdigest(),
        }
    documents, report = read_documents_of_sentences(options.text)
    facts = {"text": options.text, "digest": file_digest(options.text), "data": report.as_dict()}
    return documents, facts


def _prepared(
    options: BertPretrainingOptions, config: TrainerConfig, quiet: bool, made: list[WordPiece]
) -> tuple[Trainer, str]:
    """Return the trainer at the start of a run, and what there is to say of it; `made` gets a vocabulary."""
    documents, metadata = _read(options, config.seed)
    source = metadata["text"]
    if options.no_nsp and len(documents) == 1:
        # a text without blank lines: its last sentences are for validation
        documents = [Document([line], documents[0].line + i) for i, line in enumerate(documents[0])]
    cut = len(documents) - math.ceil(VALIDATION_SHARE * len(documents))
    if cut < 1:
        fix = "put blank lines between documents, or add --no-nsp, which needs 2 sentences"
        raise DataError(f"{source}: has 1 document, and another is needed for validation; {fix}")
    training, validation = documents[:cut], documents[cut:]
    vocabulary = new_vocabulary(
        *(options.model, options.vocab, lambda: [line for part in training for line in part]),
        size=options.vocab_size,
        cased=options.cased,
    )
    made.append(vocabulary)
    set_seed(config.seed)
    model = _model(options, len(vocabulary))
    parts = {
        name: MaskedTextDataset(
            *(part, vocabulary),
            # a model may read less than is asked for
            max_length=min(options.max_length, model.config.max_position_embeddings),
            nsp=not options.no_nsp,
            masking=options.masking,
            seed=config.seed,
            source=source,
        )
        for name, part in (("train", training), ("validation", validation))
    }
    metadata["options"] = dataclasses.asdict(options)
    # the vocabulary belongs to the data: another would give other numbers
    tokens = "\n".join(vocabulary.tokens).encode("utf-8", "surrogatepass")
    metadata["digest"] = hashlib.sha256(metadata["digest"].encode() + tokens).hexdigest()
    trainer = Trainer(
        *(model, parts["train"], config),
        loss_fn=cast(Callable[[nn.Module, Any], Tensor], pretraining_loss),
        count_fn=cast(Callable[[Any], int], count_masked),
        collate_fn=cast(Callable[[list[Any]], Any], collate_masked),
        score_fn=_Validation(parts["validation"], config.eval_batch_size or 4 * config.batch_size, config),
        output_dir=options.output_dir,
        metadata=metadata,
        quiet=quiet,
        width=model.config.hidden_size,
    )
    own_dropout(trainer)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    cuts = sum(part.truncated for part in parts.values())
    return trainer, (
        f"{source}: {len(documents):,} documents, {len(parts['train']):,} items for training, "
        f"{cuts:,} sentences cut; {len(vocabulary):,} pieces, unigram entropy "
        f"{unigram_entropy(parts['train']):.3f}; BERT of {parameters:,} parameters; "
        f"{trainer.total_steps():,} steps on {config.device}, {config.dtype}"
    )


def _model(options: BertPretrainingOptions, pieces: int) -> BertForPreTraining:
    """Return a new model, or the one to go on with."""
    if options.model is None:
        return BertForPreTraining(bert_config(options.config, pieces, options.dropout))
    model = BertForPreTraining.from_pretrained(
        options.model, hidden_dropout_prob=options.dropout, attention_probs_dropout_prob=options.dropout
    )
    check_vocabulary(options.model, model.config, pieces)
    return model
