"""Invented data of the three sentence tasks, for tests and demos that need no download.

    sentiment    opinions on films. Adjectives are graded, "very" and "slightly" make them more and less, and
                 "not" turns them round. After "but" an opinion counts twice. So adjectives alone do not tell
                 the class.
    paraphrases  two sentences with facts of invented people (nlpfast.data.biographies), in different
                 wordings. Where the facts differ, it is in one.
    similarity   the same, with any facts: 5 times the share of facts that both sentences have.

The same seed gives the same data on every platform and Python version.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TypeVar

from nlpfast.data.biographies import Person, people
from nlpfast.data.sentence_files import HIGHEST_SCORE, PARAPHRASE, SIMILARITY, SST, Example, SentenceTask
from nlpfast.files import replacing

__all__ = ["invented_paraphrases", "invented_sentiment", "invented_similarity", "write_invented"]

_Item = TypeVar("_Item")
_Facts = dict[str, str]
# sentences and their label
_Found = list[tuple[tuple[str, ...], float]]

_SUBJECTS = (
    *("the acting", "the camera work", "the cast", "the dialogue", "the ending", "the film", "the humour"),
    *("the music", "the opening", "the pacing", "the plot", "the story", "this sequel", "this thriller"),
)
_ADJECTIVES = {
    2: ("brilliant", "magnificent", "superb", "thrilling", "unforgettable", "wonderful"),
    1: ("charming", "enjoyable", "good", "pleasant", "likeable", "solid"),
    0: ("average", "conventional", "ordinary", "predictable", "simple", "standard"),
    -1: ("bland", "clumsy", "dull", "slow", "tiresome", "weak"),
    -2: ("awful", "dreadful", "horrible", "terrible", "unbearable", "worthless"),
}
# how many times an adjective's grade counts
_DEGREES = (("", 2), ("very ", 3), ("truly ", 3), ("slightly ", 1), ("somewhat ", 1), ("not ", -1))
_CLAUSES = ("{subject} is {opinion}", "{subject} seems {opinion}", "I found {subject} {opinion}")
_OPENINGS = ("", "", "", "overall, ", "to be honest, ", "in the end, ")
# An opinion is -6 to 6, a sentence 6 times that: neutral below the first limit, strong from the second on.
_LIMITS = (6, 18)

# kinds of facts beside the name: sentences that state them
_WORDINGS = {
    ("place",): (
        "{name} was born in {place}.",
        "{name} comes from {place}.",
        "{place} is the birthplace of {name}.",
    ),
    ("year",): (
        "{name} was born in {year}.",
        "{name} came into the world in {year}.",
        "{year} is the year of birth of {name}.",
    ),
    ("job",): (
        "{name} was {a_job}.",
        "{name} worked as {a_job}.",
        "The profession of {name} was that of {a_job}.",
    ),
    ("place", "year"): (
        "{name} was born in {place} in {year}.",
        "In {year} {name} was born in {place}.",
        "{name} came from {place} and was born in {year}.",
    ),
    ("place", "job"): (
        "{name} was {a_job} from {place}.",
        "{name}, born in {place}, worked as {a_job}.",
        "{place} is where {name}, {a_job}, was born.",
    ),
    ("year", "job"): (
        "{name}, {a_job}, was born in {year}.",
        "Born in {year}, {name} became {a_job}.",
        "{name} (born {year}) worked as {a_job}.",
    ),
    ("place", "year", "job"): (
        "{name} was {a_job} born in {place} in {year}.",
        "Born in {place} in {year}, {name} worked as {a_job}.",
        "In {year} {name}, later {a_job}, was born in {place}.",
    ),
}
_KINDS = tuple(_WORDINGS)


def invented_sentiment(n: int, seed: int = 0) -> list[Example]:
    """Return `n` different opinions on films, with the classes 0, very bad, to 4, very good.

    Classes are about equally frequent.

    Args:
        n: how many.
        seed: chooses them.
    """
    draws, found, known = Random(seed), _Found(), set[str]()
    while len(found) < n:
        wanted = int(draws.random() * 5)
        text, label = _opinion(draws)
        while label != wanted or text in known:
            text, label = _opinion(draws)
        known.add(text)
        found.append(((text,), label))
    return _examples("sst", found)


def invented_paraphrases(n: int, seed: int = 0) -> list[Example]:
    """Return `n` different pairs of sentences, with 1 if both state the same facts.

    About half of them do. The others differ in one fact, or in the person.

    Args:
        n: how many, up to 100,000.
        seed: chooses them.
    """
    draws, found, known = Random(seed), _Found(), set[tuple[str, ...]]()
    crowd = _crowd(n, seed)
    same = draws.random() < 0.5
    while len(found) < n:
        first, other = _pick(draws, crowd), _pick(draws, crowd)
        kinds = _pick(draws, _KINDS)
        changed = _pick(draws, ("name", *kinds))
        second = first if same else {**first, changed: other[changed]}
        pair = _sentence(draws, first, kinds), _sentence(draws, second, kinds)
        # by chance the same wording, or the same fact of another person
        if pair[0] == pair[1] or pair in known or (not same and second == first):
            continue
        known.add(pair)
        found.append((pair, int(same)))
        same = draws.random() < 0.5
    return _examples("para", found)


def invented_similarity(n: int, seed: int = 0) -> list[Example]:
    """Return `n` different pairs of sentences, with 5 times the share of facts that both state.

    The share is that of all facts which at least one of them states, names among them: 5 for the same facts,
    0 for others altogether. Scores are rounded to one place after the point.

    Args:
        n: how many, up to 100,000.
        seed: chooses them.
    """
    draws, found, known = Random(seed), _Found(), set[tuple[str, ...]]()
    crowd = _crowd(n, seed)
    while len(found) < n:
        first, other = _pick(draws, crowd), _pick(draws, crowd)
        kinds = _pick(draws, _KINDS)
        others = kinds if draws.random() < 0.5 else _pick(draws, _KINDS)
        change = _pick(draws, (0.0, 0.2, 0.4, 0.7, 1.0))
        second = {kind: (other if draws.random() < change else first)[kind] for kind in first}
        pair = _sentence(draws, first, kinds), _sentence(draws, second, others)
        if pair[0] == pair[1] or pair in known:
            continue
        known.add(pair)
        stated = [
            {(kind, facts[kind]) for kind in ("name", *named)}
            for facts, named in ((first, kinds), (second, others))
        ]
        share = len(stated[0] & stated[1]) / len(stated[0] | stated[1])
        found.append((pair, round(HIGHEST_SCORE * share, 1)))
    return _examples("sts", found)


def write_invented(
    folder: str | Path, seed: int = 0, sizes: tuple[int, int, int] = (2000, 500, 500)
) -> dict[str, Path]:
    """Write files of all three tasks in the course's form.

    Args:
        folder: made if it is not there; files in it are replaced.
        seed: chooses the examples.
        sizes: examples to train on, to tune on, and to be tested on; no two are the same.

    Returns:
        The files by name: "sst-train", "sst-dev", "sst-test", "para-train", ..., "sts-test". Those to be
        tested on have no labels.

    Raises:
        OSError: a file cannot be written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    paths = {}
    for key, task, invent in (
        ("sst", SST, invented_sentiment),
        ("para", PARAPHRASE, invented_paraphrases),
        ("sts", SIMILARITY, invented_similarity),
    ):
        examples, begin = invent(sum(sizes), seed), 0
        for part, size in zip(("train", "dev", "test"), sizes, strict=True):
            path = paths[f"{key}-{part}"] = Path(folder) / f"{key}-{part}.csv"
            _write(path, task, examples[begin : begin + size], labelled=part != "test")
            begin += size
    return paths


