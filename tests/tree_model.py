"""A model of translation with a table of logits for every text, whose state checks how it is used."""

import itertools
import math
from types import SimpleNamespace

import torch
from torch import nn

PAD, BOS, EOS = 0, 1, 2


class Tree(nn.Module):
    """Random logits for each source and each text so far, or those of given probabilities.

    `seen` has a line for each call: what was called, and of what shape or with what values.
    """

    def __init__(self, vocabulary=6, scale=1.5, probabilities=None, dtype=torch.float64):
        super().__init__()
        self.config = SimpleNamespace(pad_id=PAD, bos_id=BOS, eos_id=EOS)
        self.vocabulary, self.scale, self.dtype = vocabulary, scale, dtype
        self.probabilities, self.known, self.seen = probabilities, {}, []
        self.drop = nn.Dropout(0.5)

    def logits(self, source, text):
        """The logits after a text, without BOS: the same for the same source."""
        if self.probabilities is not None:
            # what is not in the table is a text that ends
            row = self.probabilities.get(text, {EOS: 1.0})
            return torch.tensor([math.log(row[i]) if i in row else -math.inf for i in range(self.vocabulary)])
        if (source, text) not in self.known:
            seed = hash((source, text)) % 2**31
            noise = torch.randn(self.vocabulary, generator=torch.Generator().manual_seed(seed))
            self.known[source, text] = self.scale * noise.double()
        return self.known[source, text]

    def log_probs(self, source, text):
        return self.logits(source, text).double().log_softmax(-1).tolist()

    def begin(self, source, lengths, beam):
        assert source.dtype == lengths.dtype == torch.int64 and not torch.is_grad_enabled()
        assert not self.training and not self.drop.training
        self.seen.append(("begin", list(source.shape), beam))
        keys = [tuple(row[:n]) for row, n in zip(source.tolist(), lengths.tolist(), strict=True)]
        return State(keys, beam, self.seen)

    def advance(self, tokens, state):
        assert tokens.dtype == torch.int64 and list(tokens.shape) == [len(state.keys), state.beam]
        assert not torch.is_grad_enabled() and not self.training and not self.drop.training
        self.seen.append(("advance", list(tokens.shape)))
        assert int(tokens.min()) >= 0 and int(tokens.max()) < self.vocabulary
        state.read(tokens.tolist())
        rows = [
            [self.logits(key, text) for text in texts]
            for key, texts in zip(state.keys, state.texts, strict=True)
        ]
        return torch.stack([torch.stack(row) for row in rows]).to(self.dtype)


class State:
    """The sources and the texts of all hypotheses that go on."""

    def __init__(self, keys, beam, seen):
        self.keys, self.beam, self.seen = keys, beam, seen
        self.texts = [[None] * beam for _ in keys]

    def read(self, tokens):
        for row, (texts, news) in enumerate(zip(self.texts, tokens, strict=True)):
            started = texts[0] is not None
            assert started or set(news) == {BOS}
            self.texts[row] = [(*t, n) if started else () for t, n in zip(texts, news, strict=True)]

    def reorder(self, beams):
        assert beams.dtype == torch.int64 and list(beams.shape) == [len(self.keys), self.beam]
        self.seen.append(("reorder", beams.tolist()))
        assert int(beams.min()) >= 0
        self.texts = [[t[b] for b in row] for t, row in zip(self.texts, beams.tolist(), strict=True)]

    def keep(self, sentences):
        assert sentences.dtype == torch.int64 and sentences.dim() == 1
        rows = sentences.tolist()
        # only where some leave and some stay, in their order
        assert 0 < len(rows) < len(self.keys) and rows == sorted(set(rows))
        self.seen.append(("keep", rows))
        self.keys, self.texts = [self.keys[row] for row in rows], [self.texts[row] for row in rows]


def sources(lengths, filling=PAD, seed=0):
    """Sources [B, S] that differ, and their lengths [B]."""
    source = torch.randint(3, 50, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    lengths = torch.tensor(lengths)
    return source.masked_fill(torch.arange(source.shape[1]) >= lengths[:, None], filling), lengths


def divisor(length, penalty, alpha):
    return {"none": 1.0, "length": length**alpha, "gnmt": ((5 + length) / 6) ** alpha}[penalty]


def all_texts(model, source, longest, penalty="none", alpha=1.0):
    """Every text that may be written, with its log probability and its score, the best first."""
    words = [token for token in range(model.vocabulary) if token not in (PAD, BOS, EOS)]
    found = []
    for length in range(longest + 1):
        for text in itertools.product(words, repeat=length):
            steps = [model.log_probs(source, text[:at])[text[at]] for at in range(length)]
            log_prob = sum(steps) + model.log_probs(source, text)[EOS]
            found.append((log_prob / divisor(length + 1, penalty, alpha), list(text), log_prob))
    return sorted(found, key=lambda entry: -entry[0])
