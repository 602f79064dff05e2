"""Word alignments: two directions made one, the error rate against a gold standard, words from subwords.

A link is a pair (source position, target position), both from 0; an alignment is a sentence's set of links.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence, Set
from typing import NamedTuple

from nlpfast.data.alignments import Link

__all__ = [
    "METHODS",
    "SCHEMES",
    "AlignmentScore",
    "alignment_error_rate",
    "symmetrize",
    "word_links",
    "words_of",
]

METHODS = ("intersection", "union", "grow-diag", "grow-diag-final", "grow-diag-final-and")
SCHEMES = ("sentencepiece", "bpe", "wordpiece")

# (target, source) steps, in the order in which Moses tries them
_NEIGHBOURS = ((-1, 0), (0, -1), (1, 0), (0, 1), (-1, -1), (-1, 1), (1, -1), (1, 1))


def symmetrize(forward: Set[Link], reverse: Set[Link], method: str = "grow-diag-final-and") -> set[Link]:
    """Combine the alignments that an aligner makes of a sentence in its two directions.

    - intersection: links of both.
    - union: links of either.
    - grow-diag: the intersection, to which links of the union are added that touch a link which is there,
      also at a corner, if they link a word that has no link yet. The links are visited by target, then
      source position; the neighbours of each in Moses' order, straight ones first; what was added is visited
      too, in the same sweep if it lies ahead; sweeps go on until one adds nothing.
    - grow-diag-final: then every link of `forward`, then of `reverse`, in the order of their positions (by
      source or by target first is the same here), if it links a word that has no link yet.
    - grow-diag-final-and: the same, if both its words have no link yet.

    The order matters, as an added link stops others. This is the order of Moses' `symal` and of the published
    pseudocode (Koehn, Och, Marcu 2003, "Statistical Phrase-Based Translation"; statmt.org/moses, "Align
    Words"), whose `e` is our target. Others differ: `atools` of fast_align visits the union by source
    position; NLTK and Lilt's alignment-scripts grow only to links of which both words have none.

    Args:
        forward: links of the source to target direction, in which a target word has at most one source word.
        reverse: links of the other direction, as (source, target) too.
        method: one of `METHODS`.

    Returns:
        The links of the combination.

    Raises:
        ValueError: no such method.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is unknown; give one of {', '.join(METHODS)}")
    if method == "union":
        return set(forward | reverse)
    links = set(forward & reverse)
    if method == "intersection":
        return links
    sources, targets = {s for s, _ in links}, {t for _, t in links}

    def add(link: Link) -> None:
        links.add(link)
        sources.add(link[0])
        targets.add(link[1])

    _grow(links, forward | reverse, lambda s, t: s not in sources or t not in targets, add)
    if method != "grow-diag":
        both = method == "grow-diag-final-and"
        for direction in (forward, reverse):
            for s, t in sorted(direction):
                free = (s not in sources) + (t not in targets)
                if free == 2 or (free and not both):
                    add((s, t))
    return links


def _by_target(link: Link) -> Link:
    return link[1], link[0]


def _grow(
    links: set[Link],
    union: Set[Link],
    wanted: Callable[[int, int], bool],
    add: Callable[[Link], None],
) -> None:
    """Add the neighbours of links until there are none to add; `add` puts a link into `links`."""
    grown = True
    while grown:
        grown = False
        # a sweep in order, in which links that are added ahead of the present one get their turn
        ahead = sorted(map(_by_target, links))
        while ahead:
            here = heapq.heappop(ahead)
            for dt, ds in _NEIGHBOURS:
                t, s = here[0] + dt, here[1] + ds
                if (s, t) in union and wanted(s, t):
                    add((s, t))
                    grown = True
                    if (t, s) > here:
                        heapq.heappush(ahead, (t, s))


class AlignmentScore(NamedTuple):
    """How well alignments agree with a gold standard, over all sentences together.

    Attributes:
        aer: alignment error rate, 0 to 1, lower is better; NaN without any link in hypothesis and gold.
        precision: part of the hypothesis' links that are possible; NaN without any.
        recall: part of the sure links that the hypothesis has; NaN without any.
        links: links of the hypothesis.
        sure: sure links of the gold standard.
        possible: sure and possible links of the gold standard.
    """

    aer: float
    precision: float
    recall: float
    links: int
    sure: int
    possible: int


def alignment_error_rate(
    hypothesis: Sequence[Set[Link]], sure: Sequence[Set[Link]], possible: Sequence[Set[Link]] | None = None
) -> AlignmentScore:
    """Return the alignment error rate, precision and recall of a corpus.

    With the links A of the hypothesis, S sure and P possible, where S is part of P, all counted over the
    corpus: ``aer = 1 - (|A & S| + |A & P|) / (|A| + |S|)``, ``precision = |A & P| / |A|``,
    ``recall = |A & S| / |S|`` (Och and Ney 2003, "A Systematic Comparison of Various Statistical Alignment
    Models").

    Args:
        hypothesis: the links of each sentence.
        sure: the sure links of each sentence.
        possible: the possible links of each sentence; sure links belong to them, named or not. None: no more
            than the sure ones.

    Returns:
        The three rates, as fractions, and the number of links.

    Raises:
        ValueError: the arguments have different numbers of sentences.
    """
    possible = sure if possible is None else possible
    if not len(hypothesis) == len(sure) == len(possible):
        counts = f"{len(hypothesis)}, {len(sure)} and {len(possible)}"
        raise ValueError(f"hypothesis, sure and possible have {counts} sentences, expected as many of each")
    links = in_sure = in_possible = all_sure = all_possible = 0
    for a, s, p in zip(hypothesis, sure, possible, strict=True):
        p = p | s
        links, all_sure, all_possible = links + len(a), all_sure + len(s), all_possible + len(p)
        in_sure, in_possible = in_sure + len(a & s), in_possible + len(a & p)
    return AlignmentScore(
        aer=1 - _ratio(in_sure + in_possible, links + all_sure),
        precision=_ratio(in_possible, links),
        recall=_ratio(in_sure, all_sure),
        links=links,
        sure=all_sure,
        possible=all_possible,
    )


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def words_of(tokens: Sequence[str], scheme: str) -> list[int]:
    """Return for each subword the number of the word that it is a part of, from 0.

    Args:
        tokens: the subwords of a sentence, without special tokens such as EOS.
        scheme: "sentencepiece", where "▁" begins a word; "bpe", where "@@" at the end means that the word
            goes on; "wordpiece", where "##" at the beginning goes on with the word before.

    Raises:
        ValueError: no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown; give one of {', '.join(SCHEMES)}")
    words: list[int] = []
    word = -1
    for index, token in enumerate(tokens):
        if scheme == "sentencepiece":
            begins = token.startswith("▁")
        elif scheme == "bpe":
            begins = not tokens[index - 1].endswith("@@")
        else:
            begins = not token.startswith("##")
        # the first subword begins a word, whatever it looks like
        word += begins or index == 0
        words.append(word)
    return words


def word_links(
    links: Iterable[Link], source_tokens: Sequence[str], target_tokens: Sequence[str], scheme: str
) -> set[Link]:
    """Return the links between words, given those between their subwords.

    Two words are linked if any subword of one is linked to any subword of the other.

    Args:
        links: pairs of positions in `source_tokens` and `target_tokens`.
        source_tokens: the subwords of the source sentence, without special tokens.
        target_tokens: the subwords of the target sentence, without special tokens.
        scheme: how the subwords are marked; see `words_of`.

    Raises:
        ValueError: no such scheme, or a link to no subword.
    """
    sources, targets = words_of(source_tokens, scheme), words_of(target_tokens, scheme)
    found = set()
    for s, t in links:
        if not (0 <= s < len(sources) and 0 <= t < len(targets)):
            there = f"{len(sources)} source and {len(targets)} target subwords"
            raise ValueError(f"link {s}-{t} is outside the {there}; give the tokens that it was made for")
        found.add((sources[s], targets[t]))
    return found