def _write(path: Path, task: SentenceTask, examples: Sequence[Example], *, labelled: bool) -> None:
    rows = [["", "id", *task.columns, task.label]]
    for index, example in enumerate(examples):
        label = example.label if task.kind == "classes" else float(example.label or 0)
        rows.append([str(index), example.id, *example.sentences, str(label)])
    with replacing(path) as file:
        for row in rows:
            file.write("\t".join(row if labelled else row[:-1]).encode("utf-8") + b"\n")


def _examples(key: str, found: _Found) -> list[Example]:
    """Return examples with the lines that they would have after a header."""
    return [Example(f"{key}-{i:06}", texts, label, i + 2) for i, (texts, label) in enumerate(found)]


def _opinion(draws: Random) -> tuple[str, int]:
    """Return a sentence and its class."""
    clause, total = _clause(draws)
    total *= 6
    if draws.random() < 0.6:
        more, value = _clause(draws)
        opposed = total * value < 0
        clause += (", but " if opposed else ", and ") + more
        total = total // 3 + 4 * value if opposed else total // 2 + 3 * value
    text = _pick(draws, _OPENINGS) + clause + "."
    strength = sum(abs(total) >= limit for limit in _LIMITS)
    return text[0].upper() + text[1:], 2 + (strength if total > 0 else -strength)


def _clause(draws: Random) -> tuple[str, int]:
    """Return an opinion, and how good it is, from -6 to 6."""
    grade = _pick(draws, tuple(_ADJECTIVES))
    degree, times = _pick(draws, _DEGREES)
    opinion = degree + _pick(draws, _ADJECTIVES[grade])
    return _pick(draws, _CLAUSES).format(subject=_pick(draws, _SUBJECTS), opinion=opinion), grade * times


def _crowd(n: int, seed: int) -> list[_Facts]:
    """Return the facts of so many people that there are enough pairs, and each is met in several."""
    return [_facts(person) for person in people(max(20, n // 10), seed)]


def _facts(person: Person) -> _Facts:
    return {
        "name": person.name,
        "place": person.birthplace,
        "year": str(person.year),
        "job": person.profession,
    }


def _sentence(draws: Random, facts: _Facts, kinds: tuple[str, ...]) -> str:
    a_job = ("an " if facts["job"][0] in "aeiou" else "a ") + facts["job"]
    return _pick(draws, _WORDINGS[kinds]).format(**facts, a_job=a_job)


def _pick(draws: Random, items: Sequence[_Item]) -> _Item:
    return items[int(draws.random() * len(items))]
