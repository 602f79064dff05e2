"""Numbers that say how good predictions are, computed in float64.

accuracy         how many are right
f1               how many are right of those said to be in a class, and of those that are
pearson          how far one list of numbers is a straight line of another
corpus_scores    how near translations are to references: BLEU, chrF, TER, all by sacreBLEU (the extra `nmt`)

Dimensions: N predictions, or sentences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sacrebleu.metrics.base import Metric

__all__ = ["BLEU_TOKENIZERS", "CORPUS_METRICS", "CorpusScore", "accuracy", "corpus_scores", "f1", "pearson"]

Numbers = Sequence[float] | Tensor

CORPUS_METRICS = ("bleu", "chrf", "chrf++", "ter")
# those of sacreBLEU that need no download and no package of a language
BLEU_TOKENIZERS = ("13a", "intl", "zh", "char", "none")


def accuracy(predictions: Numbers, labels: Numbers) -> float:
    """Return the share of predictions that equal their labels.

    Args:
        predictions: numbers of classes, [N] of any dtype.
        labels: the same.

    Raises:
        ValueError: the lengths differ or are 0, or a number is not whole.
    """
    predicted, right = _classes(predictions, labels)
    return float((predicted == right).double().mean())


def f1(predictions: Numbers, labels: Numbers, *, average: Literal["macro", "binary"] = "macro") -> float:
    """Return the harmonic mean of precision and recall, 0 where both are.

    Args:
        predictions: numbers of classes, [N] of any dtype.
        labels: the same.
        average: "macro" for the mean over all classes that are predicted or right; "binary" for class 1
            alone, of the classes 0 and 1.

    Raises:
        ValueError: the lengths differ or are 0, a number is not whole, `average` is another, or a class is
            neither 0 nor 1 with "binary".
    """
    predicted, right = _classes(predictions, labels)
    found: list[float] = torch.cat((predicted, right)).unique().tolist()
    if average == "binary":
        if not set(found) <= {0, 1}:
            raise ValueError(f"classes {found[:8]} must be 0 and 1 with average='binary'; pass 'macro'")
        found = [1]
    elif average != "macro":
        raise ValueError(f"average={average!r} must be 'macro' or 'binary'; pass one of them")
    scores = []
    for number in found:
        said, true = predicted == number, right == number
        total = int(said.sum() + true.sum())
        scores.append(2 * int((said & true).sum()) / total if total else 0.0)
    return sum(scores) / len(scores)


def pearson(x: Numbers, y: Numbers) -> float:
    """Return Pearson's correlation, from -1 to 1.

    A number that is added to all, or a factor, makes no difference, even if it is large.

    Args:
        x: [N] of any dtype.
        y: the same.

    Returns:
        The correlation; nan where x or y is constant, or has a number that is not finite.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    x, y = _pair(x, y, ("x", "y"))
    a, b = _centred(x), _centred(y)
    correlation = float((a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt())
    # rounding may lead beyond; nan stays nan
    return correlation if math.isnan(correlation) else max(-1.0, min(1.0, correlation))


def _centred(values: Tensor) -> Tensor:
    """Return numbers with the mean 0, of which the largest are about 1; nan if all are equal."""
    # equal numbers differ by exactly 0, which their mean, being rounded, does not; and halves do not overflow
    differences = values / 2 - values[0] / 2
    differences = differences / differences.abs().max()
    return differences - differences.mean()


def _classes(predictions: Numbers, labels: Numbers) -> tuple[Tensor, Tensor]:
    """Return predictions and labels as numbers of classes."""
    pair = _pair(predictions, labels, ("predictions", "labels"))
    for name, values in zip(("predictions", "labels"), pair, strict=True):
        wrong = values[values != values.round()]
        if wrong.numel():
            rule = "must be whole numbers, those of classes; round scores first"
            raise ValueError(f"{name} with {wrong[0].item()} {rule}")
    return pair


def _pair(first: Numbers, second: Numbers, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    """Return two lists of numbers as float64, [N] each."""
    found = []
    for name, values in zip(names, (first, second), strict=True):
        if isinstance(values, Tensor):
            # where the tensor is there may be no float64
            values = values.detach().cpu()
        tensor = torch.as_tensor(values, dtype=torch.float64)
        if tensor.dim() != 1 or not len(tensor):
            raise ValueError(f"{name} of shape {list(tensor.shape)} must be [N], N at least 1; flatten it")
        found.append(tensor)
    if len(found[0]) != len(found[1]):
        lengths = f"{len(found[0])} and {len(found[1])} numbers"
        raise ValueError(f"{names[0]} and {names[1]} have {lengths}; they must have as many, one for each")
    return found[0], found[1]


class CorpusScore(NamedTuple):
    """A score of a whole text.

    Attributes:
        name: BLEU, chrF2, chrF2++ or TER.
        score: in percent, without rounding. More is better, for TER less; TER may be above 100.
        signature: sacreBLEU's: the settings and its version, to be given with the score.
    """

    name: str
    score: float
    signature: str


def corpus_scores(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    metrics: Sequence[str] = ("bleu", "chrf", "ter"),
    *,
    lowercase: bool = False,
    tokenize: str = "13a",
) -> list[CorpusScore]:
    """Compare translations with references, by sacreBLEU and with its settings.

    BLEU (Papineni et al. 2002) counts n-grams of words, chrF (Popovic 2015, 2017) those of characters, TER
    (Snover et al. 2006) edits of words. Only scores with the same signature can be compared, and only of text
    as people read it, not in subwords and not tokenised (Post 2018).

    Args:
        hypotheses: N translations; an empty one is scored too.
        references: one sequence or several, each of N correct translations.
        metrics: some of "bleu", "chrf", "chrf++" (words as well) and "ter".
        lowercase: compare without case. TER always does, as sacreBLEU has it by default.
        tokenize: how BLEU makes words, one of `BLEU_TOKENIZERS`; "13a" for languages with spaces, "zh" for
            Chinese, "char" for others without, "none" for text with a space between any two words already.

    Returns:
        The score of each metric, in the order of `metrics`.

    Raises:
        ValueError: there are no sentences or no references, their numbers differ, or a word is not known.
        RuntimeError: sacreBLEU is not installed; the message says how to install it.
    """
    _check_texts(hypotheses, references)
    for name in metrics:
        if name not in CORPUS_METRICS:
            raise ValueError(f"metrics with {name!r} must be some of {', '.join(CORPUS_METRICS)}; change it")
    if tokenize not in BLEU_TOKENIZERS:
        raise ValueError(f"tokenize={tokenize!r} must be one of {', '.join(BLEU_TOKENIZERS)}; change it")
    scores = []
    for name in metrics:
        metric = _metric(name, lowercase, tokenize)
        score = metric.corpus_score(hypotheses, references)
        scores.append(CorpusScore(score.name, score.score, metric.get_signature().format()))
    return scores


def _check_texts(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    # a string is a sequence of strings as well
    if isinstance(hypotheses, str):
        raise ValueError("hypotheses is a string and must be a list of sentences; put it into one")
    if any(isinstance(reference, str) for reference in references):
        raise ValueError("references has sentences and must have lists of them; put your list into another")
    if not hypotheses or not references:
        raise ValueError("hypotheses and references must have at least one sentence; check what is compared")
    for number, reference in enumerate(references):
        if len(reference) != len(hypotheses):
            lengths = f"{len(hypotheses)} and {len(reference)} sentences"
            rule = "they must have as many, the i-th of one a translation like the i-th of the other"
            raise ValueError(f"hypotheses and references[{number}] have {lengths}; {rule}")


def _metric(name: str, lowercase: bool, tokenize: str) -> Metric:
    library = _sacrebleu()
    if name == "bleu":
        # without force it prints what it thinks of tokenised text
        return library.BLEU(lowercase=lowercase, tokenize=tokenize, force=True)
    if name == "ter":
        return library.TER()
    return library.CHRF(lowercase=lowercase, word_order=2 if name == "chrf++" else 0)


def _sacrebleu() -> ModuleType:
    try:
        import sacrebleu
    except ImportError as error:
        raise RuntimeError(
            f"BLEU, chrF and TER need sacrebleu ({error}): pip install 'nlpfast[nmt]'"
        ) from error
    return sacrebleu
