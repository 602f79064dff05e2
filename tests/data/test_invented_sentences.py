"""Invented sentence tasks: the labels follow from the texts, and the files are those of the course."""

import hashlib
import re
from collections import Counter

import pytest

from nlpfast.data import invented_sentences
from nlpfast.data.biographies import people
from nlpfast.data.invented_sentences import (
    invented_paraphrases,
    invented_sentiment,
    invented_similarity,
    write_invented,
)
from nlpfast.data.sentence_files import PARAPHRASE, SIMILARITY, SST, read_examples

INVENTED = (invented_sentiment, invented_paraphrases, invented_similarity)
GRADES = {word: grade for grade, words in invented_sentences._ADJECTIVES.items() for word in words}
TIMES = {"very": 3, "truly": 3, "slightly": 1, "somewhat": 1, "not": -1}


def test_no_adjective_has_two_grades():
    assert len(GRADES) == sum(len(words) for words in invented_sentences._ADJECTIVES.values()) == 30
    assert set(GRADES.values()) == {-2, -1, 0, 1, 2}


def opinions(text):
    """How good each clause of a sentence says that something is."""
    found = []
    for clause in re.split(", (?:and|but) ", text.rstrip(".")):
        *_, before, adjective = clause.split()
        found.append(GRADES[adjective] * TIMES.get(before, 2))
    return found


def expected_class(text):
    values = opinions(text)
    if len(values) == 1:
        value = values[0]
    elif ", but " in text:
        value = (values[0] + 2 * values[1]) / 3
    else:
        value = (values[0] + values[1]) / 2
    return 2 + (value >= 1) + (value >= 3) - (value <= -1) - (value <= -3)


def test_classes_follow_from_the_words_and_are_balanced():
    examples = invented_sentiment(3000, seed=3)
    counts = Counter(example.label for example in examples)
    assert set(counts) == {0, 1, 2, 3, 4}
    assert min(counts.values()) > 500
    for example in examples:
        (text,) = example.sentences
        assert example.label == expected_class(text), text
        assert text[0].isupper() and text.endswith(".") and "  " not in text


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The film is superb.", 4),
        ("The film is very good.", 4),
        ("The film is good.", 3),
        ("The film is not superb.", 1),
        ("The film is not awful.", 3),
        ("The film is very ordinary.", 2),
        ("The film is superb, but the plot is dull.", 2),
        ("The film is dull, but the plot is superb.", 3),
        ("The film is superb, and the plot is good.", 4),
    ],
)
def test_the_rule_that_is_checked_is_the_one_that_is_meant(text, label):
    assert expected_class(text) == label


def test_but_stands_between_opposites_alone():
    texts = [example.sentences[0] for example in invented_sentiment(1500)]
    both = [text for text in texts if len(opinions(text)) == 2]
    assert 600 < len(both) < 1200
    for text in both:
        first, second = opinions(text)
        assert (", but " in text) == (first * second < 0)
    assert any(", but " in text for text in both) and any(", and " in text for text in both)


def test_words_alone_do_not_tell_the_class():
    """The best guess from the adjectives of a sentence, whichever words are with them, is often wrong."""
    groups = {}
    for example in invented_sentiment(3000):
        found = tuple(
            sorted(GRADES[word] for word in re.findall(r"\w+", example.sentences[0]) if word in GRADES)
        )
        groups.setdefault(found, Counter())[example.label] += 1
    right = sum(max(counts.values()) for counts in groups.values())
    assert 0.4 < right / 3000 < 0.85


def facts_of(text, crowd):
    """The facts that a sentence states, found by their words alone."""
    found = set()
    for name in crowd["name"]:
        if name in text:
            found.add(name)
            text = text.replace(name, "_")
    assert len(found) == 1, text
    found |= set(re.findall(r"\b\d{4}\b", text))
    found |= {place for place in crowd["place"] if re.search(rf"\b{place}\b", text)}
    found |= {job for job in crowd["job"] if re.search(rf"\ban? {job}\b", text)}
    return found


