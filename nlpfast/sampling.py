"""Sampled translations: what a model would say, with the probability that it gives to it.

Shapes: B sentences that still go on, K samples of each, S tokens of the longest source, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlpfast.decoding import evaluation_mode, next_token_probabilities
from nlpfast.hypotheses import Constraints, Hypothesis, TranslationModel, log_probabilities, longest_lengths

__all__ = ["sample"]


@torch.no_grad()
def sample(
    model: TranslationModel,
    source: Tensor,
    lengths: Tensor,
    *,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    max_len_a: float = 0.0,
    max_len_b: int = 200,
    generator: torch.Generator | None = None,
) -> list[list[Hypothesis]]:
    """Draw translations of each sentence, independent of each other, token by token.

    The model runs in evaluation mode and without gradients; its modes are as before afterwards. A sentence
    leaves the batch when all its samples have ended. PAD and BOS are not drawn. The same numbers of the
    generator, in the same batch, give the same translations.

    Args:
        model: see `TranslationModel`; the samples are its beam. `TranslationState.reorder` is not called.
        source: int64 [B, S], S >= 1.
        lengths: int64 [B], tokens of each source, within 1..S.
        samples: translations of each sentence, >= 1.
        temperature: see `nlpfast.decoding.next_token_probabilities`, as for `top_k` and `top_p`.
        top_k: >= 1 or None.
        top_p: within (0, 1] or None.
        max_len_a: a translation has at most `floor(max_len_a * length of its source) + max_len_b` tokens
            without EOS, and is cut off there. >= 0.
        max_len_b: see there, >= 1.
        generator: source of the random numbers, on the device of `source`; None for torch's global one.

    Returns:
        For each sentence its samples, in the order in which they were drawn; some may be equal. Their
        `log_probability` is the model's, whatever the temperature, `top_k` and `top_p`, as minimum risk
        training needs it (Shen et al. 2016); `score` is the same. It counts EOS if the sample is `finished`,
        and no EOS if it was cut off.

    Raises:
        ValueError: an argument is outside its range, or the model returned NaN.
    """
    if samples < 1:
        raise ValueError(f"samples={samples} must be >= 1; it is how many translations a sentence gets")
    limits = longest_lengths(source, lengths, max_len_a, max_len_b)
    # refuses wrong options before the model runs
    next_token_probabilities(torch.zeros(1), temperature=temperature, top_k=top_k, top_p=top_p)
    if not limits:
        return []
    special, shape = model.config, (len(limits), samples)
    constraints = Constraints(special, limits, source.device)
    found: list[list[Hypothesis]] = [[] for _ in limits]
    sentences = torch.arange(len(limits), device=source.device)
    tokens = torch.full(shape, special.bos_id, device=source.device)
    history = tokens.new_empty(*shape, 0)
    total, ended = torch.zeros(shape, device=source.device), torch.zeros_like(tokens, dtype=torch.bool)
    with evaluation_mode(model):
        state = model.begin(source, lengths, samples)
        while True:
            log_probs = log_probabilities(model.advance(tokens, state), history.shape[2])
            constraints.ban(log_probs, history)
            probs = next_token_probabilities(log_probs, temperature=temperature, top_k=top_k, top_p=top_p)
            tokens = _draw(probs.flatten(0, 1), generator).view(ended.shape)
            # a sample that has ended is written on, as the shape is fixed; that does not count
            total = total + log_probs.gather(2, tokens[:, :, None])[:, :, 0].masked_fill(ended, 0.0)
            history = torch.cat([history, tokens[:, :, None]], dim=2)
            ended = ended | (tokens == special.eos_id)
            done = ended.all(dim=1) | (constraints.limits == history.shape[2])
            if not bool(done.any()):
                continue
            rows = sentences[done].tolist()
            for row, texts, numbers in zip(rows, history[done].tolist(), total[done].tolist(), strict=True):
                found[row] = [_hypothesis(*pair, special.eos_id) for pair in zip(texts, numbers, strict=True)]
            going_on = (~done).nonzero()[:, 0]
            if len(going_on) == 0:
                return found
            state.keep(going_on)
            constraints.keep(going_on)
            sentences, tokens, history, total, ended = (
                x[going_on] for x in (sentences, tokens, history, total, ended)
            )


def _draw(probs: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return one token of each row of [N, V], int64 [N, 1]."""
    if probs.device.type != "cpu":
        return torch.multinomial(probs, 1, generator=generator)
    # on a CPU multinomial draws V random numbers for a row, one after the other: as slow as the model
    sums = probs.cumsum(dim=-1)
    share = torch.rand(len(probs), 1, generator=generator, dtype=sums.dtype)
    # the first sum above it: there is one, as share < 1, and its token has a probability above 0
    return torch.searchsorted(sums, share * sums[:, -1:], right=True)


def _hypothesis(tokens: list[int], log_probability: float, eos: int) -> Hypothesis:
    finished = eos in tokens
    text = tokens[: tokens.index(eos)] if finished else tokens
    return Hypothesis(text, log_probability, log_probability, finished)
