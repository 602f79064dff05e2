"""Training steps of a small Transformer that translates, and its beam search, against eager code.

A training step is forward, backward, clipping of the gradient's norm and Adamax, with dropout 0.2, on one
batch of about 2,000 tokens a side that is read again in every step. Eager code pads the batch, has all scores
of attention and all logits in memory, and fairseq's criterion. The tokens are random. Sentences have the
lengths of Multi30k's training text in subwords of a joint vocabulary of 8,000: a batch has sentences of one
length, or nearly, as both are cut into batches by length; so padding is little of it.

Translation is of 64 sentences with a beam of 5, up to 20 tokens each; the peer reads all tokens of every
hypothesis again in each step. Sentences are not taken out, as random weights end none.
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

from nlpfast import dispatch
from nlpfast.beam_search import beam_search
from nlpfast.data.translation_batches import make_batch
from nlpfast.models.transformer import Transformer, TransformerConfig
from nlpfast.nn.losses import LabelSmoothedCrossEntropyWithAlignment
from nlpfast.nn.packing import Packing
from nlpfast.optim import Adamax

from . import eager_translation as eager
from .bench_training import checked, distance
from .measure import Settings
from .process_memory import megabytes_in_a_process, megabytes_of

OP = "translation"
OURS = "nlpfast"
EAGER, UNSUPERVISED, UNCACHED = "eager", "without alignments", "without cache"
PEERS = (EAGER, UNSUPERVISED, UNCACHED)
V, C, H, D_FF, LAYERS = 8000, 256, 4, 1024, 3
DROPOUT, SMOOTHING, LAMBDA = 0.2, 0.1, 0.05
# Source and target subwords with EOS: a batch in the middle of the lengths, sorted as training sorts them.
LENGTHS = tuple((15, n) for n in (10, 11, 12, 12, 13, 13, 14, 14, 14, 15, 15, 16, 16, 17, 18, 19, 21)) * 8
COMPARED = 17
LARGEST_NORM = 0.2
SENTENCES, BEAM, LONGEST = 64, 5, 20


@dataclass(frozen=True)
class Training:
    """A training step.

    Attributes:
        dtype: float32, or bfloat16 by autocast.
        aligned: word alignments supervise a head.
        goal: how many times faster than the peer ours must be.
        memory_goal: which share of the memory of eager code ours may take.
        quick: also part of the quick run.
    """

    dtype: torch.dtype
    goal: float
    aligned: bool = False
    memory_goal: float | None = None
    quick: bool = False
    best_goal: None = None
    memory_peer: str = EAGER
    rounds = (1, 5)

    @property
    def name(self) -> str:
        """What is trained, and the dtype."""
        words = f"training step {str(self.dtype).removeprefix('torch.')}"
        return f"{words}, aligned" if self.aligned else words

    @property
    def peers(self) -> tuple[str, ...]:
        """Those of `PEERS` that it has."""
        return (EAGER, UNSUPERVISED) if self.aligned else (EAGER,)

    @property
    def goals(self) -> dict[str, float]:
        """What supervision may add to a step, at most."""
        return {UNSUPERVISED: 1 / 1.1} if self.aligned else {}


@dataclass(frozen=True)
class Translating:
    """Beam search.

    Attributes:
        dtype: float32, or bfloat16 by autocast.
        quick: also part of the quick run.
    """

    dtype: torch.dtype
    quick: bool = False
    goal: None = None
    best_goal: None = None
    peers = (UNCACHED,)
    goals = {UNCACHED: 2.0}  # noqa: RUF012
    rounds = (1, 3)

    @property
    def name(self) -> str:
        """What is done, and the dtype."""
        return f"{SENTENCES} sentences, beam {BEAM}, {str(self.dtype).removeprefix('torch.')}"


Case = Training | Translating

CASES: tuple[Case, ...] = (
    Training(torch.float32, 2.0, memory_goal=0.6, quick=True),
    Training(torch.bfloat16, 3.0, memory_goal=0.6),
    Training(torch.float32, 2.0, aligned=True, memory_goal=0.6),
    Training(torch.bfloat16, 3.0, aligned=True, memory_goal=0.6),
    Translating(torch.float32, quick=True),
    Translating(torch.bfloat16),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    dtype = str(case.dtype).removeprefix("torch.")
    return {"name": case.name, **asdict(case), "goals": case.goals, "dtype": dtype}


def flops(case: Case) -> float:
    """Return the operations of the matrix products of what is timed, without padding.

    A product takes 2 operations forward and 4 backward; the optimizer has none.
    """
    encoder, decoder = LAYERS * (4 * C**2 + 2 * C * D_FF), LAYERS * (6 * C**2 + 2 * C * D_FF)
    if isinstance(case, Translating):
        steps, rows = LONGEST + 1, SENTENCES * BEAM
        sources = [n for n, _ in LENGTHS[:SENTENCES]]
        memory = sum(sources) * (encoder + LAYERS * 2 * C**2) + 2 * C * LAYERS * sum(n * n for n in sources)
        seen = BEAM * steps * sum(sources) + rows * steps * (steps + 1) // 2
        return 2.0 * (memory + rows * steps * (decoder + V * C) + 2 * C * LAYERS * seen)
    source, target = torch.tensor(LENGTHS).T
    weights = source.sum() * (encoder + LAYERS * 2 * C**2) + target.sum() * (decoder + V * C)
    seen = (source * source + source * target).sum() + (target * (target + 1)).sum() // 2
    return 6.0 * int(weights + 2 * C * LAYERS * seen)


def unavailable(implementation: str) -> str | None:
    """Return why an implementation cannot run on this machine, or None."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves attention."""
    x, ends = torch.empty(1, 1, 64, dtype=case.dtype), torch.zeros(2, dtype=torch.int64)
    module = dispatch.choose("varlen_attention", "cpu", None, (x, x, x, ends, ends, 1))
    return module.__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Any]:
    """Return an implementation's step, on some copies."""
    if isinstance(case, Translating):
        return [_Search(case, implementation) for _ in range(copies)]
    return [Step(case, implementation, DROPOUT) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return errors against float64 without dropout, over the largest value.

    They are of loss and gradients on the first sentences; of a beam search, of the scores of what it found.
    """
    if isinstance(case, Translating):
        off = {}
        for name in dict.fromkeys((UNCACHED, *implementations)):
            said, exact = _Search(case, name).scores()
            off[name] = {"scores": distance(said, exact), "loss": 0.0}
        return checked(case.name, off, UNCACHED, implementations)
    exact_step = Step(case, EAGER, 0.0, torch.float64, count=COMPARED).results()
    distances = {}
    for name in dict.fromkeys((EAGER, *implementations)):
        reference = exact_step
        if name == UNSUPERVISED:
            reference = Step(Training(case.dtype, 1.0), EAGER, 0.0, torch.float64, count=COMPARED).results()
        results = Step(case, name, 0.0, count=COMPARED).results()
        distances[name] = {part: distance(results[part], values) for part, values in reference.items()}
    return checked(case.name, distances, EAGER, implementations)


def config(dropout: float) -> TransformerConfig:
    """Return the sizes of all models.

    Args:
        dropout: of embeddings and of what a layer adds.
    """
    layers = dict.fromkeys(("encoder_layers", "decoder_layers"), LAYERS)
    sizes = {**dict.fromkeys(("source_vocab", "target_vocab"), V), **layers}
    return TransformerConfig(**sizes, d_model=C, heads=H, d_ff=D_FF, dropout=dropout)


def sentences(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return random sources and targets, as many as asked for, with the lengths of `LENGTHS`."""
    generator = torch.Generator().manual_seed(1)
    sides: tuple[list[list[int]], list[list[int]]] = [], []
    for lengths in LENGTHS[:count]:
        for side, n in zip(sides, lengths, strict=True):
            side.append(torch.randint(4, V, (n - 1,), generator=generator).tolist())
    return sides


class Step:
    """A model with its batch of the first `count` sentences, and its optimizer."""

    def __init__(
        self,
        case: Training,
        implementation: str,
        dropout: float,
        dtype: torch.dtype = torch.float32,
        *,
        count: int = len(LENGTHS),
    ) -> None:
        torch.manual_seed(0)
        self.model = Transformer(config(dropout)).to(dtype).train()
        self.eager = implementation == EAGER
        self.half = case.dtype == torch.bfloat16 and dtype != torch.float64
        special = {name: getattr(self.model.config, name) for name in ("pad_id", "bos_id", "eos_id")}
        sources, targets = sentences(count)
        pairs = None
        if case.aligned and implementation != UNSUPERVISED:
            links = [(b, t, t % len(sources[b])) for b, row in enumerate(targets) for t in range(len(row))]
            pairs = torch.tensor(links)
        if self.eager:
            self.source = eager.padded([[*row, special["eos_id"]] for row in sources], special["pad_id"])
            self.target_in = eager.padded([[special["bos_id"], *row] for row in targets], special["pad_id"])
            self.target_out = eager.padded([[*row, special["eos_id"]] for row in targets], special["pad_id"])
            self.pairs = pairs
        else:
            self.batch = make_batch(sources, targets, **special, pairs=pairs)
        self.criterion = LabelSmoothedCrossEntropyWithAlignment(SMOOTHING, LAMBDA)
        parameters = self.model.parameters()
        # as people write it, with torch's defaults
        self.optimizer = (torch.optim.Adamax if self.eager else Adamax)(parameters, lr=2e-3)

    def step(self) -> None:
        """Train on the batch."""
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()

    def backward(self) -> Tensor:
        """Compute the gradients, and return the loss."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext():
            loss = self._eager_loss() if self.eager else self._our_loss()
        loss.backward()
        return loss.detach()

    def _our_loss(self) -> Tensor:
        batch = self.batch
        packings = (
            Packing(batch.source_cu, batch.source_longest),
            Packing(batch.target_cu, batch.target_longest),
        )
        found = self.model(
            *(batch.source, batch.target_in, *packings),
            criterion=self.criterion,
            target_out=batch.target_out,
            pairs=batch.pairs,
        )
        return found.loss / found.sample_size

    def _eager_loss(self) -> Tensor:
        model, pad = self.model, self.model.config.pad_id
        features, probabilities = eager.decode(
            model, self.target_in, eager.encode(model, self.source), self.source
        )
        logits = F.linear(features, model.output_weight)
        loss = eager.smoothed_loss(logits, self.target_out, pad, SMOOTHING)
        if self.pairs is not None:
            loss = loss + LAMBDA * eager.aligned_loss(probabilities, self.pairs, model.config.alignment_heads)
        return loss / (self.target_out != pad).sum()

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return the loss and the gradients, by name."""
        loss = self.backward()
        named = self.model.named_parameters()
        return {
            "loss": {"loss": loss},
            "gradients": {name: p.grad for name, p in named if p.grad is not None},
        }


class _Search:
    """A model with sentences to translate."""

    def __init__(self, case: Translating, implementation: str) -> None:
        torch.manual_seed(0)
        model = Transformer(config(0.0)).eval()
        self.half = case.dtype == torch.bfloat16
        self.model: Any = eager.Uncached(model) if implementation == UNCACHED else model
        sources, _ = sentences(SENTENCES)
        rows = [[*row, model.config.eos_id] for row in sources]
        self.source = eager.padded(rows, model.config.pad_id)
        self.lengths = torch.tensor([len(row) for row in rows])

    def step(self) -> list[Any]:
        """Translate, each sentence to the longest length."""
        with torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext():
            return beam_search(
                self.model, self.source, self.lengths, beam=BEAM, max_len_b=LONGEST, min_length=LONGEST
            )

    def scores(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the score of each sentence's best translation, and what float64 says of these."""
        best = [found[0] for found in self.step()]
        model: Transformer = getattr(self.model, "model", self.model)
        eos, bos = model.config.eos_id, model.config.bos_id
        tokens = torch.tensor([[bos, *hypothesis.tokens, eos] for hypothesis in best])
        right = eager.log_probabilities_of(model, self.source, tokens) / (LONGEST + 1)
        said = torch.tensor([hypothesis.score for hypothesis in best], dtype=torch.float64)
        return {"scores": said}, {"scores": right}


def memory(case: Case, implementation: str) -> float | None:
    """Return the megabytes that a training step takes at most beyond the model.

    None for what is not measured: a beam search, and the peer without alignments; and only on Linux.
    """
    if not isinstance(case, Training) or implementation not in (OURS, EAGER):
        return None
    return megabytes_in_a_process(__name__, CASES.index(case), implementation)


def main(index: str, implementation: str) -> None:
    """Print what `memory` returns for a case of CASES; for a process of its own."""
    torch.set_num_threads(1)
    case = CASES[int(index)]
    assert isinstance(case, Training)
    # loads the code of the libraries
    Step(case, implementation, DROPOUT, count=COMPARED).step()
    print(megabytes_of(Step(case, implementation, DROPOUT).step))


if __name__ == "__main__":
    main(*sys.argv[1:])
