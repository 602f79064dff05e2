"""The log-probabilities of a corpus under a language model that stays as it is: computed once, and kept.

A file of scores is `<key>.scores` in the cache's folder, float64 in NumPy's format; its key is a digest of
the weights, the tokens and the special tokens. Removing it is safe at any time.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nlpfast.data.sentence_batches import make_sentence_batch
from nlpfast.data.token_cache import default_folder
from nlpfast.data.token_pairs import TokenLists
from nlpfast.files import replacing
from nlpfast.models.gpt import GPT
from nlpfast.models.rnnlm import RNNLM
from nlpfast.models.sequence_log_probabilities import sentence_log_probabilities
from nlpfast.train.device import to_device
from nlpfast.train.objective import evaluation_mode

__all__ = ["language_model_scores", "scores_key"]

# tokens of a batch
BATCH_TOKENS = 8192

_logger = logging.getLogger("nlpfast")


def scores_key(model: GPT | RNNLM, sentences: TokenLists, special: tuple[int, ...]) -> str:
    """Return the name of the scores of a corpus: another one wherever they may be others.

    Args:
        model: the language model.
        sentences: tokens of the corpus.
        special: PAD, BOS and EOS.
    """
    digest = hashlib.sha256(repr((type(model).__name__, model.config.to_dict(), special)).encode())
    for name, weight in model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(_bytes(weight))
    for part in (sentences.flat, sentences.ends):
        digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()


def language_model_scores(
    model: GPT | RNNLM,
    sentences: TokenLists,
    *,
    pad_id: int,
    bos_id: int,
    eos_id: int,
    folder: Path | None = None,
) -> NDArray[np.float64]:
    """Return log p of each sentence, with EOS, in nats; float64 [number of sentences].

    They are read from the cache where it has them, and written to it otherwise; where it cannot be written, a
    line in the log says so.

    Args:
        model: the language model, on its device; its mode is as before afterwards.
        sentences: tokens without special ones.
        pad_id: token that fills up.
        bos_id: token before the first.
        eos_id: token after the last.
        folder: the cache's; None for the default one.

    Raises:
        ValueError: a sentence is too long for the model, or a token is not in its vocabulary.
    """
    special = (pad_id, bos_id, eos_id)
    path = (folder or default_folder()) / f"{scores_key(model, sentences, special)}.scores"
    kept = _read(path, len(sentences))
    if kept is not None:
        return kept
    scores = _computed(model, sentences, special)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            np.save(file, scores)
    except OSError as error:
        _logger.warning(
            "%s: scores are not kept (%s); set XDG_CACHE_HOME to a folder that can be", path, error
        )
    return scores


def _computed(model: GPT | RNNLM, sentences: TokenLists, special: tuple[int, ...]) -> NDArray[np.float64]:
    device = next(model.parameters()).device
    names = dict(zip(("pad_id", "bos_id", "eos_id"), special, strict=True))
    lengths = sentences.lengths() + 1
    order = np.argsort(lengths, kind="stable")
    # similar lengths together, at least one sentence in each batch
    batch_of = lengths[order].cumsum() // max(BATCH_TOKENS, int(lengths.max(initial=1)))
    scores = np.empty(len(sentences))
    with evaluation_mode(model):
        for rows in np.split(order, np.flatnonzero(np.diff(batch_of)) + 1):
            if len(rows):
                batch = to_device(make_sentence_batch(sentences.take(rows).lists(), **names), device)
                scores[rows] = sentence_log_probabilities(model, batch).double().cpu().numpy()
    return scores


def _read(path: Path, count: int) -> NDArray[np.float64] | None:
    """Return the scores in a file; None if there is none that can be used."""
    try:
        found = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        _logger.warning("%s: cannot be read (%s); the scores are computed again", path, error)
        return None
    return found if found.shape == (count,) and found.dtype == np.float64 else None


def _bytes(weight: Tensor) -> bytes:
    return weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
