"""A model's step before `nlpfast.accelerate(model)` and after: forward, or forward and backward.

Before is what users have: the eager classes of minGPT, CS224N and minBERT, nanoGPT's on PyTorch's own
attention, PyTorch's Transformer layers, and models of Hugging Face with "sdpa", their default. Each model has
two layers and random weights; with padding, every second sequence has half of the tokens.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import nlpfast
from nlpfast import dispatch

from . import originals
from .measure import Settings, check_errors

OP = "modules"
OURS = "after"
PEERS = ("before",)
B, T, C, H, LAYERS, V = 8, 128, 256, 8, 2, 1000
M = 32

# What a case's model is called with, and the model.
Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """One model in one use.

    Attributes:
        model: a name of `MODELS`.
        training: forward and backward with dropout 0.1, rather than forward alone.
        dtype: of weights and inputs.
        quick: also part of the quick run.
    """

    model: str
    training: bool
    dtype: torch.dtype = torch.float32
    quick: bool = False
    goal: None = None
    best_goal: None = None

    @property
    def name(self) -> str:
        """The model, what is done with it, and the dtype."""
        use = "training" if self.training else "inference"
        return f"{self.model} {use} {str(self.dtype).removeprefix('torch.')}"


def _stack(attention: Callable[[float], nn.Module], *others: Tensor) -> Callable[[float], Built]:
    def build(dropout: float) -> Built:
        layers = [originals.Layer(attention(dropout), C) for _ in range(LAYERS)]
        return _Chain(layers), (torch.randn(B, T, C), *others), {}

    return build


class _Chain(nn.Module):
    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *others)
        return x


class _Bottleneck(nn.Module):
    """The Perceiver of CS224N: T tokens down to M latents, and up again."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        config = _gpt(dropout)
        self.latents = nn.Parameter(torch.randn(1, M, C))
        self.down = originals.CausalCrossAttention(config)
        self.up = originals.CausalCrossAttention(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x, self.latents), x)


def _gpt(dropout: float, **changes: Any) -> SimpleNamespace:
    sizes = {"n_embd": C, "n_head": H, "block_size": T, "attn_pdrop": dropout, "resid_pdrop": dropout}
    return originals.gpt_config(**sizes, **changes)


def _bert(dropout: float) -> SimpleNamespace:
    return originals.bert_config(hidden_size=C, num_attention_heads=H, attention_probs_dropout_prob=dropout)


def _padding() -> Tensor:
    """Return [B, T], True where there is a token."""
    lengths = torch.tensor([T, T // 2]).repeat(B // 2)
    return torch.arange(T)[None] < lengths[:, None]


def _encoder(dropout: float) -> Built:
    layer = nn.TransformerEncoderLayer(C, H, 4 * C, dropout, batch_first=True)
    model = nn.TransformerEncoder(layer, LAYERS)
    return model, (torch.randn(B, T, C),), {"src_key_padding_mask": ~_padding()}


def _decoder(dropout: float) -> Built:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(C, H, 4 * C, dropout, batch_first=True), LAYERS)
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(T),
        "tgt_is_causal": True,
        "memory_key_padding_mask": ~_padding(),
    }
    return model, (torch.randn(B, T, C), torch.randn(B, T, C)), options


