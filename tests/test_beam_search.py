import math

import pytest
import torch
from tree_model import BOS, EOS, PAD, Tree, all_texts, divisor, sources

from nlpfast.beam_search import beam_search, greedy_search

A, B, C = 3, 4, 5
ALL_PENALTIES = [
    ("none", 1.0),
    ("length", 1.0),
    ("length", 0.0),
    ("length", 2.5),
    ("gnmt", 0.6),
    ("gnmt", 3.0),
]


def search(model, lengths=(1,), **options):
    return beam_search(model, *sources(list(lengths)), **options)


def same(found, expected):
    """Hypotheses against (score, tokens, log probability), finished or not."""
    assert [h.tokens for h in found] == [tokens for _, tokens, _ in expected]
    for hypothesis, (score, _, log_prob) in zip(found, expected, strict=True):
        assert hypothesis.score == pytest.approx(score, abs=1e-12)
        assert hypothesis.log_probability == pytest.approx(log_prob, abs=1e-12)


@pytest.mark.parametrize(("penalty", "alpha"), ALL_PENALTIES)
@pytest.mark.parametrize("stop", ["beam", "exact"])
def test_a_wide_beam_finds_the_best_of_all_texts_in_their_order(penalty, alpha, stop):
    model, (source, lengths) = Tree(vocabulary=5), sources([2, 5, 3])
    # 1 + 2 + 4 + 8 + 16 texts of two words
    options = {"beam": 31, "max_len_b": 4, "length_penalty": penalty, "alpha": alpha, "stop": stop}
    for n_best in (1, 3, 31):
        found = beam_search(model, source, lengths, n_best=n_best, **options)
        for row, n in enumerate(lengths.tolist()):
            expected = all_texts(model, tuple(source[row, :n].tolist()), 4, penalty, alpha)
            assert len(expected) == 31
            same(found[row], expected[:n_best])


# probabilities of the worked example, after each text; EOS is beside the words A and B
EXAMPLE = {
    (): {A: 0.5, B: 0.4, EOS: 0.1},
    (A,): {A: 0.5, B: 0.4, EOS: 0.1},
    (B,): {A: 0.3, B: 0.1, EOS: 0.6},
    (A, A): {A: 0.1, B: 0.6, EOS: 0.3},
    (A, B): {A: 0.06, B: 0.04, EOS: 0.9},
    (A, A, B): {A: 0.01, B: 0.01, EOS: 0.98},
}


def test_a_beam_of_two_worked_out_by_hand():
    """Every candidate of three steps; four of them, twice the beam, are looked at in each.

    1. A .5, B .4, EOS .1: EOS is third and dropped; A and B go on.
    2. A A .5 * .5 = .25, B EOS .4 * .6 = .24, A B .5 * .4 = .2, B A .4 * .3 = .12 (A EOS .05, B B .04):
       B EOS is second, so [B] has finished with .24; A A and A B go on.
    3. A B EOS .2 * .9 = .18, A A B .25 * .6 = .15, A A EOS .25 * .3 = .075, A A A .25 * .1 = .025
       (A B A .012, A B B .008): A B EOS is first, so [A, B] has finished with .18, the second that has. A A
       EOS is third and dropped; A A B and A A A go on if the search does.
    4. A A B EOS .15 * .98 = .147; the table has A A A end, .025: both finish.
    """
    model = Tree(vocabulary=5, probabilities=EXAMPLE)
    options = {"beam": 2, "n_best": 2}
    log = {p: math.log(p) for p in (0.24, 0.18, 0.147)}

    # none: log .24 = -1.427 and log .18 = -1.715
    found = search(model, length_penalty="none", **options)[0]
    assert [h.tokens for h in found] == [[B], [A, B]] and all(h.finished for h in found)
    assert [h.score for h in found] == pytest.approx([log[0.24], log[0.18]], rel=1e-6)
    assert [h[1] for h in found] == [h[2] for h in found]
    # steps 2 and 3 take both their hypotheses from those that were
    steps = [call[1] for call in model.seen if call[0] == "reorder"]
    assert steps == [[[0, 0]], [[0, 0]]] and len(model.seen) == 6

    # length: -1.427 / 2 = -.714 and -1.715 / 3 = -.572, so the longer one is better
    found = search(model, length_penalty="length", **options)[0]
    assert [h.tokens for h in found] == [[A, B], [B]]
    assert [h.score for h in found] == pytest.approx([log[0.18] / 3, log[0.24] / 2], rel=1e-6)
    assert [h.log_probability for h in found] == pytest.approx([log[0.18], log[0.24]], rel=1e-6)

    # gnmt: -1.427 / (7 / 6) = -1.223 and -1.715 / (8 / 6) = -1.286; squared, -1.048 and -.965
    found = search(model, length_penalty="gnmt", alpha=1, **options)[0]
    assert [h.tokens for h in found] == [[B], [A, B]]
    assert [h.score for h in found] == pytest.approx([log[0.24] * 6 / 7, log[0.18] * 6 / 8], rel=1e-6)
    found = search(model, length_penalty="gnmt", alpha=2, **options)[0]
    assert [h.tokens for h in found] == [[A, B], [B]]

    # exact goes on for -1.917 / 4 = -.479
    found = search(model, length_penalty="length", stop="exact", **options)[0]
    assert [h.tokens for h in found] == [[A, A, B], [A, B]]
    assert found[0].score == pytest.approx(log[0.147] / 4, rel=1e-6)


