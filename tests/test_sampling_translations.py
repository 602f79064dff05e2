import math
from collections import Counter

import pytest
import torch
from tree_model import BOS, EOS, PAD, Tree, all_texts, sources

from nlpfast.decoding import next_token_probabilities
from nlpfast.sampling import sample

A, B = 3, 4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def without_pad_and_bos(model):
    """Make the model give no probability to what is never drawn, so that the texts' probabilities add up."""
    logits = model.logits
    hidden = torch.tensor([PAD, BOS])
    model.logits = lambda source, text: logits(source, text).index_fill(0, hidden, -math.inf)
    return model


OPTIONS = [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 2}, {"top_p": 0.7}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_texts_are_as_frequent_as_they_are_probable(options):
    """Each text that can be drawn, within four standard deviations; log probabilities are the model's."""
    model, draws, longest = without_pad_and_bos(Tree(vocabulary=5, scale=1.0)), 6000, 2
    source, lengths = sources([2, 3])
    found = sample(model, source, lengths, samples=draws, max_len_b=longest, generator=seeded(1), **options)
    for row, n in enumerate(lengths.tolist()):
        key = tuple(source[row, :n].tolist())

        def step(text, token, key=key):
            probs = next_token_probabilities(model.logits(key, text), **options)
            return float(probs[token]), model.log_probs(key, text)[token]

        expected = {}
        for text in [(), *((a,) for a in (A, B)), *((a, b) for a in (A, B) for b in (A, B))]:
            steps = [step(text[:at], token) for at, token in enumerate(text)]
            # a text of the longest length is cut off there
            steps += [step(text, EOS)] if len(text) < longest else []
            expected[text] = math.prod(s[0] for s in steps), sum(s[1] for s in steps)
        assert sum(probability for probability, _ in expected.values()) == pytest.approx(1.0)
        counts = Counter(tuple(hypothesis.tokens) for hypothesis in found[row])
        assert len(found[row]) == draws and set(counts) <= set(expected)
        for text, (probability, _) in expected.items():
            deviation = math.sqrt(draws * probability * (1 - probability))
            assert abs(counts[text] - draws * probability) <= 4 * deviation
        for hypothesis in found[row][:300]:
            text = tuple(hypothesis.tokens)
            assert hypothesis.log_probability == pytest.approx(expected[text][1], abs=1e-6)
            assert hypothesis.score == hypothesis.log_probability
            assert hypothesis.finished == (len(text) < longest)


@pytest.mark.parametrize("share", [0.0, 1 - 2**-24])
def test_no_random_number_draws_what_has_no_probability(share, monkeypatch):
    """The first tokens are PAD and BOS, the last ones are beyond the two of `top_k`."""
    model = Tree(vocabulary=8, dtype=torch.float32)
    model.logits = lambda source, text: torch.tensor([1.0, 1.0, 0.3, 2.0, 0.9, 1.9, 0.1, 0.2])
    monkeypatch.setattr(torch, "rand", lambda *shape, generator, dtype: torch.full(shape, share, dtype=dtype))
    found = sample(model, *sources([1]), top_k=2, max_len_b=1)
    assert found[0][0].tokens == [3 if share == 0.0 else 5]


def test_samples_are_independent():
    """The two samples of a sentence are as often equal as their probabilities say, and not ordered."""
    model, runs = without_pad_and_bos(Tree(vocabulary=5, scale=0.5)), 4000
    source, lengths = sources([2])
    source, lengths = source.expand(runs, 2), lengths.expand(runs)
    found = sample(model, source, lengths, samples=2, max_len_b=1, generator=seeded(2))
    pairs = Counter(tuple(tuple(h.tokens) for h in row) for row in found)
    probs = model.logits(tuple(source[0].tolist()), ()).softmax(-1)
    single = {(): float(probs[EOS]), (A,): float(probs[A]), (B,): float(probs[B])}
    for first, p in single.items():
        for second, q in single.items():
            assert abs(pairs[first, second] - runs * p * q) <= 4 * math.sqrt(runs * p * q * (1 - p * q))


def test_the_most_probable_text_at_a_low_temperature():
    model, (source, lengths) = Tree(vocabulary=5), sources([2, 4, 1])
    cold = sample(model, source, lengths, samples=3, temperature=1e-9, max_len_b=4)
    top = sample(model, source, lengths, samples=2, top_k=1, max_len_b=4)
    for row, n in enumerate(lengths.tolist()):
        key, text = tuple(source[row, :n].tolist()), []
        while len(text) < 4:
            log_probs = model.log_probs(key, tuple(text))
            best = max((A, B, EOS), key=lambda token: log_probs[token])
            if best == EOS:
                break
            text.append(best)
        assert [h.tokens for h in cold[row] + top[row]] == [text] * 5


