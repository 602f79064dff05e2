"""Whole training steps of CS224N's assignment 5, and its block from tokens to latents, against eager code.

A pretraining step is forward, backward, clipping of the gradient's norm and AdamW, with dropout 0.1, on one
batch of biographies with a hole, which is read again in every step. The assignment pads each document to the
block; ours packs them, and the loading process would have done so: neither is part of a step. The eager model
computes attention with all scores in memory, the model "sdpa" has PyTorch's attention in that place, and
"compile" is the latter compiled. All but "eager float32" have the case's precision, bfloat16 by autocast.

The step of a block is forward and backward with respect to its input and its parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from nlpfast import dispatch
from nlpfast.data import birthplaces
from nlpfast.data.biographies import biographies
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.perceiver import DownProjectBlock
from nlpfast.nn.packing import Packing

from . import originals
from .compiled import unavailable
from .measure import Settings, check_errors

__all__ = ["unavailable"]

OP = "training"
OURS = "nlpfast"
# What the goals are against.
EAGER = "eager float32"
PEERS = (EAGER, "eager", "sdpa", "compile")
V, T, C, H, LAYERS, LATENTS = 256, 128, 256, 8, 4, 64
DOCUMENTS, FEW, B = 128, 16, 8
DROPOUT = 0.1
# Documents of which errors are taken.
COMPARED = 8
OPTIMIZER = SimpleNamespace(learning_rate=6e-3, betas=(0.9, 0.95), weight_decay=0.1)
LARGEST_NORM = 1.0


@dataclass(frozen=True)
class Pretraining:
    """A training step of one model.

    Attributes:
        model: vanilla or perceiver.
        dtype: float32, or bfloat16 by autocast.
        goal: how many times faster than "eager float32" ours must be.
        few: a batch of `FEW` documents instead of `DOCUMENTS`.
        quick: also part of the quick run.
    """

    model: str
    dtype: torch.dtype
    goal: float
    few: bool = False
    quick: bool = False
    best_goal: None = None
    # a step takes seconds
    rounds = (1, 3)

    @property
    def name(self) -> str:
        """The model, what is done with it, and the dtype."""
        words = f"{self.model} pretraining step {str(self.dtype).removeprefix('torch.')}"
        return f"{words}, {self.documents} documents" if self.few else words

    @property
    def documents(self) -> int:
        """The size of the batch."""
        return FEW if self.few else DOCUMENTS

    @property
    def peers(self) -> tuple[str, ...]:
        """Those of `PEERS` that it has: compiling takes a minute, so that there is one case of it."""
        others = ("eager",) if self.dtype == torch.bfloat16 else ()
        return (EAGER, *others, "sdpa", *(("compile",) if self.few else ()))


@dataclass(frozen=True)
class Block:
    """Forward and backward of the block from T tokens to m latents, in float32.

    Attributes:
        tokens: T.
        latents: m.
        goal: how many times faster than "eager float32" ours must be.
        quick: also part of the quick run.
    """

    tokens: int
    latents: int
    goal: float | None = None
    quick: bool = False
    best_goal: None = None
    dtype: torch.dtype = torch.float32
    peers = (EAGER,)

    @property
    def name(self) -> str:
        """The block and its sizes."""
        return f"down block, {self.tokens} tokens, {self.latents} latents"


Case = Pretraining | Block

CASES: tuple[Case, ...] = (
    Pretraining("vanilla", torch.float32, 2.0, few=True, quick=True),
    *(
        Pretraining(model, dtype, goal)
        for model in ("vanilla", "perceiver")
        for dtype, goal in ((torch.float32, 2.0), (torch.bfloat16, 3.0))
    ),
    Block(1024, 64, goal=10.0, quick=True),
    *(Block(tokens, m) for tokens, m in ((1024, 32), (512, 64), (512, 32), (128, 64), (128, 32))),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    return {"name": case.name, **asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}


def flops(case: Case) -> float:
    """Return the operations of the matrix products of a step, of what its result depends on.

    That is without padding, and without the keys that the mask hides from all latents; scores above the
    diagonal are counted. A product takes 2 operations forward and 4 backward; the optimizer has none.
    """
    if isinstance(case, Block):
        n = torch.full((B,), case.tokens)
        k = n.clamp(max=case.latents)
        weights, pairs = _down(k), (k * k).sum()
        return 6.0 * int(weights * C**2 + 2 * C * pairs)
    n = torch.tensor([len(targets) for _, targets in _unpadded(case.documents)])
    k = n.clamp(max=LATENTS)
    weights, pairs = 12 * LAYERS * n.sum(), LAYERS * (n * n).sum()
    if case.model == "perceiver":
        # query, projection and network of the tokens, and keys and values of the latents
        up = 10 * n.sum() + 2 * k.sum()
        weights = _down(k) + 12 * (LAYERS - 2) * k.sum() + up
        pairs = (LAYERS - 1) * (k * k).sum() + (n * k).sum()
    return 6.0 * int(weights * C**2 + n.sum() * V * C + 2 * C * pairs)


def _down(k: Tensor) -> Tensor:
    """Return rows times matrices C x C of the block to k latents: the batch shares the latents' queries."""
    return 11 * k.sum() + k.max()


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves attention."""
    packed = isinstance(case, Pretraining)
    x = torch.empty(*((1, 1) if packed else (1, 1, 1)), 8, dtype=case.dtype)
    ends = torch.zeros(2, dtype=torch.int64)
    op, further = ("varlen_attention", (ends, ends)) if packed else ("attention", (None, None, None))
    return dispatch.choose(op, "cpu", None, (x, x, x, *further)).__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[_Step]:
    """Return an implementation's step, on some copies."""
    return [_step(case, implementation, DROPOUT) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the errors against the eager code in float64, without dropout, over the largest value.

    Of a model they are those of the loss and of all gradients, of `COMPARED` documents; of a block those of
    its output and gradients. "compile" stands for itself before it is compiled, which takes a minute.
    """
    baseline = "eager" if case.dtype == torch.bfloat16 else EAGER
    exact = _step(case, EAGER, 0.0, torch.float64).results()
    found = {}
    for name in dict.fromkeys((baseline, *implementations)):
        results = _step(case, "sdpa" if name == "compile" else name, 0.0).results()
        found[name] = {part: distance(results[part], values) for part, values in exact.items()}
    return checked(case.name, found, baseline, implementations)


def checked(
    case: str, found: dict[str, dict[str, float]], baseline: str, implementations: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Return the errors of implementations; those of ours must not be larger than the baseline's."""
    if OURS in found:
        limits = dict(found[baseline])
        # a single number may be right by luck
        limits["loss"] = max(limits.values())
        check_errors(case, found[OURS], limits)
    return {name: found[name] for name in implementations}


def distance(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the largest difference of tensors by name, over the largest value."""
    if found.keys() != exact.keys():
        raise RuntimeError(f"there are {sorted(found)}, expected {sorted(exact)}")
    largest = max(y.abs().max().item() for y in exact.values())
    # torch's maximum is NaN where one of the numbers is
    differences = [(found[name].double() - y).abs().max() for name, y in exact.items()]
    return torch.stack(differences).max().item() / largest


def _config(latents: int, block_size: int, dropout: float, **changes: object) -> GPTConfig:
    """Return the sizes of both models; each reads its own part."""
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_layer": LAYERS, "n_head": H, "n_embd": C, "bottleneck_dim": latents}
    return GPTConfig(V, block_size, ignore_index=birthplaces.PAD_ID, **sizes, **rates, **changes)


def _documents(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return tokens and targets of the first documents, padded to the block."""
    texts = biographies(DOCUMENTS)
    data = birthplaces.CharCorruptionDataset(texts, birthplaces.corpus_vocabulary(texts), T)
    return [data[i] for i in range(count)]


def _unpadded(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the same up to the last target."""
    ends = ((y != birthplaces.PAD_ID).nonzero().max() + 1 for _, y in _documents(count))
    return [(x[:n], y[:n]) for (x, y), n in zip(_documents(count), ends, strict=True)]


def _step(case: Case, implementation: str, dropout: float, dtype: torch.dtype = torch.float32) -> _Step:
    kind = _PretrainingStep if isinstance(case, Pretraining) else _BlockStep
    return kind(case, implementation, dropout, dtype)


class _PretrainingStep:
    """A model with its batch and its optimizer; without dropout it has `COMPARED` documents."""

    def __init__(self, case: Pretraining, implementation: str, dropout: float, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        fused = implementation in ("sdpa", "compile")
        config = _config(LATENTS, T, dropout, perceiver=case.model == "perceiver", fused=fused)
        eager = originals.GPT(config)
        items = _documents(case.documents if dropout else COMPARED)
        self.model: nn.Module = eager
        if implementation == OURS:
            ours = GPT(config)
            ours.load_state_dict(eager.state_dict())
            *self.batch, ends, longest = birthplaces.packed(items)
            self.options = {"return_logits": False, "packing": Packing(ends, longest)}
            self.model, self.optimizer = ours, ours.configure_optimizers(OPTIMIZER)
        else:
            self.batch, self.options = [torch.stack(part) for part in zip(*items, strict=True)], {}
            groups = eager.parameter_groups(OPTIMIZER.weight_decay)
            self.optimizer = torch.optim.AdamW(groups, OPTIMIZER.learning_rate, OPTIMIZER.betas)
        self.model.to(dtype)
        self.half = case.dtype == torch.bfloat16 and implementation != EAGER
        self.forward = self.model
        if implementation == "compile":
            # or the functions of many cases share one cache, which is limited
            torch.compiler.reset()
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)

    def step(self) -> None:
        """Train on the batch."""
        self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()

    def backward(self) -> Tensor:
        """Compute the gradients, and return the loss."""
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.half else contextlib.nullcontext():
            loss: Tensor = self.forward(*self.batch, **self.options)[1]
        loss.backward()
        return loss.detach()

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return the loss and the gradients, by name."""
        return {"loss": {"loss": self.backward()}, "gradients": _gradients(self.model)}


class _BlockStep:
    """A block with its input and the gradient of its output."""

    def __init__(self, case: Block, implementation: str, dropout: float, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        x, grad = torch.randn(B, case.tokens, C), torch.randn(B, case.latents, C)
        config = _config(case.latents, case.tokens, dropout)
        self.model: nn.Module = originals.DownProjectBlock(config)
        if implementation == OURS:
            state = self.model.state_dict()
            self.model = DownProjectBlock(config)
            self.model.load_state_dict(state)
        self.model.to(dtype)
        self.x, self.grad = x.to(dtype).requires_grad_(), grad.to(dtype)

    def step(self) -> Tensor:
        """Compute the gradients, and return the output."""
        self.x.grad = None
        self.model.zero_grad()
        out: Tensor = self.model(self.x)
        out.backward(self.grad)
        return out.detach()

    def results(self) -> dict[str, dict[str, Tensor]]:
        """Return the output and the gradients, by name."""
        out = self.step()
        return {"out": {"out": out}, "gradients": {"x": self.x.grad, **_gradients(self.model)}}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


_Step = _PretrainingStep | _BlockStep