@pytest.mark.parametrize("stop", ["beam", "exact"])
def test_a_search_ends_when_nothing_can_be_better(stop):
    # .24 has finished in step 2, when .25 was left; .15 is left after step 3
    model = Tree(vocabulary=5, probabilities=EXAMPLE)
    assert search(model, beam=2, length_penalty="none", stop=stop)[0][0].tokens == [B]
    assert [call[0] for call in model.seen].count("advance") == 3


def test_what_finished_in_earlier_steps_counts_among_the_best():
    # .55 finished in step 1 and .45 * .5 in step 2, when .45 * .3 was left
    table = {(): {EOS: 0.55, A: 0.45}, (A,): {EOS: 0.5, A: 0.3, B: 0.2}}
    model = Tree(vocabulary=5, probabilities=table)
    found = search(model, beam=2, n_best=2, length_penalty="none", stop="exact")[0]
    assert [h.tokens for h in found] == [[], [A]]
    assert [call[0] for call in model.seen].count("advance") == 2


@pytest.mark.parametrize(("longest", "steps", "best"), [(2, 2, [A]), (3, 4, [B, B, B]), (20, 4, [B, B, B])])
@pytest.mark.parametrize("stop", ["beam", "exact"])
def test_the_longest_length_bounds_what_can_still_come(longest, steps, best, stop):
    """[A] has log .6 / 2 = -.255; log .4 may become -.916 / 3 = -.305 in two words, and -.229 in three."""
    table = {(): {A: 0.6, B: 0.4}, (B,): {B: 1.0}, (B, B): {B: 1.0}}
    model = Tree(vocabulary=5, probabilities=table)
    found = search(model, beam=2, stop=stop, max_len_b=longest)[0]
    assert [h.tokens for h in found] == [best]
    assert [call[0] for call in model.seen].count("advance") == steps
    # each sentence has its own: 2 and `longest`
    model.seen.clear()
    found = search(model, (1, longest - 1), beam=2, stop=stop, max_len_a=1.0, max_len_b=1)
    assert [[h.tokens for h in row] for row in found] == [[[A]], [best]]
    sizes = [call[1][0] for call in model.seen if call[0] == "advance"]
    assert sizes == [2, 2, *[1] * (steps - 2)]