def test_the_log_probability_is_that_of_the_whole_text():
    model, (source, lengths) = Tree(vocabulary=5, scale=0.5), sources([3, 2])
    found = sample(model, source, lengths, samples=50, max_len_b=9, generator=seeded(3))
    lengths_seen = set()
    for row, n in enumerate(lengths.tolist()):
        key = tuple(source[row, :n].tolist())
        known = {tuple(text): log_prob for _, text, log_prob in all_texts(model, key, 5)}
        for hypothesis in found[row]:
            text = tuple(hypothesis.tokens)
            lengths_seen.add(len(text))
            if text in known:
                assert hypothesis.finished
                assert hypothesis.log_probability == pytest.approx(known[text], abs=1e-5)
    assert len(lengths_seen) > 4


def test_sentences_leave_when_all_their_samples_have_ended():
    class Lengths(Tree):
        """The first sentence ends after one word, the second after three; B is as good as A."""

        def logits(self, source, text):
            end = len(text) == {1: 1, 2: 3}[len(source)]
            return torch.tensor([9.0, 9.0, 0.0 if end else -math.inf, *[-math.inf if end else 0.0] * 2])

    model = Lengths(vocabulary=5)
    found = sample(model, *sources([1, 2]), samples=40, generator=seeded(4))
    assert [{len(h.tokens) for h in row} for row in found] == [{1}, {3}]
    assert all(h.finished for row in found for h in row) and len({tuple(h.tokens) for h in found[1]}) == 8
    assert model.seen == [
        ("begin", [2, 2], 40),
        *[("advance", [2, 40])] * 2,
        ("keep", [1]),
        *[("advance", [1, 40])] * 2,
    ]
    # PAD and BOS are the most probable, but not drawn; what they have is missing from the others
    norm = math.log(2 * math.exp(9) + 2)
    last = math.log(2 * math.exp(9) + 1)
    assert found[1][0].log_probability == pytest.approx(-3 * norm - last, rel=1e-6)


def test_what_follows_the_end_of_a_sample_does_not_count():
    table = {(): {A: 0.5, EOS: 0.5}, (A,): {A: 1.0}, (A, A): {A: 1.0}}
    model = Tree(vocabulary=5, probabilities=table)
    found = sample(model, *sources([1]), samples=30, generator=seeded(5))[0]
    assert {tuple(h.tokens) for h in found} == {(), (A, A, A)}
    assert all(h.log_probability == pytest.approx(math.log(0.5), rel=1e-6) for h in found)
    assert [call[0] for call in model.seen] == ["begin", *["advance"] * 4]


def test_the_longest_length_cuts_off():
    table = {(): {A: 0.9, EOS: 0.1}, (A,): {A: 0.8, EOS: 0.2}, (A, A): {A: 1.0}}
    model = Tree(vocabulary=5, probabilities=table)
    found = sample(model, *sources([1, 2]), samples=60, max_len_a=1.0, max_len_b=1, generator=seeded(6))
    for row, longest in zip(found, (2, 3), strict=True):
        by_length = {len(h.tokens): h for h in row}
        assert set(by_length) == {0, 1, longest}
        assert [by_length[n].finished for n in (0, 1, longest)] == [True, True, False]
        logs = [math.log(p) for p in (0.1, 0.9 * 0.2, 0.9 * 0.8)]
        assert [by_length[n].log_probability for n in (0, 1, longest)] == pytest.approx(logs, rel=1e-6)


def test_the_generator_decides_and_the_global_one_is_left_alone():
    model, given = Tree(), sources([2, 3, 1])
    state = torch.get_rng_state()
    first = sample(model, *given, samples=5, generator=seeded(1))
    assert sample(model, *given, samples=5, generator=seeded(1)) == first
    assert sample(model, *given, samples=5, generator=seeded(2)) != first
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    first = sample(model, *given)
    torch.manual_seed(3)
    assert sample(model, *given) == first and [len(row) for row in first] == [1, 1, 1]


def test_modes_are_put_back_and_nan_is_refused():
    model = Tree().train()
    model.drop.eval()
    sample(model, *sources([2]))
    assert model.training and not model.drop.training and torch.is_grad_enabled()
    model.logits = lambda source, text: torch.full((6,), math.nan)
    with pytest.raises(ValueError, match="the model returned NaN logits for token 0"):
        sample(model, *sources([2]))
    assert model.training and not model.drop.training


def test_no_sentences():
    model = Tree()
    assert sample(model, torch.zeros(0, 3).long(), torch.zeros(0).long()) == [] and not model.seen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "samples=0 must be >= 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be finite and > 0"),
        ({"top_k": 0}, "top_k=0 must be >= 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be in (0, 1]"),
        ({"max_len_a": -0.5}, "max_len_a=-0.5 must be finite and >= 0"),
        ({"max_len_b": 0}, "max_len_b=0 must be >= 1"),
        ({"lengths": torch.tensor([3])}, "lengths=[3], torch.int64, must be one int64 number within 1..2"),
        ({"source": torch.ones(2).long()}, "source is torch.int64 of shape [2], expected int64 of shape"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    model, (source, lengths) = Tree(), sources([2])
    with pytest.raises(ValueError) as error:
        sample(model, **{"source": source, "lengths": lengths, **options})
    assert message in str(error.value) and "\n" not in str(error.value) and not model.seen
