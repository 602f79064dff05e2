"""How good single translations are, from 0 to 1: what reinforcement learning and minimum risk training raise.

sentence_bleu    n-grams of words, smoothed, with the brevity penalty
gleu             n-grams of words, the worse of precision and recall
chrf             n-grams of characters

An empty translation gets 0, and one without a word of the reference 0 from the first two. `nlpfast.metrics`
has the scores of whole texts, which are the ones to report.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

__all__ = ["REWARDS", "chrf", "gleu", "sentence_bleu"]

# words of an n-gram, at most, and characters of one
WORDS, CHARACTERS = 4, 6
# how many times as much recall counts as precision in chrF
BETA = 2


class _Overlap(NamedTuple):
    """How many n-grams a translation and a reference have in common, and how many each has."""

    matches: int
    hypothesis: int
    reference: int


def sentence_bleu(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Return BLEU of one sentence, with one more match and one more n-gram for n = 2, 3, 4.

    Lin and Och 2004, "ORANGE: a Method for Evaluating Automatic Evaluation Metrics for Machine Translation";
    sacreBLEU has it as ``smooth_method="add-k"`` with 1. Without smoothing most sentences would have 0.

    Args:
        hypothesis: words of the translation.
        reference: words of a correct one.
    """
    logarithms = 0.0
    for n in range(1, WORDS + 1):
        found, more = _overlap(hypothesis, reference, n), int(n > 1)
        if not found.matches and n == 1:
            return 0.0
        logarithms += math.log((found.matches + more) / (found.hypothesis + more))
    brevity = min(0.0, 1 - len(reference) / len(hypothesis))
    return math.exp(brevity + logarithms / WORDS)


def gleu(hypothesis: Sequence[str], reference: Sequence[str]) -> float:
    """Return the lower of precision and recall of all n-grams of 1 to 4 words.

    Wu et al. 2016, "Google's Neural Machine Translation System", section 4.3: made for single sentences,
    where it follows BLEU of texts.

    Args:
        hypothesis: words of the translation.
        reference: words of a correct one.
    """
    found = [_overlap(hypothesis, reference, n) for n in range(1, WORDS + 1)]
    matches, mine, wanted = (sum(numbers) for numbers in zip(*found, strict=True))
    return matches / max(mine, wanted, 1)


def chrf(hypothesis: str, reference: str) -> float:
    """Return chrF: F of the mean precision and the mean recall of n-grams of 1 to 6 characters.

    Popovic 2015, "chrF: character n-gram F-score for automatic MT evaluation", with recall of weight 2.
    White space does not count, and neither do n that are longer than one of the texts, as in sacreBLEU.

    Args:
        hypothesis: the translation.
        reference: a correct one.
    """
    hypothesis, reference = ("".join(text.split()) for text in (hypothesis, reference))
    most = min(CHARACTERS, len(hypothesis), len(reference))
    found = [_overlap(hypothesis, reference, n) for n in range(1, most + 1)]
    precision = sum(overlap.matches / overlap.hypothesis for overlap in found)
    recall = sum(overlap.matches / overlap.reference for overlap in found)
    if not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (BETA**2 * precision + recall) / len(found)


def _overlap(hypothesis: Sequence[str], reference: Sequence[str], n: int) -> _Overlap:
    """Count n-grams of words, or of characters; one matches as often as the reference has it."""
    mine, wanted = (
        Counter(zip(*(side[begin:] for begin in range(n)), strict=False)) for side in (hypothesis, reference)
    )
    matches = sum(min(mine[gram], wanted[gram]) for gram in mine.keys() & wanted.keys())
    return _Overlap(matches, *(max(0, len(side) - n + 1) for side in (hypothesis, reference)))


# of detokenised texts, the hypothesis and the reference; words are what is between spaces
REWARDS: dict[str, Callable[[str, str], float]] = {
    "bleu": lambda hypothesis, reference: sentence_bleu(hypothesis.split(), reference.split()),
    "gleu": lambda hypothesis, reference: gleu(hypothesis.split(), reference.split()),
    "chrf": chrf,
}
