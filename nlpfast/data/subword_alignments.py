"""Word alignments of a parallel text as pairs of its tokens, which supervise attention.

Shapes: n sentence pairs, P links of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nlpfast.data.alignments import Alignments
from nlpfast.data.lines import unequal_lengths
from nlpfast.data.parallel import AlignmentPairs, AlignmentReport, Skipped
from nlpfast.data.token_pairs import TokenLists, TokenPairs, places_of

__all__ = ["subword_alignments"]


class _Words(NamedTuple):
    """The tokens of each word of one side.

    Attributes:
        counts: int64 [n], words of each sentence.
        first: int64 [n], the number of each sentence's first word among all words.
        sizes: int64 [words], tokens of each word.
        starts: int64 [words], where a word's tokens begin in `tokens`.
        tokens: int64 [tokens], places of tokens in their sentences, word after word.
    """

    counts: NDArray[np.int64]
    first: NDArray[np.int64]
    sizes: NDArray[np.int64]
    starts: NDArray[np.int64]
    tokens: NDArray[np.int64]


def subword_alignments(
    alignments: Alignments,
    pairs: TokenPairs,
    words: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]] | None = None,
) -> AlignmentPairs:
    """Return the alignments of the pairs, as links between tokens.

    A link between words becomes a link between each token of one and each token of the other. A sentence
    gives no pairs at all if a link of it is out of range, or if its words are others for the vocabulary than
    for the aligner, to which words are what spaces and tabs separate. It stays in the corpus.

    Args:
        alignments: a line for each line of the text's files, those of pairs that are not used among them.
        pairs: the sentences.
        words: the word of each token, from 0, of source and target: ``word_numbers`` of the vocabulary on
            each of ``pairs.source.lists()`` and ``pairs.target.lists()``. None if links are between tokens.

    Returns:
        For sentence i of `pairs` the links that supervise. Its report counts all lines of the alignments,
        and has the lines of pairs that are not used after all others that were skipped.

    Raises:
        DataError: another number of alignments than of lines in the text.
        ValueError: `words` has another form than the tokens.
    """
    text, lines = pairs.text, pairs.lines()
    if len(alignments) != text.report.read:
        raise unequal_lengths([(alignments.path, len(alignments)), (text.path, text.report.read)])
    starts, counts = alignments.ends[:-1][lines - 1], np.diff(alignments.ends)[lines - 1]
    links = _links(alignments, starts, counts)
    skipped: list[Skipped] = []
    if words is not None:
        links, skipped = _between_tokens(links, pairs, words)
    checked = _checked(links, pairs.source.lengths(), pairs.target.lengths())
    bad = [
        Skipped(int(lines[number - 1]), why) for number, why in sorted((*skipped, *checked.report.skipped))
    ]
    unused = np.setdiff1d(np.arange(len(alignments)) + 1, lines)
    bad += [Skipped(line, "its pair of sentences is not used") for line in unused.tolist()]
    empty = int((counts == 0).sum())
    checked.report = AlignmentReport(alignments.path, len(alignments), empty, tuple(bad))
    return checked


def _links(alignments: Alignments, starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Alignments:
    """Return alignments of which each sentence has some links of another one's."""
    places = places_of(starts, counts)
    ends = np.append(0, counts.cumsum())
    return Alignments(alignments.path, alignments.pairs[places], alignments.sure[places], ends)


def _checked(links: Alignments, source: NDArray[np.int64], target: NDArray[np.int64]) -> AlignmentPairs:
    """Return links of which those in sentences of these lengths, without EOS, are in range."""
    return AlignmentPairs(links, (source + 1).tolist(), (target + 1).tolist())


def _between_tokens(
    links: Alignments, pairs: TokenPairs, numbers: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]
) -> tuple[Alignments, list[Skipped]]:
    """Return the links between tokens for links between words, and the sentences that lost theirs."""
    source = _words("source", pairs.source, numbers[0])
    target = _words("target", pairs.target, numbers[1])
    skipped: list[Skipped] = []
    counts = np.diff(links.ends)
    sides = (("source", source, pairs.text.source), ("target", target, pairs.text.target))
    for name, words, sentences in sides:
        seen = np.array([_count_words(sentences[row]) for row in pairs.rows.tolist()])
        for other in np.flatnonzero((seen != words.counts) & (counts > 0)).tolist():
            reason = f"{name} has {seen[other]} words in the text, {words.counts[other]} in the vocabulary"
            skipped.append(Skipped(other + 1, reason))
            counts[other] = 0
    checked = _checked(_links(links, links.ends[:-1], counts), source.counts, target.counts)
    skipped += [
        Skipped(number, why.replace(" tokens and EOS", " words")) for number, why in checked.report.skipped
    ]
    return _products(links.path, checked.batch(range(len(pairs))).numpy(), source, target), skipped


def _count_words(sentence: str) -> int:
    """Return the number of words as aligners count them, see `nlpfast.data.parallel.read_parallel`."""
    return sum(map(bool, sentence.replace("\t", " ").split(" ")))


def _words(name: str, tokens: TokenLists, numbers: Sequence[Sequence[int]]) -> _Words:
    """Return the words of one side; names it if their numbers have another form than its tokens."""
    given, lengths = TokenLists.of(numbers), tokens.lengths()
    if not np.array_equal(given.lengths(), lengths):
        raise ValueError(f"words of the {name} have another form than its tokens; number the word of each")
    counts = np.maximum.reduceat(given.flat, given.ends[:-1]).astype(np.int64) + 1
    first = counts.cumsum() - counts
    word = given.flat + np.repeat(first, lengths)
    sizes = np.bincount(word, minlength=int(counts.sum()))
    place = places_of(np.zeros(len(lengths), dtype=np.int64), lengths)
    return _Words(counts, first, sizes, sizes.cumsum() - sizes, place[np.argsort(word, kind="stable")])


def _products(path: str, links: NDArray[np.int64], source: _Words, target: _Words) -> Alignments:
    """Return all pairs of tokens of linked words.

    Args:
        path: of the alignments.
        links: int64 [P, 3]: sentence, target word, source word, sentence after sentence.
        source: words of the sources.
        target: words of the targets.
    """
    sentence = links[:, 0]
    s, t = source.first[sentence] + links[:, 2], target.first[sentence] + links[:, 1]
    many = target.sizes[t]
    products = source.sizes[s] * many
    # number i of a link's products is its source token i // many with its target token i % many
    number = places_of(np.zeros_like(products), products)
    quotient, rest = np.divmod(number, np.repeat(many, products))
    pairs = np.stack(
        (
            source.tokens[np.repeat(source.starts[s], products) + quotient],
            target.tokens[np.repeat(target.starts[t], products) + rest],
        ),
        axis=1,
    )
    counts = np.bincount(np.repeat(sentence, products), minlength=len(source.counts))
    ends = np.append(0, counts.cumsum())
    return Alignments(path, pairs.astype(np.int32), np.ones(len(pairs), dtype=np.bool_), ends)
