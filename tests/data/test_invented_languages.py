"""Invented languages: sentences follow the grammar, links tell which words belong together."""

import hashlib
import re
from collections import Counter

import pytest

from nlpfast.alignment import alignment_error_rate
from nlpfast.data import invented_languages
from nlpfast.data.invented_languages import invented_pairs

PREPOSITIONS = {"ir": "su", "os": "ta", "ul": "lö"}
WORDS = invented_languages._lexicon()
VERBS = dict((*WORDS.alone, *WORDS.verbs))
PARTICLE_VERBS = dict(WORDS.pairs)
NOUNS, ADJECTIVES = dict(WORDS.nouns), dict(WORDS.adjectives)
PLAIN = dict((*WORDS.numerals, *WORDS.pronouns, *WORDS.times))


@pytest.fixture(scope="module")
def pairs():
    return invented_pairs(3000, seed=3)


def noun_phrase(words, place, case):
    """Read a noun phrase from `place` on; return what is after it and its translation with source places."""
    numeral, adjective, plural, at = [], [], False, place
    if words[at] in ("la", "un"):
        at += 1
    elif words[at] in dict(WORDS.numerals):
        numeral, at = [(PLAIN[words[at]], {at})], at + 1
    if words[at] in ADJECTIVES:
        adjective, at = [(ADJECTIVES[words[at]], {at})], at + 1
    plural = words[at] not in NOUNS
    stem = words[at].removesuffix("s") if plural else words[at]
    assert plural == (words[at] == stem + "s")
    # what is before it tells the number too
    assert not (plural and words[place] == "un") and (plural or words[place] in ("la", "un"))
    links = {at, place - 1} if case in PREPOSITIONS.values() else {at}
    *first, last = NOUNS[stem].split()
    ending = "ki" if plural else ""
    noun = [*((word, links) for word in first), (last + ending + case, links)]
    return at + 1, [*noun, *((word + ending, where) for word, where in adjective), *numeral]


def translation(words):
    """Translate by the rules in the module's text, written once more: words with their source places."""
    at, before, after, links = 0, [], [], set()
    if words[0] in dict(WORDS.pronouns):
        subject, at = [(PLAIN[words[0]], {0})], 1
    else:
        at, subject = noun_phrase(words, 0, "")
    if words[at] == "nek":
        before, after, at = [("ni", {at})], [("pa", {at})], at + 1
    ending = ""
    if words[at] == "wil":
        ending, links, at = "jo", {at}, at + 1
    stem = words[at]
    if stem not in VERBS:
        assert stem.endswith("d") and not ending
        stem, ending = stem.removesuffix("d"), "ve"
    links, at = links | {at}, at + 1
    if at < len(words) and f"{stem} {words[at]}" in PARTICLE_VERBS:
        verb, links, at = PARTICLE_VERBS[f"{stem} {words[at]}"], links | {at}, at + 1
    else:
        verb = VERBS[stem]
    patient, place, time = [], [], []
    if stem not in dict(WORDS.alone):
        at, patient = noun_phrase(words, at, "n")
    if at < len(words) and words[at] in PREPOSITIONS:
        at, place = noun_phrase(words, at + 1, PREPOSITIONS[words[at]])
    if at < len(words):
        time, at = [(PLAIN[words[at]], {at})], at + 1
    assert at == len(words)
    return [*time, *subject, *place, *patient, *before, (verb + ending, links), *after]


def test_translations_and_links_follow_from_the_sentences(pairs):
    assert len(pairs.source) == len(pairs.target) == len(pairs.links) == 3000
    for source, target, links in zip(*pairs, strict=True):
        expected = translation(source.split(" "))
        assert target == " ".join(word for word, _ in expected), source
        assert links == {(s, t) for t, (_, places) in enumerate(expected) for s in places}, source


def test_every_rule_is_there(pairs):
    """Each in some sentences and not in most: a share of them, by how many words there are."""
    source = [f" {text} " for text in pairs.source]
    for pattern, least, most in (
        (" (la|un) ", 0.8, 0.95),
        (" nek ", 0.2, 0.3),
        (" wil ", 0.15, 0.25),
        (" (up|of|in) ", 0.15, 0.3),
        (" (ir|os|ul) ", 0.4, 0.6),
        (f" ({'|'.join(dict(WORDS.times))}) $", 0.2, 0.35),
        (f"^ ({'|'.join(dict(WORDS.pronouns))}) ", 0.2, 0.35),
        (f" ({'|'.join(dict(WORDS.numerals))}) ", 0.2, 0.4),
    ):
        share = sum(bool(re.search(pattern, text)) for text in source) / len(source)
        assert least < share < most, (pattern, share)