@pytest.mark.parametrize("penalty", ["none", "length", "gnmt"])
@pytest.mark.parametrize("stop", ["beam", "exact"])
def test_a_finished_hypothesis_is_not_forgotten(penalty, stop):
    """EOS at once has log .9 = -.105; some return [4, 4, 4, 3] of -4.97, where finished ones become -inf."""
    table = {(): {EOS: 0.9, A: 0.02, B: 0.08}, (B,): {B: 0.9, A: 0.1}, (B, B): {B: 0.4, A: 0.6}}
    table |= {(B, B, B): {A: 0.3, B: 0.7}, (B, B, B, A): {EOS: 0.8, A: 0.2}}
    model = Tree(vocabulary=5, probabilities=table)
    found = search(model, beam=2, n_best=2, length_penalty=penalty, stop=stop, max_len_b=6)[0]
    assert found[0].tokens == [] and found[0].log_probability == pytest.approx(math.log(0.9), rel=1e-6)
    assert found[0].score == found[0].log_probability and found[0].finished
    assert len(found) == 2 and found[1].score < found[0].score


def may_follow(text, token, *, limit, min_length, ngram, prefix):
    if len(text) < len(prefix):
        return token == prefix[len(text)]
    if len(text) == limit:
        return token == EOS
    longer = [*text, token]
    grams = [longer[at : at + ngram] for at in range(len(longer) - ngram + 1)] if ngram else []
    return (
        token not in (PAD, BOS)
        and not (token == EOS and len(text) < min_length)
        and not (grams and grams[-1] in grams[:-1])
    )


def by_lists(model, source, *, beam, n_best, penalty, alpha, stop, limit, **rules):
    """Beam search of one sentence with lists, and without any of the ways that make it fast."""
    going_on, finished = [((), 0.0)], []

    def ends_of_itself(text):
        log_probs = model.log_probs(source, text)
        free = [token for token in range(len(log_probs)) if may_follow(text, token, limit=limit + 1, **rules)]
        return len(text) < limit or max(free, key=lambda token: log_probs[token]) == EOS

    for step in range(limit + 1):
        candidates = []
        for text, log_prob in going_on:
            for token, more in enumerate(model.log_probs(source, text)):
                if may_follow(text, token, limit=limit, **rules):
                    candidates.append((log_prob + more, text, token))
        candidates = sorted(candidates, key=lambda candidate: -candidate[0])[: 2 * beam]
        for log_prob, text, token in candidates[:beam]:
            if token == EOS:
                score = log_prob / divisor(step + 1, penalty, alpha)
                finished.append((score, list(text), log_prob, ends_of_itself(text)))
        going_on = [((*text, token), lp) for lp, text, token in candidates if token != EOS][:beam]
        if stop == "beam" and len(finished) >= beam:
            break
    return sorted(finished, key=lambda entry: -entry[0])[:n_best]


RULES = [
    {},
    {"beam": 1},
    {"beam": 5, "n_best": 5},
    {"beam": 4, "n_best": 2, "penalty": "gnmt", "alpha": 0.6},
    {"penalty": "none"},
    {"stop": "exact"},
    {"stop": "exact", "penalty": "none", "n_best": 3},
    {"stop": "exact", "penalty": "gnmt", "alpha": 2.0, "beam": 2, "n_best": 2},
    {"min_length": 5},
    {"ngram": 1, "n_best": 3},
    {"ngram": 2, "min_length": 4},
    {"ngram": 3, "min_length": 8, "beam": 4},
    {"prefix": True},
    {"prefix": True, "ngram": 2, "min_length": 6, "n_best": 2},
    {"max_len_a": 0.6, "max_len_b": 1, "n_best": 3},
    {"max_len_a": 0.6, "max_len_b": 1, "min_length": 2, "stop": "exact"},
]


