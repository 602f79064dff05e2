"""Accuracy, F1, correlation and scores of translations: values by hand, those of others, and laws."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nlpfast.metrics import BLEU_TOKENIZERS, accuracy, corpus_scores, f1, pearson

PREDICTIONS, LABELS = [0, 1, 2, 2, 1, 0, 0], [0, 2, 2, 1, 1, 0, 3]


def test_accuracy_counts_what_is_right():
    assert accuracy(PREDICTIONS, LABELS) == 4 / 7
    assert accuracy([1], [1]) == 1.0 and accuracy([1.0, 0.0], [1, 1]) == 0.5
    assert type(accuracy([1], [1])) is float


def test_f1_by_hand():
    # class: right, said, true: 0: 2 3 2; 1: 1 2 2; 2: 1 2 2; 3: 0 0 1
    assert f1(PREDICTIONS, LABELS) == pytest.approx((4 / 5 + 2 / 4 + 2 / 4 + 0) / 4)
    # a class that is predicted and never right, and one that is neither
    assert f1([0, 4], [0, 0]) == pytest.approx((2 / 3 + 0) / 2)
    assert f1([1, 1, 0, 0], [1, 0, 1, 0], average="binary") == 0.5
    assert f1([1, 1, 1, 0], [1, 0, 0, 0], average="binary") == pytest.approx(2 * 1 / (3 + 1))
    assert f1([0, 0], [0, 0], average="binary") == 0.0
    assert f1([0, 0], [0, 0]) == 1.0


def test_the_macro_mean_differs_from_the_binary_one():
    predictions, labels = [1, 1, 1, 0], [1, 0, 0, 0]
    assert f1(predictions, labels) == pytest.approx((1 / 2 + 2 * 1 / (1 + 3)) / 2)
    assert f1(predictions, labels) == f1(predictions, labels, average="macro")


pairs = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


@given(pairs)
def test_f1_is_the_mean_of_precision_and_recall(pairs):
    predictions, labels = map(list, zip(*pairs, strict=True))
    scores = []
    for number in set(predictions) | set(labels):
        right = sum(p == t == number for p, t in pairs)
        said, true = predictions.count(number), labels.count(number)
        precision, recall = (right / count if count else 0.0 for count in (said, true))
        scores.append(2 * precision * recall / (precision + recall) if right else 0.0)
    assert f1(predictions, labels) == pytest.approx(sum(scores) / len(scores))
    assert 0.0 <= f1(predictions, labels) <= 1.0
    assert f1(labels, labels) == accuracy(labels, labels) == 1.0
    assert f1(predictions, labels) == pytest.approx(f1(labels, predictions))


@pytest.mark.parametrize("metric", [accuracy, f1, pearson])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float32, torch.float64, torch.bfloat16])
def test_tensors_and_arrays_are_lists(metric, dtype):
    expected = metric(PREDICTIONS, LABELS)
    assert metric(torch.tensor(PREDICTIONS, dtype=dtype), LABELS) == expected
    assert metric(np.array(PREDICTIONS), torch.tensor(LABELS, dtype=dtype)) == expected


def test_gradients_are_no_hindrance():
    x = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    assert pearson(x, [1, 2, 4]) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [accuracy, f1, pearson])
def test_what_cannot_be_compared_is_refused(metric):
    with pytest.raises(ValueError, match=r"have 2 and 1 numbers; they must have as many, one for each"):
        metric([1, 2], [1])
    with pytest.raises(ValueError, match=r"of shape \[0\] must be \[N\], N at least 1"):
        metric([], [])
    with pytest.raises(ValueError, match=r"of shape \[2, 1\] must be"):
        metric(torch.zeros(2, 1), [0, 0])


def test_classes_are_whole_and_averages_known():
    for metric in (accuracy, f1):
        with pytest.raises(ValueError, match=r"predictions with 0\.5 must be whole numbers"):
            metric([1, 0.5], [1, 0])
        with pytest.raises(ValueError, match="labels with nan must be whole numbers"):
            metric([1, 0], [1, math.nan])
    with pytest.raises(ValueError, match="average='micro' must be 'macro' or 'binary'"):
        f1([1], [1], average="micro")
    with pytest.raises(ValueError, match="must be 0 and 1 with average='binary'"):
        f1([1, 2], [1, 0], average="binary")


def test_pearson_by_hand():
    assert pearson([1, 2, 3, 4], [2, 4, 6, 8]) == pytest.approx(1.0)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    # deviations -1 0 1 and -2 1 1: 3 / sqrt(2 * 6)
    assert pearson([1, 2, 3], [1, 4, 4]) == pytest.approx(3 / math.sqrt(12))
    assert pearson([0, 1, 0, 1], [0, 0, 1, 1]) == pytest.approx(0.0, abs=1e-15)


numbers = st.floats(-1e6, 1e6, allow_subnormal=False).filter(lambda value: value == 0 or abs(value) > 1e-6)
columns = st.integers(2, 40).flatmap(
    lambda size: st.tuples(*[st.lists(numbers, min_size=size, max_size=size)] * 2)
)


@given(columns)
def test_pearson_is_that_of_numpy(columns):
    x, y = columns
    assume(np.std(x) > 1e-3 * (1 + np.abs(x).max()) and np.std(y) > 1e-3 * (1 + np.abs(y).max()))
    result = pearson(x, y)
    assert result == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
    assert -1.0 <= result <= 1.0
    assert pearson(y, x) == pytest.approx(result, abs=1e-12)
    assert pearson([-value for value in x], y) == pytest.approx(-result, abs=1e-12)


whole = st.lists(st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)), min_size=2, max_size=40)


@given(whole, st.integers(-(2**50), 2**50), st.sampled_from([2.0**-900, 2.0**-20, 1.0, 2.0**900]))
def test_shifts_and_factors_change_nothing(pairs, shift, factor):
    x, y = map(list, zip(*pairs, strict=True))
    expected = pearson(x, y)
    # these sums are exact
    shifted = pearson([value + shift for value in x], y)
    scaled = pearson([value * factor for value in x], y)
    assert (math.isnan(expected) and math.isnan(shifted) and math.isnan(scaled)) or (
        shifted == pytest.approx(expected, abs=1e-12) and scaled == pytest.approx(expected, abs=1e-12)
    )
    assert math.isnan(expected) == (len(set(x)) == 1 or len(set(y)) == 1)


def test_large_numbers_keep_their_differences():
    small = [0.0, 1.0, 3.0, 2.0]
    assert pearson([1e15 + value for value in small], small) == pytest.approx(1.0, abs=1e-12)
    huge = [-1.7e308, 1.7e308, 0.0]
    assert pearson(huge, [-1, 1, 0]) == pytest.approx(1.0)


@pytest.mark.parametrize("constant", [[0.1] * 3, [7] * 3, [1e300] * 3, [0] * 3])
def test_what_is_constant_has_no_correlation(constant):
    assert math.isnan(pearson(constant, [1, 2, 3])) and math.isnan(pearson([1, 2, 3], constant))
    assert math.isnan(pearson([1], [2]))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 2])
def test_what_is_not_finite_has_no_correlation(bad, place):
    x = [1.0, 2.0, 4.0]
    x[place] = bad
    assert math.isnan(pearson(x, [1, 2, 3])) and math.isnan(pearson([1, 2, 3], x))


def test_rounding_does_not_lead_beyond_one():
    for seed in range(200):
        x = np.random.default_rng(seed).standard_normal(7)
        assert abs(pearson(x, 3 * x + 0.1)) <= 1.0


@pytest.fixture
def sacrebleu():
    return pytest.importorskip("sacrebleu")


HYPOTHESES = ["the cat sat on the mat", "a dog barks"]
REFERENCE = ["the cat sat on a mat today", "a big dog barks"]


def test_bleu_by_hand(sacrebleu):
    """Of the n-grams of each sentence, those that are right, once for each time the reference has them.

    1: the (one of two) cat sat on mat, 5 of 6;      a dog barks, 3 of 3
    2: the-cat cat-sat sat-on, 3 of 5;               dog-barks, 1 of 2
    3: the-cat-sat cat-sat-on, 2 of 4;               0 of 1
    4: the-cat-sat-on, 1 of 3;                       0 of 0
    9 words where the reference has 11: the brevity penalty is exp(1 - 11 / 9).
    """
    ((name, score, signature),) = corpus_scores(HYPOTHESES, [REFERENCE], ["bleu"])
    assert score == pytest.approx(100 * math.exp(1 - 11 / 9) * (8 / 9 * 4 / 7 * 2 / 5 * 1 / 3) ** (1 / 4))
    version = sacrebleu.__version__
    assert (name, signature) == ("BLEU", f"nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:{version}")


def test_chrf_and_ter_by_hand(sacrebleu):
    """The letters abc of abcd: precision 1 and recall 3/4, 2/3, 1/2 for 1, 2, 3 letters; F with recall twice.

    Edits of words: the/a and an additional today, of 7; an additional big, of 4.
    """
    ((name, score, signature),) = corpus_scores(["abc"], [["abcd"]], ["chrf"])
    recall = (3 / 4 + 2 / 3 + 1 / 2) / 3
    assert score == pytest.approx(100 * 5 * recall / (4 + recall))
    assert name == "chrF2" and "|case:mixed|eff:yes|nc:6|nw:0|" in signature
    ((name, score, signature),) = corpus_scores(HYPOTHESES, [REFERENCE], ["ter"])
    assert score == pytest.approx(100 * 3 / 11)
    assert name == "TER" and "|case:lc|tok:tercom|" in signature
    ((name, score, signature),) = corpus_scores(["abc def"], [["abc def"]], ["chrf++"])
    assert (name, score) == ("chrF2++", 100) and "|nw:2|" in signature


TEXTS = {
    "hyp": ["The cat sat, on the mat!", "", "Größe: 3.5 (etwa) A B", "ganz  anders "],
    "ref": ["The cat sat on a mat.", "Nothing here.", "Größe: 3,5 (etwa) a b", "a  B c"],
    "other": ["A cat, it sat on the mat!", "", "größe 3.5", ""],
}


@pytest.mark.parametrize(
    ("references", "lowercase", "tokenize", "words"),
    [
        (["ref"], False, "13a", []),
        (["ref", "other"], True, "intl", ["-tok", "intl", "-lc", "--chrf-lowercase"]),
        (["other"], False, "char", ["-tok", "char"]),
        (["other", "ref"], True, "none", ["-tok", "none", "-lc", "--chrf-lowercase"]),
    ],
)
def test_the_scores_are_those_of_the_command_sacrebleu(
    references, lowercase, tokenize, words, sacrebleu, tmp_path
):
    for name, lines in TEXTS.items():
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    command = ["sacrebleu", *references, "-i", "hyp", "-m", "bleu", "chrf", "ter", "-w", "9", "-f", "json"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    expected = [(entry["name"], entry["score"], entry["signature"]) for entry in json.loads(done.stdout)]
    assert [name for name, *_ in expected] == ["BLEU", "chrF2", "TER"]
    texts = [TEXTS[name] for name in references]
    found = corpus_scores(TEXTS["hyp"], texts, lowercase=lowercase, tokenize=tokenize)
    assert [(name, round(score, 9), signature) for name, score, signature in found] == expected
    # all differ from each other, or this would say little
    assert len({round(score, 3) for _, score, _ in expected}) == 3


def test_scores_come_in_the_order_asked_for(sacrebleu):
    names = [
        score.name for score in corpus_scores(HYPOTHESES, [REFERENCE], ["ter", "chrf++", "bleu", "chrf"])
    ]
    assert names == ["TER", "chrF2++", "BLEU", "chrF2"]


def test_empty_translations_are_scored(sacrebleu):
    whole, half = (corpus_scores([line, ""], [["a b c d", "e f g h"]]) for line in ("a b c d", ""))
    assert [score for _, score, _ in half] == [0, 0, 100]
    assert whole[0].score == pytest.approx(100 * math.exp(1 - 8 / 4)) and whole[2].score == 50


@pytest.mark.parametrize(
    ("hypotheses", "references", "options", "message"),
    [
        ([], [[]], {}, "at least one sentence"),
        (["a"], [], {}, "at least one sentence"),
        ("a b", [["a", " ", "b"]], {}, "hypotheses is a string and must be a list"),
        (["a b"], ["a b"], {}, "references has sentences and must have lists of them"),
        (["a"], "a", {}, "references has sentences"),
        (["a"], [["a"], ["a", "b"]], {}, r"references\[1\] have 1 and 2 sentences; they must have as many"),
        (["a", "b"], [["a"]], {}, r"references\[0\] have 2 and 1 sentences"),
        (["a"], [["a"]], {"metrics": ["bleu", "BLEU"]}, r"'BLEU' must be some of bleu, chrf, chrf\+\+, ter"),
        (["a"], [["a"]], {"tokenize": "flores200"}, "'flores200' must be one of 13a, intl, zh, char, none"),
    ],
)
def test_what_cannot_be_scored(hypotheses, references, options, message):
    with pytest.raises(ValueError, match=message):
        corpus_scores(hypotheses, references, **options)


def test_without_sacrebleu_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(RuntimeError, match=r"need sacrebleu .*pip install 'nlpfast\[nmt\]'"):
        corpus_scores(["a"], [["a"]])


def test_scores_print_nothing_and_write_no_file(sacrebleu, tmp_path):
    program = (
        "import sys, socket\n"
        "socket.getaddrinfo = socket.socket.connect = None\n"
        "from nlpfast.metrics import corpus_scores\n"
        "assert 'sacrebleu' not in sys.modules\n"
        "lines = ['this is tokenised text .'] * 200\n"
        f"for tokenize in {BLEU_TOKENIZERS!r}:\n"
        "    assert corpus_scores(lines, [lines], tokenize=tokenize)[0].score > 99.9\n"
    )
    environment = {"HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []
