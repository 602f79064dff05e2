"""Answers of a model of the birthplaces task, and how many of them are right."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from nlpfast.data import birthplaces as data
from nlpfast.data.birthplaces_files import Questions, read_documents, read_questions
from nlpfast.data.lines import DataError
from nlpfast.data.text import CharVocabulary
from nlpfast.decoding import generate
from nlpfast.files import replacing
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.parameter_file import read_parameters
from nlpfast.train.birthplaces_options import BLOCK_SIZE, SIZES, BirthplacesOptions, needed
from nlpfast.train.device import autocast, resolve_device

__all__ = ["Score", "build_model", "evaluate", "predict", "score"]

# characters that are written after a question, as in the assignment
ANSWER = 32
# questions that are answered together
TOGETHER = 250


@dataclasses.dataclass(frozen=True)
class Score:
    """How many of the questions were answered right.

    Attributes:
        total: questions.
        correct: of them, None where the answers are not known.
    """

    total: int
    correct: int | None


def build_model(options: BirthplacesOptions, variant: str, vocabulary: CharVocabulary) -> GPT:
    """Return the model with initial weights, or those of `reading_params_path`.

    Args:
        options: size, latents and parameters.
        variant: vanilla or perceiver.
        vocabulary: of the corpus.

    Raises:
        DataError: the parameters are of another variant, size or vocabulary; says which option to change.
    """
    config = GPTConfig(
        *(len(vocabulary), BLOCK_SIZE),
        **SIZES[options.config],
        perceiver=variant == "perceiver",
        bottleneck_dim=options.bottleneck_dim,
        residual=options.residual,
        embd_pdrop=options.dropout,
        attn_pdrop=options.dropout,
        resid_pdrop=options.dropout,
        ignore_index=data.PAD_ID,
    )
    model = GPT(config)
    if options.reading_params_path is not None:
        state, facts = read_parameters(options.reading_params_path)
        _load(model, state, facts, options.reading_params_path, vocabulary)
    return model


def _load(
    model: GPT, state: dict[str, Tensor], facts: dict[str, Any], path: str, vocabulary: CharVocabulary
) -> None:
    """Put parameters into the model, or say what they are of."""
    own = model.state_dict()
    # buffers of the assignment's attention, which ours has not
    state = {name: tensor for name, tensor in state.items() if name in own or not name.endswith(".mask")}
    ours, latents = "down_block.C" in own, "down_block.C"
    if (latents in state) != ours:
        other = "vanilla" if ours else "perceiver"
        raise DataError(f"{path}: has the parameters of the {other} variant; name that, or another file")
    if ours and state[latents].shape[1] != own[latents].shape[1]:
        m = state[latents].shape[1]
        raise DataError(f"{path}: has {m} latents, not {own[latents].shape[1]}; give --bottleneck_dim {m}")
    residual = facts.get("residual", model.config.residual)
    if residual != model.config.residual:
        fix = "give --residual" if residual else "leave out --residual"
        raise DataError(f"{path}: was trained {'with' if residual else 'without'} it; {fix}")
    if facts.get("vocabulary", vocabulary.chars) != vocabulary.chars:
        raise DataError(f"{path}: is of a corpus with other characters; name the corpus of its pretraining")
    for name in sorted(own.keys() ^ state.keys()):
        found = "lacks" if name in own else "has, unlike the model,"
        raise DataError(f"{path}: {found} {name}; give the --config that it was trained with")
    for name, tensor in own.items():
        if state[name].shape != tensor.shape:
            shapes = f"{list(state[name].shape)}, not {list(tensor.shape)}"
            fix = "name its corpus" if name in ("tok_emb.weight", "head.weight") else "give its --config"
            raise DataError(f"{path}: {name} has the shape {shapes}; {fix}")
    model.load_state_dict(state)


def predict(
    model: GPT, vocabulary: CharVocabulary, questions: list[str], *, prefix: bool = False
) -> list[str]:
    """Return the model's answers: what it writes after a question, up to the mark, in at most 32 characters.

    Args:
        model: on its device.
        vocabulary: of its corpus.
        questions: without MASK.
        prefix: questions are read in both directions, as in training.
    """
    device = next(model.parameters()).device
    answers = []
    for first in range(0, len(questions), TOGETHER):
        encoded = [
            vocabulary.encode(question + data.MASK) for question in questions[first : first + TOGETHER]
        ]
        lengths = torch.tensor([len(numbers) for numbers in encoded])
        idx = torch.zeros(len(encoded), int(lengths.max()), dtype=torch.int64)
        for row, numbers in zip(idx, encoded, strict=True):
            row[: len(numbers)] = numbers
        tokens = generate(
            model, idx.to(device), ANSWER, lengths=lengths.to(device), greedy=True, prefix=prefix
        ).cpu()
        for row, length in zip(tokens, lengths.tolist(), strict=True):
            written = vocabulary.decode(row[length : length + ANSWER])
            # a prediction is one line of a file
            answers.append(written.partition(data.MASK)[0].replace("\n", " "))
    return answers


def evaluate(variant: str, corpus: str, options: BirthplacesOptions) -> Score:
    """Answer questions, write the answers, one a line, and count those that are right.

    Args:
        variant: vanilla or perceiver.
        corpus: file with a document a line; it makes the vocabulary.
        options: files and model.

    Raises:
        ConfigError: an option that cannot be served.
        DataError: a file cannot be read, or does not fit.
        OSError: the predictions cannot be written.
    """
    needed(options, "evaluate", variant)
    device = resolve_device(options.device)
    _, vocabulary, _ = read_documents(corpus)
    asked = read_questions(str(options.eval_corpus_path), vocabulary)
    model = build_model(options, variant, vocabulary).to(device)
    with autocast(device, options.dtype):
        predictions = predict(model, vocabulary, asked.questions, prefix=options.prefix_lm)
    with replacing(str(options.outputs_path)) as file:
        file.write("".join(f"{line}\n" for line in predictions).encode())
    return score(asked, predictions)


def score(asked: Questions, predictions: list[str]) -> Score:
    """Count the predictions that are the answer, character by character.

    Args:
        asked: the questions, perhaps with answers.
        predictions: as many.
    """
    if asked.answers is None:
        return Score(len(predictions), None)
    pairs = zip(asked.answers, predictions, strict=True)
    return Score(len(predictions), sum(answer == found for answer, found in pairs))
