"""Training steps of CS224N's assignment 5, and of its block from tokens to latents: ours and eager code.

What they are is said at `benchmarks.bench_training`, which times them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nlpfast.data import birthplaces
from nlpfast.data.biographies import biographies
from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.perceiver import DownProjectBlock
from nlpfast.nn.joined import joined_on
from nlpfast.nn.packing import Packing

from . import originals

OURS = "nlpfast"
# With operations joined also where modules leave them to PyTorch, as on GPUs.
JOINED = "nlpfast, joined"
# What the goals are against.
EAGER = "eager float32"
PEERS = (EAGER, "eager", "sdpa", "compile")
V, T, C, H, LAYERS, LATENTS = 256, 128, 256, 8, 4, 64
DOCUMENTS, FEW, B = 128, 16, 8
DROPOUT = 0.1
Goals = dict[str, float]
# Documents of a step without dropout, of which errors are taken.
COMPARED = 8
OPTIMIZER = SimpleNamespace(learning_rate=6e-3, betas=(0.9, 0.95), weight_decay=0.1)
LARGEST_NORM = 1.0


@dataclass(frozen=True)
class Pretraining:
    """A training step of one model.

    Attributes:
        model: vanilla or perceiver.
        dtype: float32, or bfloat16 by autocast.
        goal: how many times faster than "eager float32" ours must be; None where that is no peer.
        goals: as `goal`, against other peers.
        memory_goal: the share of the memory of `memory_peer` that ours may take.
        few: a batch of `FEW` documents instead of `DOCUMENTS`.
        quick: also part of the quick run.
    """

    model: str
    dtype: torch.dtype
    goal: float | None
    few: bool = False
    quick: bool = False
    best_goal: None = None
    goals: Goals = field(default_factory=lambda: {"compile": 2.0})
    memory_goal: float = 0.6
    memory_peer: str = EAGER
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
        """Those of `PEERS` that it has: compiling takes a minute, so that small batches alone have it."""
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


def _config(latents: int, block_size: int, dropout: float, **changes: object) -> GPTConfig:
    """Return the sizes of both models; each reads its own part."""
    rates = dict.fromkeys(("embd_pdrop", "resid_pdrop", "attn_pdrop"), dropout)
    sizes = {"n_layer": LAYERS, "n_head": H, "n_embd": C, "bottleneck_dim": latents}
    return GPTConfig(V, block_size, ignore_index=birthplaces.PAD_ID, **sizes, **rates, **changes)


def documents(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return tokens and targets of the first documents, padded to the block."""
    texts = biographies(DOCUMENTS)
    data = birthplaces.CharCorruptionDataset(texts, birthplaces.corpus_vocabulary(texts), T)
    return [data[i] for i in range(count)]


def unpadded(count: int) -> list[tuple[Tensor, Tensor]]:
    """Return the same up to the last target."""
    ends = ((y != birthplaces.PAD_ID).nonzero().max() + 1 for _, y in documents(count))
    return [(x[:n], y[:n]) for (x, y), n in zip(documents(count), ends, strict=True)]


def step_of(
    case: Case,
    implementation: str,
    dropout: float,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Step:
    """Return an implementation's step of a case; `dropout` is of everything, `dtype` of the parameters."""
    if isinstance(case, Pretraining):
        return PretrainingStep(case, implementation, dropout, dtype, device=device)
    return _BlockStep(case, implementation, dropout, dtype)


class PretrainingStep:
    """A model with its batch and its optimizer.

    Attributes:
        model: ours, or the eager one.
        optimizer: of its parameters.
    """

    def __init__(
        self,
        case: Pretraining,
        implementation: str,
        dropout: float,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """Build the model, the same for every implementation, and read the first documents.

        Args:
            case: what is trained; without dropout its batch is of `COMPARED` documents.
            implementation: OURS, JOINED, or one of `PEERS`.
            dropout: of everything.
            dtype: of the parameters.
            seed: of the parameters.
            device: where it trains.
        """
        torch.manual_seed(seed)
        self.device = torch.device(device)
        fused = implementation in ("sdpa", "compile")
        config = _config(LATENTS, T, dropout, perceiver=case.model == "perceiver", fused=fused)
        eager = originals.GPT(config)
        self.model: nn.Module = eager
        on_gpu = self.device.type != "cpu"
        if implementation in (OURS, JOINED):
            ours = GPT(config)
            ours.load_state_dict(eager.state_dict())
            self.model = ours.to(self.device, dtype)
            self.optimizer = ours.configure_optimizers(OPTIMIZER)
        else:
            groups = eager.to(self.device, dtype).parameter_groups(OPTIMIZER.weight_decay)
            # as the assignment has it, but that the strongest peers on a GPU have the fastest
            fast = True if fused and on_gpu else None
            self.optimizer = torch.optim.AdamW(groups, OPTIMIZER.learning_rate, OPTIMIZER.betas, fused=fast)
        for group in self.optimizer.param_groups:
            group["capturable"] = on_gpu
        self.joined = implementation == JOINED
        self.half = case.dtype == torch.bfloat16 and implementation != EAGER
        self.forward = self.model
        if implementation == "compile":
            # or the functions of many cases share one cache, which is limited
            torch.compiler.reset()
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        self.read(documents(case.documents if dropout else COMPARED))

    def read(self, items: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Take other documents, tokens and targets padded to the block, for the steps that follow."""
        self.options: dict[str, Any] = {}
        if isinstance(self.model, GPT):
            *batch, ends, longest = birthplaces.packed(items)
            self.options = {"return_logits": False, "packing": Packing(ends.to(self.device), longest)}
        else:
            batch = [torch.stack(part) for part in zip(*items, strict=True)]
        self.batch = [part.to(self.device) for part in batch]

    def step(self) -> Tensor:
        """Train on the batch, and return the loss before the step."""
        loss = self.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_NORM)
        self.optimizer.step()
        return loss

    def backward(self) -> Tensor:
        """Compute the gradients, and return the loss."""
        self.optimizer.zero_grad()
        with contextlib.ExitStack() as stack:
            if self.half:
                stack.enter_context(torch.autocast(self.device.type, torch.bfloat16))
            if self.joined:
                stack.enter_context(joined_on(self.device.type))
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


Step = PretrainingStep | _BlockStep