def _hugging_face(kind: str) -> Callable[[float], Built]:
    def build(dropout: float) -> Built:
        import transformers

        sizes = {
            "bert": {"hidden_size": C, "num_hidden_layers": LAYERS, "num_attention_heads": H},
            "gpt2": {"n_embd": C, "n_layer": LAYERS, "n_head": H, "n_positions": T},
            "bart": {"d_model": C, "max_position_embeddings": T},
            "t5": {"d_model": C, "d_kv": C // H, "num_layers": LAYERS, "num_heads": H, "d_ff": 4 * C},
        }[kind]
        if kind == "bert":
            sizes |= {"intermediate_size": 4 * C}
        if kind == "bart":
            for part in ("encoder", "decoder"):
                sizes |= {f"{part}_layers": LAYERS, f"{part}_attention_heads": H, f"{part}_ffn_dim": 4 * C}
        rates = {
            "bert": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
            "gpt2": ("embd_pdrop", "resid_pdrop", "attn_pdrop"),
            "bart": ("dropout", "attention_dropout"),
            "t5": ("dropout_rate",),
        }[kind]
        config_class, model_class = {
            "bert": (transformers.BertConfig, transformers.BertModel),
            "gpt2": (transformers.GPT2Config, transformers.GPT2Model),
            "bart": (transformers.BartConfig, transformers.BartModel),
            "t5": (transformers.T5Config, transformers.T5Model),
        }[kind]
        config = config_class(
            vocab_size=V,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
            **sizes,
            **dict.fromkeys(rates, dropout),
        )
        options = {"attention_mask": _padding().long(), "input_ids": torch.randint(3, V, (B, T))}
        if kind in ("bart", "t5"):
            options["decoder_input_ids"] = torch.randint(3, V, (B, T))
        return model_class(config), (), options

    return build


def _padded_bert(dropout: float) -> Built:
    mask = torch.zeros(B, 1, 1, T).masked_fill(~_padding()[:, None, None], -10000.0)
    return _stack(lambda p: originals.BertSelfAttention(_bert(p)), mask)(dropout)


MODELS: dict[str, Callable[[float], Built]] = {
    "minGPT": _stack(lambda p: originals.CausalSelfAttention(_gpt(p))),
    "nanoGPT": _stack(lambda p: originals.Packed(_gpt(p, fused=True))),
    "CS224N bottleneck": lambda p: (_Bottleneck(p), (torch.randn(B, T, C),), {}),
    "minBERT": _padded_bert,
    "nn.TransformerEncoder": _encoder,
    "nn.TransformerDecoder": _decoder,
    "transformers BERT": _hugging_face("bert"),
    "transformers GPT-2": _hugging_face("gpt2"),
    "transformers BART": _hugging_face("bart"),
    "transformers T5": _hugging_face("t5"),
}
CASES = (
    *(Case(name, training, quick=name == "minGPT") for name in MODELS for training in (True, False)),
    *(Case(name, True, torch.bfloat16) for name in MODELS),
)


def describe(case: Case) -> dict[str, object]:
    """Return the case as plain data."""
    return {"name": case.name, **asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}


def flops(case: Case) -> float:
    """Return the operations of the matrix products of a step, attention without the savings of a mask."""
    # in training mode, since PyTorch's fused inference is not counted
    step = _Step(replace(case, training=True), "before", 0.0)
    with FlopCounterMode(display=False) as counter:
        if case.training:
            step.step()
        else:
            step.output()
    return counter.get_total_flops()


def unavailable(implementation: str) -> str | None:
    """Return None: what cannot run is left out of the cases."""
    return None


def chosen(case: Case, settings: Settings) -> str:
    """Return the name of the backend that serves attention."""
    x = torch.empty(1, 1, 1, 8, dtype=case.dtype)
    return dispatch.choose("attention", "cpu", None, (x, x, x, None, None, None)).__name__.rpartition(".")[2]


def passes(case: Case, implementation: str, settings: Settings, copies: int) -> list[_Step]:
    """Return the model's step, on some copies."""
    return [_Step(case, implementation, 0.1 if case.training else 0.0) for _ in range(copies)]


def errors(case: Case, implementations: Sequence[str], settings: Settings) -> dict[str, dict[str, float]]:
    """Return the errors of output and gradients against float64, without dropout, over the largest value."""
    exact = _Step(case, "before", 0.0, torch.float64).results()
    found = {}
    for name in implementations:
        results = _Step(case, name, 0.0).results()
        found[name] = {key: _distance(x, exact[key]) for key, x in results.items()}
    check_errors(case.name, found[OURS], found["before"])
    return found


def _distance(found: list[Tensor], exact: list[Tensor]) -> float:
    largest = max(y.abs().max().item() for y in exact)
    return max((x.double() - y).abs().max().item() for x, y in zip(found, exact, strict=True)) / largest


class _Step:
    """A model with its inputs, before or after the switch."""

    def __init__(self, case: Case, implementation: str, dropout: float, dtype: torch.dtype | None = None):
        torch.manual_seed(0)
        model, inputs, options = MODELS[case.model](dropout)
        self.model = model.to(dtype or case.dtype).train(case.training)
        self.inputs = [_cast(x, dtype or case.dtype) for x in inputs]
        self.options = {name: _cast(x, dtype or case.dtype) for name, x in options.items()}
        self.training = case.training
        if implementation == OURS:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                nlpfast.accelerate(self.model)
            if "->" not in said.getvalue() or "not switched" in said.getvalue():
                raise RuntimeError(f"{case.name}: {said.getvalue()}")

    def step(self) -> None:
        """Run forward, and in training backward."""
        with torch.set_grad_enabled(self.training):
            out = self.output()
        if self.training:
            for p in self.model.parameters():
                p.grad = None
            out.float().square().mean().backward()

    def results(self) -> dict[str, list[Tensor]]:
        """Return the output, but that of padding, and the gradients."""
        with torch.no_grad():
            out = self.output()
        padded = {"attention_mask", "src_key_padding_mask"} & set(self.options)
        if padded and "decoder_input_ids" not in self.options:
            out = out[_padding()]
        if not self.training:
            return {"out": [out]}
        self.step()
        return {"out": [out], "gradients": [p.grad for p in self.model.parameters() if p.grad is not None]}

    def output(self) -> Tensor:
        """Run forward."""
        out = self.model(*self.inputs, **self.options)
        return out if isinstance(out, Tensor) else out[0]


def _cast(x: Any, dtype: torch.dtype) -> Any:
    return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


if find_spec("transformers") is None:
    CASES = tuple(case for case in CASES if not case.model.startswith("transformers"))