@pytest.mark.parametrize("rules", RULES, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_seven_sentences_at_once_are_searched_as_each_alone(rules, seed):
    rules = {"beam": 3, "n_best": 1, "penalty": "length", "alpha": 1.0, "stop": "beam", **rules}
    rules = {"max_len_a": 0.0, "max_len_b": 9, "min_length": 0, "ngram": 0, "prefix": False, **rules}
    model, (source, lengths) = Tree(vocabulary=7, scale=1.0), sources([3, 1, 6, 4, 2, 5, 3], seed=seed)
    prefix = torch.zeros(7, 4, dtype=torch.int64)
    if rules["prefix"]:
        prefix[[0, 2, 3, 5], 0], prefix[[0, 2, 5], 1], prefix[2, 2:] = A, A, torch.tensor([B, A])
    # a filling that no sentence may see
    filled = source.masked_fill(source == PAD, 99)
    names = {"length_penalty": rules["penalty"], "no_repeat_ngram": rules["ngram"], "prefix": prefix}
    common = ("beam", "n_best", "alpha", "stop", "max_len_a", "max_len_b", "min_length")
    options = {**{name: rules[name] for name in common}, **names}
    found = beam_search(model, filled, lengths, **options)
    assert len({tuple(h[0].tokens) for h in found}) > 2
    for row, n in enumerate(lengths.tolist()):
        key = tuple(source[row, :n].tolist())
        expected = by_lists(
            model,
            key,
            **{
                name: rules[name]
                for name in ("beam", "n_best", "penalty", "alpha", "stop", "min_length", "ngram")
            },
            limit=math.floor(rules["max_len_a"] * n) + rules["max_len_b"],
            prefix=[token for token in prefix[row].tolist() if token != PAD],
        )
        same(found[row], [entry[:3] for entry in expected])
        assert [h.finished for h in found[row]] == [entry[3] for entry in expected]
        options["prefix"] = prefix[row : row + 1]
        alone = beam_search(model, source[row : row + 1, :n], lengths[row : row + 1], **options)
        assert alone == [found[row]]


def test_sentences_that_have_ended_leave_the_batch():
    """The first ends after one word, the second after three, the third after two."""

    class Lengths(Tree):
        def logits(self, source, text):
            ends = len(text) == {1: 1, 2: 3, 3: 2}[len(source)]
            rest = 0.0 if ends else -0.5
            return torch.tensor([-9.0, -9.0, 9.0 if ends else -9.0, rest, 0.1 - len(text) * rest])

    model = Lengths(vocabulary=5)
    found = search(model, (1, 2, 3), beam=2, n_best=2)
    assert [[len(h.tokens) for h in row] for row in found] == [[1, 1], [3, 3], [2, 2]]
    calls = [call for call in model.seen if call[0] != "reorder"]
    assert calls == [
        ("begin", [3, 3], 2),
        *[("advance", [3, 2])] * 2,
        ("keep", [1, 2]),
        ("advance", [2, 2]),
        ("keep", [0]),
        ("advance", [1, 2]),
    ]
    # fewer are reordered than were read
    shapes = [len(call[1]) for call in model.seen if call[0] == "reorder"]
    assert shapes == [3, 2, 1]


@pytest.mark.parametrize("rules", [{}, {"min_length": 6}, {"ngram": 2, "min_length": 5}], ids=str)
def test_greedy_search_takes_the_most_probable_token(rules):
    rules = {"min_length": 0, "ngram": 0, **rules}
    model, (source, lengths), ends = Tree(scale=1.0), sources([3, 1, 4, 2, 6, 5]), []
    found = greedy_search(
        model, source, lengths, max_len_b=8, min_length=rules["min_length"], no_repeat_ngram=rules["ngram"]
    )
    assert not [call for call in model.seen if call[0] == "reorder"]
    for row, n in enumerate(lengths.tolist()):
        text, total, token = [], 0.0, None
        while token != EOS:
            log_probs = model.log_probs(tuple(source[row, :n].tolist()), tuple(text))
            free = {t for t in range(6) if may_follow(text, t, limit=9, prefix=[], **rules)}
            free = sorted(free, key=lambda t: -log_probs[t])
            token = EOS if len(text) == 8 else free[0]
            total += log_probs[token]
            if token != EOS:
                text.append(token)
        assert found[row].tokens == text and found[row].finished == (free[0] == EOS)
        assert found[row].score == found[row].log_probability == pytest.approx(total, abs=1e-12)
        ends.append(found[row].finished)
    assert len(ends) == 6 and any(ends)
    again = beam_search(
        model,
        source,
        lengths,
        beam=1,
        max_len_b=8,
        length_penalty="length",
        **{"min_length": rules["min_length"], "no_repeat_ngram": rules["ngram"]},
    )
    assert [h[0].tokens for h in again] == [h.tokens for h in found]


def test_greedy_search_takes_its_options():
    model, (source, lengths) = Tree(scale=0.3), sources([2, 4])
    found = greedy_search(
        model,
        source,
        lengths,
        max_len_a=1.0,
        max_len_b=2,
        min_length=4,
        prefix=torch.tensor([[C, PAD], [B, C]]),
    )
    assert [h.tokens[:n] for h, n in zip(found, (1, 2), strict=True)] == [[C], [B, C]]
    assert len(found[0].tokens) == 4 <= len(found[1].tokens) <= 6


def test_repetitions_are_blocked():
    """A model that always wants A, then B, then C, then to end."""
    row = {A: 0.6, B: 0.25, C: 0.1, EOS: 0.05}

    class Same(dict):
        def get(self, text, default):
            return row

    model, texts = Tree(probabilities=Same()), {}
    for n in range(5):
        texts[n] = greedy_search(model, *sources([1]), max_len_b=10, no_repeat_ngram=n)[0].tokens
    assert texts[0] == [A] * 10
    # each word once
    assert texts[1] == [A, B, C]
    # A A, then not A; B A is new; not A A, not A B; and so on
    assert texts[2] == [A, A, B, A, C, A]
    assert texts[3] == [A, A, A, B, A, A, C, A, A]
    assert texts[4] == [A, A, A, A, B, A, A, A, C, A]


def test_lengths_are_bounded_and_a_forced_end_counts():
    """A model that goes on for ever: EOS has .1 after every word, and .7 after three."""
    end, go_on = {EOS: 0.7, A: 0.3}, {EOS: 0.1, A: 0.9}

    class Endless(dict):
        def get(self, text, default):
            return end if len(text) == 3 else go_on

    model = Tree(vocabulary=5, probabilities=Endless())
    found = [search(model, beam=1, max_len_b=n)[0][0] for n in (1, 2, 3, 4)]
    assert [len(h.tokens) for h in found] == [1, 2, 3, 3]
    # EOS at the longest length is what the model wanted, or not
    assert [h.finished for h in found] == [False, False, True, True]
    logs = [math.log(p) for p in (0.9 * 0.1, 0.9**2 * 0.1, 0.9**3 * 0.7, 0.9**3 * 0.7)]
    assert [h.log_probability for h in found] == pytest.approx(logs, rel=1e-6)
    assert [h.score for h in found] == pytest.approx(
        [log / n for log, n in zip(logs, (2, 3, 4, 4), strict=True)], rel=1e-6
    )
    # after three words it may not end, so it goes on
    found = search(model, beam=1, max_len_b=6, min_length=4)[0][0]
    assert found.tokens == [A] * 6 and not found.finished
    # the length of the source counts, not that of the longest one: floor(.5 * 1) + 1 and floor(.5 * 5) + 1
    found = search(model, (1, 5), beam=1, max_len_a=0.5, max_len_b=1)
    assert [len(row[0].tokens) for row in found] == [1, 3]
    # the longest length goes before the shortest
    found = search(model, (1, 5), beam=1, max_len_a=1.0, max_len_b=1, min_length=5)
    assert [len(row[0].tokens) for row in found] == [2, 6]


def test_prefixes_are_written_first():
    model = Tree(vocabulary=5, probabilities=EXAMPLE)
    found = search(model, beam=2, n_best=2, prefix=torch.tensor([[B, A]]), length_penalty="none")[0]
    # B A ends, by the table; there is nothing else
    assert [h.tokens for h in found] == [[B, A]]
    assert found[0].log_probability == pytest.approx(math.log(0.12), rel=1e-6)
    # a prefix of nothing, and what another sentence's prefix leaves
    prefix = torch.tensor([[PAD, PAD], [B, PAD], [B, A]])
    found = search(model, (1, 2, 3), beam=2, prefix=prefix, length_penalty="none")
    assert [row[0].tokens for row in found] == [[B], [B], [B, A]]
    assert search(model, beam=2, prefix=prefix[:1, :0])[0] == search(model, beam=2)[0]
    # it may repeat, but then nothing after it
    prefix = torch.tensor([[A, A, B]])
    found = search(model, beam=2, prefix=prefix, no_repeat_ngram=1, max_len_b=3)[0]
    assert found[0].tokens == [A, A, B]
    assert found[0].log_probability == pytest.approx(math.log(0.5 * 0.5 * 0.6 * 0.98), rel=1e-6)


def test_there_may_be_fewer_hypotheses_than_asked_for():
    model = Tree(vocabulary=5, probabilities={(): {A: 0.6, EOS: 0.4}})
    found = search(model, beam=5, n_best=5)[0]
    assert [h.tokens for h in found] == [[A], []]


def test_a_sentence_after_which_nothing_may_follow_is_returned_as_it_is():
    # two words, each once, but four at least
    model = Tree(vocabulary=5)
    found = search(model, (2, 3), beam=3, n_best=2, min_length=4, no_repeat_ngram=1)
    for row, n in zip(found, (2, 3), strict=True):
        source = tuple(sources([2, 3])[0][n - 2, :n].tolist())
        texts = {}
        for text in ((A, B), (B, A)):
            steps = [model.log_probs(source, text[:at])[text[at]] for at in range(2)]
            texts[text] = sum(steps)
        best = max(texts, key=texts.get)
        assert len(row) == 1 and row[0].tokens == list(best) and not row[0].finished
        assert row[0].log_probability == pytest.approx(texts[best], abs=1e-12)
        assert row[0].score == pytest.approx(texts[best] / 2, abs=1e-12)
    # nothing at all: the model wants to end, and must not
    model = Tree(vocabulary=5, probabilities={})
    assert search(model, min_length=2, max_len_b=2)[0] == [([], 0.0, 0.0, False)]
    # one that has finished before is enough
    model = Tree(vocabulary=5, probabilities={(): {EOS: 0.3, A: 0.7}, (A,): {A: 1.0}, (A, A): {A: 1.0}})
    assert [h.tokens for h in search(model, beam=2, n_best=2, no_repeat_ngram=1)[0]] == [[]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_other_types(dtype):
    # steps of 1/4 are exact in all of them
    model = Tree(scale=1.0)
    logits = model.logits
    model.logits = lambda source, text: (4 * logits(source, text)).round() / 4
    exact = search(model, (2, 3), beam=1, max_len_b=5)
    model.dtype = dtype
    for row, expected in zip(search(model, (2, 3), beam=1, max_len_b=5), exact, strict=True):
        assert row[0].log_probability == pytest.approx(expected[0].log_probability, abs=1e-5)


def test_no_sentences():
    source, lengths = torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    model = Tree()
    assert beam_search(model, source, lengths) == greedy_search(model, source, lengths) == []
    assert not model.seen


def test_inputs_are_left_alone_and_a_search_repeats():
    model, (source, lengths) = Tree(), sources([2, 4, 3])
    prefix = torch.tensor([[A, B], [PAD, PAD], [C, PAD]])
    given = [source, lengths, prefix]
    before, state = [tensor.clone() for tensor in given], torch.get_rng_state()
    model.train().drop.eval()
    first = beam_search(model, source, lengths, prefix=prefix, n_best=5, max_len_b=6)
    assert first == beam_search(model, source, lengths, prefix=prefix, n_best=5, max_len_b=6)
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))
    assert model.training and not model.drop.training
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert all(row[at].score >= row[at + 1].score for row in first for at in range(len(row) - 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_refused_and_the_mode_put_back(bad):
    model = Tree().train()
    good = model.logits
    model.logits = lambda source, text: (
        good(source, text) if len(text) < 2 else torch.full((6,), 1.0).put(torch.tensor(5), torch.tensor(bad))
    )
    with pytest.raises(ValueError, match="the model returned NaN logits for token 2; its weights"):
        search(model, min_length=4)
    assert model.training and model.drop.training


ONE = torch.tensor([1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam": 0}, "beam=0 must be >= 1"),
        ({"n_best": 0}, "n_best=0 must be within 1..5, the beam"),
        ({"n_best": 6}, "n_best=6 must be within 1..5"),
        ({"stop": "first"}, "stop='first' is unknown; give one of beam, exact"),
        ({"length_penalty": "mean"}, "length_penalty='mean' is unknown; give one of none, length, gnmt"),
        ({"alpha": -0.1}, "alpha=-0.1 must be within 0..10"),
        ({"alpha": 10.1}, "alpha=10.1 must be within 0..10"),
        ({"alpha": math.nan, "length_penalty": "none"}, "alpha=nan must be within 0..10"),
        ({"max_len_a": -1.0}, "max_len_a=-1.0 must be finite and >= 0"),
        ({"max_len_a": math.inf}, "max_len_a=inf must be finite"),
        ({"max_len_b": 0}, "max_len_b=0 must be >= 1"),
        ({"min_length": -1}, "min_length=-1 must be >= 0"),
        ({"min_length": 9, "max_len_b": 8}, "min_length=9 must be <= max_len_b=8; raise"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram=-1 must be >= 0"),
        ({"source": ONE}, "source is torch.int64 of shape [1], expected int64 of shape [B, S]"),
        ({"source": torch.ones(2, 2)}, "source is torch.float32 of shape [2, 2], expected int64"),
        ({"source": torch.ones(2, 0).long()}, "of shape [2, 0], expected int64 of shape [B, S] with S >= 1"),
        (
            {"lengths": torch.tensor([1, 0])},
            "lengths=[1, 0], torch.int64, must be one int64 number within 1..2",
        ),
        ({"lengths": torch.tensor([1, 3])}, "lengths=[1, 3], torch.int64, must be"),
        ({"lengths": ONE}, "lengths=[1], torch.int64, must be one int64 number within 1..2 for each of 2"),
        ({"lengths": torch.ones(2)}, "lengths=[1.0, 1.0], torch.float32, must be one int64"),
        ({"prefix": ONE}, "prefix is torch.int64 of shape [1], expected int64 of shape [2, P]"),
        ({"prefix": torch.full((2, 1), 3.0)}, "prefix is torch.float32 of shape [2, 1]"),
        (
            {"prefix": torch.full((3, 1), 3)},
            "prefix is torch.int64 of shape [3, 1], expected int64 of shape [2",
        ),
        (
            {"prefix": torch.tensor([[A], [EOS]])},
            "prefix of sentence 1 is [2]: no id may be negative, PAD, BOS",
        ),
        ({"prefix": torch.tensor([[BOS], [A]])}, "prefix of sentence 0 is [1]: no id"),
        ({"prefix": torch.tensor([[A, A], [PAD, A]])}, "prefix of sentence 1 is [0, 3]: no id may be"),
        ({"prefix": torch.tensor([[A, -1], [A, A]])}, "prefix of sentence 0 is [3, -1]: no id may be"),
        ({"prefix": torch.full((2, 3), A), "max_len_b": 2}, "prefix of sentence 0 has 3 tokens, more than"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    model, (source, lengths) = Tree(), sources([2, 2])
    given = {"source": source, "lengths": lengths, **options}
    with pytest.raises(ValueError) as error:
        beam_search(model, **given)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not model.seen


def test_a_prefix_of_another_vocabulary_is_refused():
    search(Tree(vocabulary=6), prefix=torch.tensor([[5]]))
    with pytest.raises(ValueError, match="prefix has token 6, but the model's vocabulary has 6; encode it"):
        search(Tree(vocabulary=6), prefix=torch.tensor([[6]]))
