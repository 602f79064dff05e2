"""A training step of BERT on sentences as long as those of SST and Quora: packed, padded, and transformers'.

The sentences have random pieces. Their lengths are 16 quantiles each of the training sentences of SST-5 and
of Quora's questions, in pieces of a vocabulary of 26,660 that was made of both (WordPiece, lower case), with
[CLS] and [SEP].
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nlpfast import dispatch
from nlpfast.data.packed_sentences import pack_sentences
from nlpfast.data.sentences import SST
from nlpfast.models.bert import BertConfig
from nlpfast.models.bert_sentences import BertForSentences
from nlpfast.nn.packing import Packing

from .bench_training import checked, distance
from .measure import Settings
from .process_memory import megabytes_in_a_process, megabytes_of

OP = "bert"
OURS = "nlpfast"
# What the goal is against is the same model on the padded batch.
PADDED, TRANSFORMERS = "padded", "transformers"
PEERS = (PADDED, TRANSFORMERS)
DROPOUT = 0.1
SST_LENGTHS = (5, 8, 10, 12, 14, 16, 18, 20, 21, 23, 25, 27, 30, 33, 37, 44)
QUORA_LENGTHS = (6, 7, 8, 8, 9, 10, 10, 11, 12, 12, 13, 15, 16, 18, 22, 30)
LENGTHS = SST_LENGTHS + QUORA_LENGTHS
CLASSES = 5
LAYERS, C = 4, 512
V = 30522
OPTIMIZER = SimpleNamespace(learning_rate=2e-5, betas=(0.9, 0.999), weight_decay=0.01)
LARGEST_NORM = 1.0
Goals = dict[str, float]


@dataclass(frozen=True)
class Case:
    """A training step of a classifier on 32 sentences.

    Attributes:
        dtype: float32, or bfloat16 by autocast.
        goal: how many times faster than on the padded batch ours must be.
        goals: the same, against other peers.
        memory_goal: the share of the memory of `memory_peer` that ours may take.
        quick: also part of the quick run.
    """

    dtype: torch.dtype
    goal: float = 1.4
    quick: bool = False
    best_goal: None = None
    goals: Goals = field(default_factory=lambda: {TRANSFORMERS: 2.0})
    memory_goal: float = 0.6
    memory_peer: str = TRANSFORMERS
    # a step takes seconds
    rounds = (1, 3)

    @property
    def name(self) -> str:
        """What is trained, and the dtype."""
        return f"step on 32 sentences, {str(self.dtype).removeprefix('torch.')}"


CASES = (Case(torch.float32, quick=True), Case(torch.bfloat16))


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    return {"name": case.name, **asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}


def flops(case: Case) -> float:
    """Return the operations of the matrix products of a step, without padding.

    A product takes 2 operations forward and 4 backward; the optimizer has none.
    """
    n = torch.tensor(LENGTHS)
    weights = 12 * LAYERS * n.sum() * C**2 + len(n) * C**2
    return 6.0 * int(weights + 2 * C * LAYERS * (n * n).sum())


def unavailable(implementation: str) -> str | None:
    """Return why an implementation cannot run on this machine, or None."""
    if implementation == TRANSFORMERS and importlib.util.find_spec("transformers") is None:
        return "transformers is not installed: pip install 'nlpfast[hf]'"
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves attention."""
    x, ends = torch.empty(1, 1, 64, dtype=case.dtype), torch.zeros(2, dtype=torch.int64)
    module = dispatch.choose("varlen_attention", "cpu", None, (x, x, x, ends, ends, 1))
    return module.__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[Step]:
    """Return an implementation's step, on some copies."""
    return [Step(case, implementation, DROPOUT) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the errors of loss and gradients against float64 on the padded batch, without dropout.

    They are over the largest value.
    """
    exact = Step(case, PADDED, 0.0, torch.float64).results()
    found = {}
    for name in dict.fromkeys((PADDED, *implementations)):
        results = Step(case, name, 0.0).results()
        found[name] = {part: distance(results[part], values) for part, values in exact.items()}
    return checked(case.name, found, PADDED, implementations)


def config(dropout: float) -> BertConfig:
    """Return the sizes of all models.

    Args:
        dropout: of hidden states and attention.
    """
    return BertConfig(
        vocab_size=V,
        hidden_size=C,
        num_hidden_layers=LAYERS,
        num_attention_heads=C // 64,
        intermediate_size=4 * C,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


class Step:
    """A model with its batch and its optimizer."""

    def __init__(
        self, case: Case, implementation: str, dropout: float, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        ours = BertForSentences(config(dropout), [SST])
        generator = torch.Generator().manual_seed(1)
        rows = [torch.randint(5, V, (n,), generator=generator).tolist() for n in LENGTHS]
        self.labels = torch.randint(0, CLASSES, (len(rows),), generator=generator)
        self.model: nn.Module = ours
        self.packed = implementation not in (PADDED, TRANSFORMERS)
        self.theirs = implementation == TRANSFORMERS
        packed = pack_sentences(rows)
        self.ids, self.packing = packed.input_ids, Packing(packed.cu_seqlens, packed.longest)
        if not self.packed:
            longest = max(LENGTHS)
            self.ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
            self.mask = (self.ids != 0).long()
        if self.theirs:
            self.model = _transformers(ours)
        self.optimizer = ours.configure_optimizers(OPTIMIZER)
        if self.theirs:
            # as people write it, with torch's defaults
            kept = [p for n, p in self.model.named_parameters() if n.endswith("bias") or "LayerNorm" in n]
            decayed = [p for p in self.model.parameters() if not any(p is other for other in kept)]
            parts = [{"params": decayed, "weight_decay": 0.01}, {"params": kept, "weight_decay": 0.0}]
            self.optimizer = torch.optim.AdamW(parts, OPTIMIZER.learning_rate, OPTIMIZER.betas)
        self.model.to(dtype).train()
        self.half = case.dtype == torch.bfloat16 and dtype != torch.float64

    def step(self) -> None:
        """Train on the batch."""
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()

    def backward(self) -> Tensor:
        """Compute the gradients, and return the loss."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(self._logits(), self.labels)
        loss.backward()
        return loss.detach()

    def _logits(self) -> Tensor:
        if self.theirs:
            return self.model(self.ids, attention_mask=self.mask).logits
        if self.packed:
            return self.model(self.ids, [(SST.name, len(LENGTHS))], packing=self.packing)[0]
        # the padded way through the same modules
        pooled = self.model.bert(self.ids, self.mask).pooler_output
        return self.model.heads[SST.name](self.model.dropout(pooled))

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return the loss and the gradients, by the names of ours."""
        loss = self.backward()
        named = self.model.named_parameters()
        found = {n.replace("classifier.", "heads.sst."): p.grad for n, p in named if p.grad is not None}
        return {"loss": {"loss": loss}, "gradients": found}


def _transformers(ours: BertForSentences) -> nn.Module:
    """Return transformers' classifier with PyTorch's attention, and the same weights."""
    import transformers

    fields = {key: value for key, value in ours.config.to_dict().items() if key != "model_type"}
    settings = transformers.BertConfig(**fields, num_labels=CLASSES, attn_implementation="sdpa")
    model = transformers.BertForSequenceClassification(settings)
    state = {name.replace("heads.sst.", "classifier."): w for name, w in ours.state_dict().items()}
    model.load_state_dict(state)
    return model


def memory(case: Case, implementation: str) -> float | None:
    """Return the megabytes that a step takes at most beyond the model and its batch; only on Linux."""
    return megabytes_in_a_process(__name__, CASES.index(case), implementation)


def main(index: str, implementation: str) -> None:
    """Print what `memory` returns for a case of CASES; for a process of its own."""
    torch.set_num_threads(1)
    step = Step(CASES[int(index)], implementation, DROPOUT)
    # loads the code of the libraries, and makes the optimizer's state
    for parameter in step.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step.optimizer.step()
    step.optimizer.zero_grad()
    print(megabytes_of(step.step))


if __name__ == "__main__":
    main(*sys.argv[1:])