def crowd_of(n, seed):
    crowd = people(max(20, n // 10), seed)
    return {
        "name": {person.name for person in crowd},
        "place": {person.birthplace for person in crowd},
        "job": {person.profession for person in crowd},
    }


def test_paraphrases_state_the_same_facts():
    examples, crowd = invented_paraphrases(800, seed=2), crowd_of(800, 2)
    for example in examples:
        first, second = (facts_of(text, crowd) for text in example.sentences)
        assert (first == second) == (example.label == 1), example
        # one fact differs
        assert example.label == 1 or len(first ^ second) == 2
        assert example.sentences[0] != example.sentences[1]
    assert 0.42 < sum(example.label for example in examples) / 800 < 0.58
    assert {type(example.label) for example in examples} == {int}


def test_similarity_is_the_share_of_facts():
    examples, crowd = invented_similarity(800, seed=4), crowd_of(800, 4)
    for example in examples:
        first, second = (facts_of(text, crowd) for text in example.sentences)
        assert 2 <= len(first) <= 4
        assert example.label == round(5 * len(first & second) / len(first | second), 1), example
        assert example.sentences[0] != example.sentences[1]
    counts = Counter(example.label for example in examples)
    assert min(counts) == 0.0 and max(counts) == 5.0
    assert {type(example.label) for example in examples} == {float}
    # graded: neither the ends nor whole numbers are most of it
    assert counts[0.0] + counts[5.0] < 480 and sum(label % 1 > 0 for label in counts.elements()) > 240
    assert len(counts) >= 8


@pytest.mark.parametrize("invent", INVENTED)
def test_no_two_examples_are_the_same(invent):
    # so many that some would be
    examples = invent(4000)
    assert len({example.sentences for example in examples}) == len(examples) == 4000


@pytest.mark.parametrize("invent", INVENTED)
def test_data_depend_on_the_seed_alone(invent):
    first = invent(60, seed=1)
    assert invent(60, seed=1) == first and invent(60) == invent(60, seed=0) != first
    assert len(first) == len({example.sentences for example in first}) == len({e.id for e in first}) == 60
    assert [example.line for example in first] == list(range(2, 62))
    assert invent(0) == []


def test_data_are_the_same_everywhere():
    text = repr([invent(50, seed=5) for invent in INVENTED])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "af90424aa1c94441"


def test_files_are_those_of_the_course(tmp_path):
    paths = write_invented(tmp_path / "made", seed=7, sizes=(50, 20, 10))
    assert sorted(paths) == sorted(
        f"{a}-{b}" for a in ("sst", "para", "sts") for b in ("train", "dev", "test")
    )
    assert paths["sst-train"].read_bytes().startswith(b"\tid\tsentence\tsentiment\n0\tsst-000000\t")
    assert (
        paths["para-dev"]
        .read_bytes()
        .startswith(b"\tid\tsentence1\tsentence2\tis_duplicate\n0\tpara-000050\t")
    )
    assert paths["sts-test"].read_bytes().startswith(b"\tid\tsentence1\tsentence2\n0\tsts-000070\t")
    assert re.search(rb"\t[01]\.0\n", paths["para-train"].read_bytes())
    for key, task, invent in zip(
        ("sst", "para", "sts"), (SST, PARAPHRASE, SIMILARITY), INVENTED, strict=True
    ):
        invented, found = invent(80, seed=7), []
        for part, size in (("train", 50), ("dev", 20), ("test", 10)):
            examples, report = read_examples(paths[f"{key}-{part}"], task)
            assert len(examples) == report.used == size
            found += examples
        assert [(e.id, e.sentences) for e in found] == [(e.id, e.sentences) for e in invented]
        assert [e.label for e in found] == [e.label for e in invented[:70]] + [None] * 10
        assert [e.line for e in found[:50]] == [e.line for e in invented[:50]]
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == sorted(
        f"{key}.csv" for key in paths
    )
    # again, over the files that are there
    assert write_invented(tmp_path / "made", seed=8, sizes=(5, 2, 1)) == paths