def test_links_are_of_every_kind(pairs):
    unlinked, degrees = Counter(), Counter()
    for source, target, links in zip(*pairs, strict=True):
        words = source.split()
        for place in set(range(len(words))) - {s for s, _ in links}:
            unlinked[words[place]] += 1
        # each word of the target has a link
        assert {t for _, t in links} == set(range(len(target.split())))
        degrees.update(("source", n) for n in Counter(s for s, _ in links).values())
        degrees.update(("target", n) for n in Counter(t for _, t in links).values())
    assert set(unlinked) == {"la", "un"}
    assert set(degrees) == {("source", 1), ("source", 2), ("target", 1), ("target", 2), ("target", 3)}


def test_word_order_differs(pairs):
    """Guesses from positions alone are mostly wrong."""
    along, straight = [], []
    for source, target in zip(pairs.source, pairs.target, strict=True):
        n, m = len(source.split()), len(target.split())
        along.append({(int((t + 0.5) * n / m), t) for t in range(m)})
        straight.append({(i, i) for i in range(min(n, m))})
    for guess in (along, straight):
        assert alignment_error_rate(guess, pairs.links).aer > 0.7


def test_sentences_are_short_and_plain(pairs):
    lengths = Counter(len(text.split()) for text in pairs.source)
    assert min(lengths) == 3 and max(lengths) == 12
    # a noun may be two words there
    assert max(len(text.split()) for text in pairs.target) <= 13
    for text in (*pairs.source, *pairs.target):
        assert re.fullmatch("[a-zčšžäö]+( [a-zčšžäö]+)*", text)


def test_no_two_forms_are_the_same():
    """A word of the source has one meaning without its neighbours, except for verbs with a particle."""
    source = Counter(("la", "un", "nek", "wil", "ir", "os", "ul", "up", "of", "in"))
    target = Counter(("ni", "pa"))
    for noun, word in NOUNS.items():
        source.update((noun, noun + "s"))
        *first, last = word.split()
        target.update((*first, *(last + a + b for a in ("", "ki") for b in ("", "n", "su", "ta", "lö"))))
    for adjective, word in ADJECTIVES.items():
        source.update((adjective,))
        target.update((word, word + "ki"))
    for verb in VERBS:
        source.update((verb, verb + "d"))
    for word in (*VERBS.values(), *PARTICLE_VERBS.values()):
        target.update((word, word + "ve", word + "jo"))
    for verb, word in PLAIN.items():
        source.update((verb,))
        target.update((word,))
    assert set(source.values()) == set(target.values()) == {1} and not set(source) & set(target)
    stems = sum(map(len, (NOUNS, ADJECTIVES, VERBS, PLAIN)))
    assert 120 <= stems <= 200 and len(PARTICLE_VERBS) == 8
    assert {verb.split()[0] for verb in PARTICLE_VERBS} < set(VERBS)


def test_all_words_are_met_in_few_sentences(pairs):
    """So that a model that was trained on some thousands knows those of all others."""
    words = {word for text in pairs.source for word in text.split()}
    later = invented_pairs(500, seed=9)
    unknown = [word for text in later.source for word in text.split() if word not in words]
    assert not unknown


def test_sentences_differ_and_depend_on_the_seed_alone():
    # so many that some would be the same
    many = invented_pairs(20_000)
    assert len(set(many.source)) == 20_000
    first = invented_pairs(60, seed=1)
    assert invented_pairs(60, seed=1) == first and invented_pairs(60) == invented_pairs(60, seed=0) != first
    assert all(part[:60] == whole for part, whole in zip(invented_pairs(99, seed=1), first, strict=True))
    assert invented_pairs(0) == ([], [], [])


def test_sentences_are_the_same_everywhere():
    found = invented_pairs(100, seed=5)
    text = repr([found.source, found.target, [sorted(links) for links in found.links]])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "579adad1e803cb43"


def test_an_example_by_hand():
    """The one in the module's text."""
    links = {
        *((1, 1), (2, 5), (2, 7), (3, 6), (4, 6), (5, 6), (7, 4)),
        *((8, 2), (9, 3), (10, 2), (11, 0)),
    }
    source = "la rofe nek wil kumta in un romfomi ul tefiwe malfes wirta"
    target = "jösö vinö šatčökilö näna jekšön ni vopäjo pa"
    assert (source, target, links) in list(zip(*invented_pairs(500), strict=True))
    assert source in str(invented_languages.__doc__) and target in str(invented_languages.__doc__)
