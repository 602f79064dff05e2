"""A step of dual learning with two small Transformers, against two translation steps and against eager code.

A step is forward, backward, clipping of each translator's gradient and Adamax, with dropout 0.2, on the batch
of the translation benchmark. Ours has the scores of the language models, which do not change. The peers are
two translation steps, one in each direction, with label smoothing: what training costs without the other's
help; one of them, for its memory; and eager code, which pads, has all logits, and asks both language models,
GPTs as large as an encoder, again in each step.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nlpfast.data.sentence_batches import targets_of, turned
from nlpfast.data.translation_batches import TranslationBatch, make_batch
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.sequence_log_probabilities import sentence_log_probabilities
from nlpfast.models.transformer import Transformer
from nlpfast.nn.losses import LabelSmoothedCrossEntropyWithAlignment
from nlpfast.optim import Adamax
from nlpfast.train.dual import DualTranslators, pair_losses
from nlpfast.train.dual_batches import DualBatch
from nlpfast.train.translation import TranslationLoss

from . import bench_translation, eager_translation
from .bench_training import checked, distance
from .bench_translation import DROPOUT, LARGEST_NORM, SMOOTHING, chosen, unavailable
from .measure import Settings
from .process_memory import megabytes_in_a_process, megabytes_of

__all__ = ["chosen", "unavailable"]

OP = "dual"
OURS = "nlpfast"
TWO, EAGER, ONE = "two translation steps", "eager", "one translation step"
PEERS = (TWO, EAGER, ONE)
DSL_LAMBDA = 0.01
COMPARED = 17


@dataclass(frozen=True)
class Case:
    """A step of dual learning.

    Attributes:
        dtype: float32, or bfloat16 by autocast.
        goal: how many times faster than two translation steps; it may be slower.
        memory_goal: how many times the memory of one translation step ours may take.
    """

    dtype: torch.dtype
    goal: float = 1 / 1.15
    memory_goal: float = 2.2
    best_goal: None = None
    memory_peer: str = ONE
    # eager code with four networks takes longer than a quick run may
    quick = False
    rounds = (1, 5)

    @property
    def name(self) -> str:
        """What is trained, and the dtype."""
        return f"dual step {str(self.dtype).removeprefix('torch.')}"


CASES = (Case(torch.float32), Case(torch.bfloat16))


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    return {"name": case.name, **asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}


def flops(case: Case) -> float:
    """Return the operations of the matrix products of ours; those of both directions are nearly the same.

    Weights of sentences are known after the forward pass alone, so that logits are made twice.
    """
    tokens = sum(n + m for n, m in bench_translation.LENGTHS)
    again = 2.0 * tokens * bench_translation.C * bench_translation.V
    return 2.0 * bench_translation.flops(bench_translation.Training(case.dtype, 1.0)) + again


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Step]:
    """Return an implementation's step, on some copies."""
    return [Step(case, implementation, DROPOUT) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return errors against float64 without dropout, over the largest value.

    They are of loss and gradients on the first sentences; ours are compared with eager code in float64.
    """
    distances = {}
    for name in dict.fromkeys((EAGER, *implementations)):
        exact = EAGER if name == OURS else name
        right = Step(case, exact, 0.0, torch.float64, count=COMPARED).results()
        found = Step(case, name, 0.0, count=COMPARED).results()
        distances[name] = {part: distance(found[part], values) for part, values in right.items()}
    return checked(case.name, distances, EAGER, implementations)


class Step:
    """Two translators with the batch of the first `count` pairs, and their optimizer."""

    def __init__(
        self,
        case: Case,
        implementation: str,
        dropout: float,
        dtype: torch.dtype = torch.float32,
        *,
        count: int | None = None,
    ) -> None:
        torch.manual_seed(0)
        self.implementation, self.half = (
            implementation,
            case.dtype == torch.bfloat16 and dtype != torch.float64,
        )
        config = bench_translation.config(dropout)
        self.model = DualTranslators(Transformer(config), Transformer(config)).to(dtype).train()
        longest = 2 + max(max(pair) for pair in bench_translation.LENGTHS)
        sizes = {"n_layer": config.encoder_layers, "n_head": config.heads, "n_embd": config.d_model}
        self.language_models = [
            GPT(GPTConfig(config.source_vocab, longest, **sizes)).to(dtype).eval() for _ in "xy"
        ]
        self.special = {name: getattr(config, name) for name in ("pad_id", "bos_id")}
        sources, targets = bench_translation.sentences(count or len(bench_translation.LENGTHS))
        self.there = make_batch(sources, targets, **self.special, eos_id=config.eos_id)
        self.back = turned(self.there, **self.special)
        if implementation == EAGER:
            self.rows = [self._padded(rows, config.eos_id) for rows in (sources, targets)]
        if implementation == OURS:
            with torch.no_grad():
                self.batch = DualBatch(
                    *(self.there, self.back),
                    *(
                        sentence_log_probabilities(model, targets_of(part))
                        for model, part in zip(self.language_models, (self.back, self.there), strict=True)
                    ),
                    DSL_LAMBDA,
                )
        parts = {ONE: self.model.source_to_target}
        self.trained: nn.Module = parts.get(implementation, self.model)
        self.optimizer = (torch.optim.Adamax if implementation == EAGER else Adamax)(
            self.trained.parameters(), lr=2e-3
        )
        self.loss_fn = TranslationLoss(LabelSmoothedCrossEntropyWithAlignment(SMOOTHING))

    def _padded(self, rows: list[list[int]], eos_id: int) -> Tensor:
        bos, pad = self.special["bos_id"], self.special["pad_id"]
        return eager_translation.padded([[bos, *row, eos_id] for row in rows], pad)

    def step(self) -> None:
        """Train on the batch."""
        self.backward()
        parts = self.model.clipped_apart if self.trained is self.model else (self.trained,)
        for part in parts:
            nn.utils.clip_grad_norm_(part.parameters(), LARGEST_NORM)
        self.optimizer.step()

    def backward(self) -> Tensor:
        """Compute the gradients, and return the loss."""
        self.optimizer.zero_grad()
        if self.implementation in (TWO, ONE):
            # one after the other, as two runs would
            losses = [self._of_one(self.model.source_to_target, self.there)]
            if self.implementation == TWO:
                losses.append(self._of_one(self.model.target_to_source, self.back))
            return torch.stack(losses).sum()
        with self._precision():
            loss = self._eager_loss() if self.implementation == EAGER else self._our_loss()
        loss.backward()
        return loss.detach()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext()

    def _of_one(self, model: nn.Module, batch: TranslationBatch) -> Tensor:
        with self._precision():
            loss = self.loss_fn(model, batch)
        loss.backward()
        return loss.detach()

    def _our_loss(self) -> Tensor:
        losses = pair_losses(self.model, self.batch)
        return (losses.forward + losses.backward).mean()

    def _eager_loss(self) -> Tensor:
        x, y = self.rows
        with torch.no_grad():
            lm_source, lm_target = (
                self._summed(model(tokens[:, :-1])[0], tokens)
                for model, tokens in zip(self.language_models, self.rows, strict=True)
            )
        a = self._log_probabilities(self.model.source_to_target, x, y)
        b = self._log_probabilities(self.model.target_to_source, y, x)
        forward = -a + DSL_LAMBDA * ((lm_source + a) - (lm_target + b.detach())) ** 2
        backward = -b + DSL_LAMBDA * ((lm_source + a.detach()) - (lm_target + b)) ** 2
        return (forward + backward).mean()

    def _log_probabilities(self, model: Any, source: Tensor, target: Tensor) -> Tensor:
        memory = eager_translation.encode(model, source[:, 1:])
        features, _ = eager_translation.decode(model, target[:, :-1], memory, source[:, 1:])
        return self._summed(F.linear(features, model.output_weight), target)

    def _summed(self, logits: Tensor, tokens: Tensor) -> Tensor:
        at_least_float = logits if logits.dtype == torch.float64 else logits.float()
        log_probs = at_least_float.log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return log_probs.masked_fill(tokens[:, 1:] == self.special["pad_id"], 0.0).sum(1)

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return the loss and the gradients, by name."""
        loss = self.backward()
        named = self.trained.named_parameters()
        return {
            "loss": {"loss": loss},
            "gradients": {name: p.grad for name, p in named if p.grad is not None},
        }


def memory(case: Case, implementation: str) -> float | None:
    """Return the megabytes that a step takes at most beyond the models, on Linux; None for two steps.

    Two translation steps one after the other take what the larger one takes.
    """
    if implementation == TWO:
        return None
    return megabytes_in_a_process(__name__, CASES.index(case), implementation)


def main(index: str, implementation: str) -> None:
    """Print what `memory` returns for a case of CASES; for a process of its own."""
    torch.set_num_threads(1)
    # loads the code of the libraries
    Step(CASES[int(index)], implementation, DROPOUT, count=COMPARED).step()
    print(megabytes_of(Step(CASES[int(index)], implementation, DROPOUT).step))


if __name__ == "__main__":
    main(*sys.argv[1:])
