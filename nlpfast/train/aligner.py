"""Word alignments of parallel text, by the statistical aligners of SIL's Thot (the extra `align`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from nlpfast.alignment import symmetrize
from nlpfast.data.alignments import Link

__all__ = ["MODELS", "Alignment", "align_words"]

MODELS = ("eflomal", "fast_align")

# passes over the text; fast_align's own default
_FAST_ALIGN_PASSES = 5


class Alignment(NamedTuple):
    """What aligning a text gave.

    Attributes:
        links: the links of each sentence.
        empty: numbers, from 1, of the sentences of which a side has no words; they have no links.
        too_long: numbers, from 1, of the sentences that are longer than the aligner takes; they have none.
    """

    links: list[set[Link]]
    empty: list[int]
    too_long: list[int]


def align_words(
    source: Sequence[Sequence[str]],
    target: Sequence[Sequence[str]],
    *,
    model: str = "eflomal",
    method: str = "grow-diag-final-and",
) -> Alignment:
    """Train an aligner on parallel text, in both directions, and return the alignment of that text.

    eflomal (Östling and Tiedemann 2016) has the lower error; fast_align (Dyer, Chahuneau and Smith 2013)
    takes less time. Both are Thot's, and give the same result for the same text each time. They learn from
    nothing but the text: some thousand sentences are few. Words in different case are different words.

    Args:
        source: the words or subwords of each sentence.
        target: the same of its translation.
        model: one of `MODELS`.
        method: how the two directions become one; see `nlpfast.alignment.symmetrize`.

    Returns:
        The links, and which sentences have none because they could not be aligned.

    Raises:
        ValueError: no such model or method, or the sides differ in length.
        RuntimeError: Thot is not installed; the message says how to install it.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r} is unknown; give one of {', '.join(MODELS)}")
    if len(source) != len(target):
        raise ValueError(f"source has {len(source)} sentences, target {len(target)}; give as many of each")
    symmetrize(set(), set(), method)
    try:
        from thot import alignment as thot
    except ImportError as error:
        raise RuntimeError(
            f"aligning words needs sil-thot ({error}), built for x86-64 Linux, macOS and Windows: "
            "pip install 'nlpfast[align]', or run another aligner that writes Pharaoh format"
        ) from error
    longest = int(thot.FastAlignModel().max_sentence_length)
    empty, too_long, usable = [], [], []
    for index, (s, t) in enumerate(zip(source, target, strict=True)):
        if not s or not t:
            empty.append(index + 1)
        elif max(len(s), len(t)) > longest:
            too_long.append(index + 1)
        else:
            usable.append(index)
    links: list[set[Link]] = [set() for _ in source]
    if usable:
        sources, targets = [list(source[i]) for i in usable], [list(target[i]) for i in usable]
        forward = _direction(thot, model, sources, targets)
        backward = _direction(thot, model, targets, sources)
        for index, there, back in zip(usable, forward, backward, strict=True):
            links[index] = symmetrize(there, {(s, t) for t, s in back}, method)
    return Alignment(links, empty, too_long)


def _direction(thot: Any, model: str, sources: list[list[str]], targets: list[list[str]]) -> list[set[Link]]:
    """Return links of which each target word has at most one."""
    if model == "eflomal":
        aligner = thot.EflomalAlignmentModel()
        aligner.deterministic = True
    else:
        aligner = thot.FastAlignModel()
    for source, target in zip(sources, targets, strict=True):
        aligner.add_sentence_pair(source, target)
    aligner.start_training()
    # eflomal knows how often only after it has seen the text
    for _ in range(aligner.scheduled_iterations if model == "eflomal" else _FAST_ALIGN_PASSES):
        aligner.train()
    aligner.end_training()
    best = aligner.get_best_alignments(sources, targets)
    # for each target word the number of its source word, from 1, or 0
    return [{(s - 1, t) for t, s in enumerate(matrix.to_list()) if s} for _, matrix in best]
