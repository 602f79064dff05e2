"""Beam search: the most probable translations that a model has, for a batch of sentences at once.

Shapes: B sentences that still go on, K hypotheses of each (the beam), S tokens of the longest source, P of
the longest prefix, t tokens written so far, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlpfast.decoding import evaluation_mode
from nlpfast.hypotheses import (
    Constraints,
    Hypothesis,
    TranslationModel,
    length_divisor,
    log_probabilities,
    longest_lengths,
)

__all__ = ["STOPS", "beam_search", "greedy_search"]

STOPS = ("beam", "exact")


@torch.no_grad()
def beam_search(
    model: TranslationModel,
    source: Tensor,
    lengths: Tensor,
    *,
    beam: int = 5,
    n_best: int = 1,
    max_len_a: float = 0.0,
    max_len_b: int = 200,
    min_length: int = 0,
    length_penalty: str = "length",
    alpha: float = 1.0,
    no_repeat_ngram: int = 0,
    prefix: Tensor | None = None,
    stop: str = "beam",
) -> list[list[Hypothesis]]:
    """Return the best translations of each sentence.

    In every step the `2 * beam` most probable continuations of all hypotheses of a sentence are looked at, as
    in fairseq. An EOS among the first `beam` of them finishes its hypothesis, which leaves the beam: what was
    found is kept as it is and never scored again. Later EOS are dropped. The first `beam` continuations that
    are not EOS go on, so the beam is always full.

    A sentence leaves the batch when

    - the hypotheses that go on cannot beat its `n_best` best finished ones: as no log probability is
      positive, and no penalty falls with the length, a hypothesis of log probability `s` reaches at most
      `s / length_divisor(longest + 1)`; or
    - with ``stop="beam"``, `beam` hypotheses have finished, which is fairseq's rule.

    ``stop="exact"`` waits for the first: nothing that goes on in the beam could be better then. With a length
    penalty that bound is weak, and most sentences are searched up to their longest length: give it a tight
    `max_len_a` and `max_len_b`.

    PAD and BOS never follow; probabilities are not divided by what is left. The translations of a sentence
    do not depend on the others in the batch, up to rounding. The model runs in evaluation mode and without
    gradients; its modes are as before afterwards. With one beam `TranslationState.reorder` is not called.

    Args:
        model: see `TranslationModel`.
        source: int64 [B, S], S >= 1.
        lengths: int64 [B], tokens of each source, within 1..S.
        beam: hypotheses that go on, >= 1.
        n_best: translations returned, within 1..beam.
        max_len_a: a translation has at most `floor(max_len_a * length of its source) + max_len_b` tokens
            without EOS; there EOS is taken, and its log probability added, whatever it is. >= 0.
        max_len_b: see there, >= 1.
        min_length: tokens without EOS that a translation has at least, >= 0; but no more than it may have.
        length_penalty: one of "none", "length" and "gnmt", see `length_divisor`. Lengths count EOS.
        alpha: strength of the penalty, within 0..10; 1 is usual for "length", 0.6 for "gnmt".
        no_repeat_ngram: no translation has an n-gram of this size twice; 0 allows it.
        prefix: int64 [B, P], the tokens that each translation begins with, without BOS, shorter ones filled
            up with PAD; None for none. Their log probabilities count.
        stop: one of `STOPS`.

    Returns:
        For each sentence up to `n_best` hypotheses, the best first; of equal ones, the one found first. There
        are fewer only where there are no more. `finished` is False where the longest length ended it although
        another token was more probable than EOS, and where no token may follow at all: of such a sentence
        its best hypothesis is returned as far as it came, without EOS, if nothing of it has finished.

    Raises:
        ValueError: an argument is outside its range, or the model returned NaN.

    Sources: Wu et al. 2016 (`length_divisor`); Ott et al. 2019, "fairseq: A Fast, Extensible Toolkit for
    Sequence Modeling" (the rules above).
    """
    if beam < 1:
        raise ValueError(f"beam={beam} must be >= 1; 1 is greedy search")
    if not 1 <= n_best <= beam:
        raise ValueError(f"n_best={n_best} must be within 1..{beam}, the beam; widen the beam")
    if stop not in STOPS:
        raise ValueError(f"stop={stop!r} is unknown; give one of {', '.join(STOPS)}")
    limits = longest_lengths(source, lengths, max_len_a, max_len_b)
    # elsewhere the longest length depends on the sentence
    if max_len_a == 0 and min_length > max_len_b:
        raise ValueError(f"min_length={min_length} must be <= max_len_b={max_len_b}; raise max_len_b")
    constraints = Constraints(
        model.config,
        limits,
        source.device,
        min_length=min_length,
        no_repeat_ngram=no_repeat_ngram,
        prefix=prefix,
    )
    # the divisor of every length that a hypothesis can have, with EOS
    divisors = [length_divisor(n, length_penalty, alpha) for n in range(1, max(limits, default=0) + 2)]
    if not limits:
        return []
    eos, most = model.config.eos_id, beam if stop == "beam" else None
    search = _Search(constraints, divisors, eos, beam, n_best, most)
    with evaluation_mode(model):
        state = model.begin(source, lengths, beam)
        tokens = torch.full((len(limits), beam), model.config.bos_id, device=source.device)
        while True:
            beams, tokens, open_sentences = search.step(model.advance(tokens, state))
            if len(open_sentences) == 0:
                return search.results()
            if len(open_sentences) < len(beams):
                state.keep(open_sentences)
                search.keep(open_sentences)
                beams, tokens = beams[open_sentences], tokens[open_sentences]
            if beam > 1:
                state.reorder(beams)


def greedy_search(
    model: TranslationModel,
    source: Tensor,
    lengths: Tensor,
    *,
    max_len_a: float = 0.0,
    max_len_b: int = 200,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
    prefix: Tensor | None = None,
) -> list[Hypothesis]:
    """Return the translation of each sentence whose every token is the most probable one after those before.

    The same as `beam_search` with one beam, and no penalty: a beam of one ends with the first EOS.

    Args:
        model: see `TranslationModel`.
        source: int64 [B, S], S >= 1.
        lengths: int64 [B], within 1..S.
        max_len_a: see `beam_search`, as for all that follow.
        max_len_b: >= 1.
        min_length: >= 0.
        no_repeat_ngram: >= 0.
        prefix: int64 [B, P] or None.

    Returns:
        One hypothesis for each sentence; its score is its log probability.

    Raises:
        ValueError: an argument is outside its range, or the model returned NaN.
    """
    found = beam_search(
        model,
        source,
        lengths,
        beam=1,
        max_len_a=max_len_a,
        max_len_b=max_len_b,
        min_length=min_length,
        length_penalty="none",
        no_repeat_ngram=no_repeat_ngram,
        prefix=prefix,
    )
    return [hypotheses[0] for hypotheses in found]


class _Search:
    """The beams of the sentences that go on, and what was found for all."""

    def __init__(
        self,
        constraints: Constraints,
        divisors: list[float],
        eos: int,
        beam: int,
        n_best: int,
        most: int | None,
    ) -> None:
        B, device = len(constraints.limits), constraints.limits.device
        self.constraints, self.divisors, self.eos = constraints, divisors, eos
        self.n_best, self.most = n_best, most
        # numbers of the sentences that go on; their hypotheses' tokens and log probabilities
        self.sentences = list(range(B))
        self.history = torch.empty(B, beam, 0, dtype=torch.int64, device=device)
        self.log_probs = torch.full((B, beam), -torch.inf, device=device)
        # at first there is one, of no tokens; those of probability 0 only fill the beam
        self.log_probs[:, 0] = 0.0
        self.longest = torch.tensor(divisors, device=device)[constraints.limits]
        # of what finished: how many, the best scores, and the hypotheses of all sentences
        self.counts = torch.zeros(B, dtype=torch.int64, device=device)
        self.best = torch.full((B, n_best), -torch.inf, device=device)
        self.found: list[list[Hypothesis]] = [[] for _ in range(B)]

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write one token more.

        Args:
            logits: [B, K, V].

        Returns:
            int64 [B, K] each: the hypothesis that each one goes on from, and its new token. And the rows of
            the sentences that go on, int64 [B'].
        """
        (_, K, V), written = logits.shape, self.history.shape[2]
        log_probs = log_probabilities(logits, written)
        if written == 0:
            self.constraints.check_vocabulary(V)
        allowed, candidates = self.constraints.apply(log_probs, self.history)
        # of each hypothesis first: its own then do not depend on the others, even among equal ones
        values, tokens = candidates.topk(min(2 * K, V), dim=-1)
        width = values.shape[2]
        values, order = (values + self.log_probs[:, :, None]).flatten(1).topk(2 * K, dim=-1)
        tokens, beams = tokens.flatten(1).gather(1, order), order // width
        ends = tokens == self.eos
        self._finish(ends[:, :K] & values[:, :K].isfinite(), values[:, :K], beams, allowed)
        stuck = values[:, 0].isneginf() & (self.counts == 0)
        if bool(stuck.any()):
            self._give_up(stuck)
        # at most K of the 2 K are EOS
        others = ends.int().argsort(dim=1, stable=True)[:, :K]
        beams, tokens, self.log_probs = (x.gather(1, others) for x in (beams, tokens, values))
        history = self.history.gather(1, beams[:, :, None].expand(-1, -1, written))
        self.history = torch.cat([history, tokens[:, :, None]], dim=2)
        done = self.best[:, -1] >= self.log_probs[:, 0] / self.longest
        if self.most is not None:
            done |= self.counts >= self.most
        return beams, tokens, (~done).nonzero()[:, 0]

    def _finish(self, ends: Tensor, values: Tensor, beams: Tensor, allowed: Tensor) -> None:
        """Keep the hypotheses among the first K candidates that end here, all [B, K]; `allowed` [B, K, V]."""
        written = self.history.shape[2]
        rows, ranks = ends.nonzero(as_tuple=True)
        if len(rows) == 0:
            return
        divisor = self.divisors[written]
        scores = (values / divisor).masked_fill(~ends, -torch.inf)
        self.best = torch.cat([self.best, scores], dim=1).topk(self.n_best, dim=1).values
        self.counts += ends.sum(dim=1)
        origins = beams[rows, ranks]
        # before the limit EOS was chosen among others; at the limit it is the only one
        chosen = self.constraints.limits[rows] > written
        chosen |= allowed[rows, origins].argmax(dim=-1) == self.eos
        columns = (self.history[rows, origins], values[rows, ranks], chosen)
        for row, text, log_prob, finished in zip(
            rows.tolist(), *(column.tolist() for column in columns), strict=True
        ):
            hypothesis = Hypothesis(text, log_prob / divisor, log_prob, finished)
            self.found[self.sentences[row]].append(hypothesis)

    def _give_up(self, stuck: Tensor) -> None:
        """Keep the best hypothesis of sentences after which nothing may follow, [B], as it is."""
        divisor = self.divisors[max(self.history.shape[2] - 1, 0)]
        for row in stuck.nonzero()[:, 0].tolist():
            log_prob = float(self.log_probs[row, 0])
            hypothesis = Hypothesis(self.history[row, 0].tolist(), log_prob / divisor, log_prob, False)
            self.found[self.sentences[row]].append(hypothesis)

    def keep(self, rows: Tensor) -> None:
        """Go on with the sentences of these rows, int64 [B']."""
        self.sentences = [self.sentences[row] for row in rows.tolist()]
        self.constraints.keep(rows)
        self.history, self.log_probs, self.longest = (
            self.history[rows],
            self.log_probs[rows],
            self.longest[rows],
        )
        self.counts, self.best = self.counts[rows], self.best[rows]

    def results(self) -> list[list[Hypothesis]]:
        """Return the best of each sentence, the best first."""
        return [
            sorted(found, key=lambda hypothesis: -hypothesis.score)[: self.n_best] for found in self.found
        ]
