"""Two invented languages with known word alignments, for tests and demos that need no download.

A sentence of the target language is made of one of the source language by rules:

    source      [subject] [negation] [future] [verb [particle]] [object] [preposition noun phrase] [time]
    target      [time] [subject] [noun phrase in a case] [object] [negation] [verb] [negation]

    noun phrase     determiner, adjective, noun in the source; noun, adjective, numeral in the target.
    articles        of the source, "la" and "un", have no counterpart and no link.
    number          "-s" at the noun of the source; "-ki" at noun and adjective of the target.
    case            "-n" at the object's noun in the target. A preposition of the source is a case in the
                    target, so that two words are linked to one.
    tense           the past is "-d" at the verb of the source, "-ve" in the target. The future is the word
                    "wil" of the source, and "-jo" in the target: two words are linked to one.
    particle        a verb of two words, such as "give up", is one word in the target, and another one than
                    the verb alone.
    compounds       some nouns of the source are two words in the target; the second has the endings.
    negation        one word of the source, "nek", is two around the verb in the target, "ni" and "pa".

For example:

    la rofe nek wil kumta in un romfomi ul tefiwe malfes wirta
    jösö vinö šatčökilö näna jekšön ni vopäjo pa

There are no capitals and no signs, and a word is what is between two spaces. Stems are made of syllables,
each language with its own sounds. There are some 130, the same for every seed. The same seed gives the same
sentences on every platform and Python version.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from random import Random
from typing import NamedTuple, TypeVar

from nlpfast.data.alignments import Link

__all__ = ["InventedPairs", "invented_pairs"]

_Item = TypeVar("_Item")
# a word of the target, and the positions of the source words that it is linked to
_Word = tuple[str, tuple[int, ...]]
# A stem of the source and what it is in the target, words with spaces between them.
_Entries = tuple[tuple[str, str], ...]

_MOST_WORDS = 12
_LEXICON_SEED = 11
_SOURCE_SOUNDS = ("bdfgklmprtw", "aeiou", ("", "", "", "l", "r", "m"))
_TARGET_SOUNDS = ("čhjknprstvzš", "aeioäö", ("", "", "", "k", "t"))
_PARTICLES = ("up", "of", "in")
_ARTICLES = ("la", "un")
_PLURAL = ("s", "ki")
_PAST = ("d", "ve")
_FUTURE = ("wil", "jo")
_NEGATION = ("nek", ("ni", "pa"))
_OBJECT = "n"
_PREPOSITIONS = (("ir", "su"), ("os", "ta"), ("ul", "lö"))
# how often a noun phrase has one or the other article, or a numeral
_DEFINITE, _INDEFINITE, _NUMERAL = 0.4, 0.25, 0.15


class InventedPairs(NamedTuple):
    """Sentences of the source language, their translations, and the links between their words.

    Attributes:
        source: sentences, words with single spaces between them; no two are the same.
        target: the translation of each.
        links: for each the pairs (source word, target word) that belong together, from 0.
    """

    source: list[str]
    target: list[str]
    links: list[set[Link]]


def invented_pairs(count: int, seed: int = 0) -> InventedPairs:
    """Return `count` different sentences of 3 to 12 words with their translations and alignments.

    A translation depends on its sentence alone, not on the seed. The first pairs of more are those of fewer
    of the same seed, so that parts of one call make training and test data without a sentence in common.

    Args:
        count: how many.
        seed: chooses the sentences.
    """
    draws, known = Random(seed), set[str]()
    found = InventedPairs([], [], [])
    while len(found.source) < count:
        source, target = _sentence(draws)
        text = " ".join(source)
        if text in known or len(source) > _MOST_WORDS:
            continue
        known.add(text)
        found.source.append(text)
        found.target.append(" ".join(word for word, _ in target))
        found.links.append({(s, t) for t, (_, places) in enumerate(target) for s in places})
    return found


class _Lexicon(NamedTuple):
    nouns: _Entries
    adjectives: _Entries
    numerals: _Entries
    pronouns: _Entries
    times: _Entries
    # verbs without an object, with one, and those that have another meaning with a particle
    alone: _Entries
    verbs: _Entries
    pairs: _Entries


@cache
def _lexicon() -> _Lexicon:
    draws = Random(_LEXICON_SEED)
    known = {*_ARTICLES, *_PARTICLES, _FUTURE[0], _NEGATION[0], *_NEGATION[1]}
    known |= {word for word, _ in _PREPOSITIONS}

    def entries(count: int, words: int = 1) -> _Entries:
        return tuple(
            (
                _stem(draws, _SOURCE_SOUNDS, known),
                " ".join(_stem(draws, _TARGET_SOUNDS, known) for _ in range(words)),
            )
            for _ in range(count)
        )

    verbs = entries(24)
    with_particle = tuple(
        (f"{verb} {_pick(draws, _PARTICLES)}", _stem(draws, _TARGET_SOUNDS, known)) for verb, _ in verbs[:8]
    )
    return _Lexicon(
        nouns=entries(48) + entries(8, words=2),
        adjectives=entries(20),
        numerals=entries(4),
        pronouns=entries(5),
        times=entries(8),
        alone=entries(8),
        verbs=verbs,
        pairs=with_particle,
    )


def _stem(draws: Random, sounds: tuple[str, str, tuple[str, ...]], known: set[str]) -> str:
    """Return a word of two or three syllables that is not known yet, and ends in a vowel."""
    consonants, vowels, ends = sounds
    stem = ""
    while not stem or stem in known:
        syllables = 2 + (draws.random() < 0.25)
        parts = []
        for syllable in range(syllables):
            end = _pick(draws, ends) if syllable < syllables - 1 else ""
            parts.append(_pick(draws, consonants) + _pick(draws, vowels) + end)
        stem = "".join(parts)
    known.add(stem)
    return stem


def _sentence(draws: Random) -> tuple[list[str], list[_Word]]:
    """Return the words of a sentence and those of its translation."""
    lexicon, source = _lexicon(), list[str]()
    if draws.random() < 0.25:
        subject = _word(source, _pick(draws, lexicon.pronouns))
    else:
        subject = _noun_phrase(draws, source, "")
    transitive = draws.random() < 0.8
    verb = _verb(draws, source, transitive)
    patient = _noun_phrase(draws, source, _OBJECT) if transitive else []
    place = _phrase_in_a_case(draws, source) if draws.random() < 0.4 or not transitive else []
    time = _word(source, _pick(draws, lexicon.times)) if draws.random() < 0.3 else []
    return source, [*time, *subject, *place, *patient, *verb]


def _word(source: list[str], entry: tuple[str, str]) -> list[_Word]:
    """Add a word without endings to the source, and return its translation."""
    source.append(entry[0])
    return [(entry[1], (len(source) - 1,))]


def _verb(draws: Random, source: list[str], transitive: bool) -> list[_Word]:
    """Add a verb and what is around it to the source, and return their translation."""
    lexicon, around, places = _lexicon(), list[_Word](), list[int]()
    if draws.random() < 0.25:
        source.append(_NEGATION[0])
        around = [(word, (len(source) - 1,)) for word in _NEGATION[1]]
    tense = draws.random()
    if tense < 0.2:
        places.append(len(source))
        source.append(_FUTURE[0])
    entries = lexicon.alone
    if transitive:
        entries = lexicon.pairs if draws.random() < 0.3 else lexicon.verbs
    words, translation = _pick(draws, entries)
    stem, *particle = words.split()
    past = tense > 0.6
    places += range(len(source), len(source) + 1 + len(particle))
    source += [stem + _PAST[0] * past, *particle]
    ending = _FUTURE[1] if tense < 0.2 else _PAST[1] * past
    return [*around[:1], (translation + ending, tuple(places)), *around[1:]]


def _phrase_in_a_case(draws: Random, source: list[str]) -> list[_Word]:
    """Add a preposition and its noun phrase to the source, and return their translation."""
    preposition, case = _pick(draws, _PREPOSITIONS)
    source.append(preposition)
    return _noun_phrase(draws, source, case, (len(source) - 1,))


def _noun_phrase(
    draws: Random, source: list[str], case: str, preposition: tuple[int, ...] = ()
) -> list[_Word]:
    """Add a noun and what is before it to the source, and return their translation.

    Args:
        draws: chooses the words.
        source: gets them.
        case: the noun's ending in the target.
        preposition: its position, if there is one, for the noun's links.
    """
    lexicon, kind = _lexicon(), draws.random()
    after: list[_Word] = []
    plural = kind >= _DEFINITE + _INDEFINITE
    if kind < _DEFINITE:
        source.append(_ARTICLES[0])
        plural = draws.random() < 0.4
    elif kind < _DEFINITE + _INDEFINITE:
        source.append(_ARTICLES[1])
    elif kind < _DEFINITE + _INDEFINITE + _NUMERAL:
        after = _word(source, _pick(draws, lexicon.numerals))
    number = _PLURAL[1] * plural
    if draws.random() < 0.4:
        [(word, places)] = _word(source, _pick(draws, lexicon.adjectives))
        after = [(word + number, places), *after]
    stem, translation = _pick(draws, lexicon.nouns)
    places = (*preposition, len(source))
    source.append(stem + _PLURAL[0] * plural)
    *before, last = translation.split()
    return [*((word, places) for word in before), (last + number + case, places), *after]


def _pick(draws: Random, items: Sequence[_Item]) -> _Item:
    return items[int(draws.random() * len(items))]
