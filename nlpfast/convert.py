"""Switch a model's attention to nlpfast in place, and back.

A module is switched by giving it another class: parameters, buffers, hooks, names and the state dict stay
what they are, and so does every reference to the module. What is switched: ``torch.nn.MultiheadAttention``;
classes named as those of minGPT, nanoGPT, CS224N and minBERT, if a trial call gives the same result; and
models of Hugging Face, through their ``attn_implementation``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nlpfast import hf
from nlpfast.nn import (
    BertSelfAttention,
    CausalCrossAttention,
    CausalSelfAttention,
    MultiheadAttention,
    PackedCausalSelfAttention,
)

# Where a switched module keeps its class, or its attention implementation, for `undo`.
_BEFORE = "_nlpfast_before"
# Largest difference in a trial call, as a part of the largest result.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class _Known(NamedTuple):
    """A class of ours, and how the modules that it replaces are built."""

    ours: type[nn.Module]
    children: tuple[str, ...]
    dropout: str
    heads: str


# By the name of the class; the first whose children are all there is tried.
_KNOWN: dict[str, tuple[_Known, ...]] = {
    "CausalSelfAttention": (
        _Known(CausalSelfAttention, ("key", "query", "value", "proj", "resid_drop"), "attn_drop", "n_head"),
        _Known(PackedCausalSelfAttention, ("c_attn", "c_proj", "resid_dropout"), "attn_dropout", "n_head"),
    ),
    "CausalCrossAttention": (
        _Known(CausalCrossAttention, ("key", "query", "value", "proj", "resid_drop"), "attn_drop", "n_head"),
    ),
    "BertSelfAttention": (
        _Known(BertSelfAttention, ("key", "query", "value"), "dropout", "num_attention_heads"),
    ),
}


class _Change(NamedTuple):
    """One module, and what it became; or why it stayed as it was."""

    name: str
    before: str
    after: str
    refusal: str | None = None


def accelerate(model: nn.Module) -> nn.Module:
    """Switch the attention that nlpfast knows to its kernels, in place, and print what was switched.

    What was recognised and stays as it is, is printed with the reason. Parameters are neither copied nor
    renamed, so optimizers and checkpoints go on as before. Call it before ``torch.compile``.

    Args:
        model: any module; also one that was accelerated before.

    Returns:
        The same model; ``undo(model)`` makes it what it was.
    """
    changes = [*_switch_hugging_face(model), *_switch_modules(model)]
    print("\n".join(_report(changes)))
    return model


def undo(model: nn.Module) -> nn.Module:
    """Give every module that `accelerate` switched its class back, and print how many there were.

    Args:
        model: a model, or part of one, or a copy, that was accelerated.

    Returns:
        The same model; with the same weights its outputs are those from before, bit for bit.
    """
    count = 0
    for module in model.modules():
        before = module.__dict__.pop(_BEFORE, None)
        if before is None:
            continue
        count += 1
        if isinstance(before, str):
            # the outermost model comes first, so that what its parts had is set after it
            module.set_attn_implementation(before)  # type: ignore[operator]
        else:
            module.__dict__.pop("return_tuple", None)
            module.__class__ = before
    print(f"nlpfast: {count} switched back")
    return model


def _report(changes: list[_Change]) -> Iterator[str]:
    """Yield one line for each kind of change, then one for each kind that was not made."""
    groups: dict[tuple[str, str, str | None], list[str]] = {}
    for change in changes:
        groups.setdefault(change[1:], []).append(change.name or "the model itself")
    if not groups:
        yield "nlpfast: nothing to switch"
    for (before, after, refusal), names in sorted(groups.items(), key=lambda item: item[0][2] is not None):
        where = ", ".join(names if len(names) < 4 else [*names[:2], f"and {len(names) - 2} more"])
        if refusal is None:
            yield f"nlpfast: {len(names)} x {before} -> {after} ({where})"
        else:
            yield f"nlpfast: not switched: {len(names)} x {before} ({where}): {refusal}"


def _switch_hugging_face(model: nn.Module) -> Iterator[_Change]:
    """Set the attention implementation of every model of Hugging Face within this one."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return
    parts = {n: m for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel)}
    before = {name: str(part.config._attn_implementation) for name, part in parts.items()}
    if parts:
        hf.register()
    for name, part in parts.items():
        if before[name] == hf.NAME:
            continue
        refusal = None
        try:
            part.set_attn_implementation(hf.NAME)
        except ValueError as error:
            refusal = str(error)
        if refusal is None and part.config._attn_implementation != hf.NAME:
            refusal = "it does not use the attention interface of transformers"
        if refusal is None:
            part.__dict__[_BEFORE] = before[name]
        yield _Change(name, f"{type(part).__name__}, {before[name]}", hf.NAME, refusal)


def _switch_modules(model: nn.Module) -> Iterator[_Change]:
    """Give every known module the class of ours that computes the same."""
    for name, module in model.named_modules():
        before = type(module)
        ours: type[nn.Module]
        if before is nn.MultiheadAttention:
            assert isinstance(module, nn.MultiheadAttention)
            ours, refusal = MultiheadAttention, None
            if module.bias_k is not None or module.add_zero_attn:
                refusal = "add_bias_kv and add_zero_attn are computed by PyTorch alone"
        elif before.__name__ in _KNOWN and not _is_served(module):
            built = [k for k in _KNOWN[before.__name__] if all(hasattr(module, c) for c in k.children)]
            ours = (built or _KNOWN[before.__name__])[0].ours
            refusal = _refusal(module, built[0]) if built else "it has other layers than that class should"
        else:
            continue
        if refusal is None:
            module.__dict__[_BEFORE] = before
            _become(module, ours)
        yield _Change(
            name, f"{before.__module__}.{before.__qualname__}", f"nlpfast.nn.{ours.__name__}", refusal
        )


def _is_served(module: nn.Module) -> bool:
    """Return whether the module is one of ours, or of Hugging Face, whose models are switched as a whole."""
    ours = tuple(known.ours for each in _KNOWN.values() for known in each)
    return isinstance(module, ours) or type(module).__module__.startswith("transformers.")


def _become(module: nn.Module, ours: type[nn.Module]) -> None:
    """Make the module one of ours, with the interface that it had."""
    if ours is BertSelfAttention and not hasattr(module, "transform"):
        module.__dict__["return_tuple"] = True
    module.__class__ = ours


def _refusal(module: nn.Module, known: _Known) -> str | None:
    """Return why the class of ours cannot stand in for this module, or None."""
    own = {name for name, value in vars(type(module)).items() if inspect.isfunction(value)}
    # what Hugging Face's own class has for itself
    unknown = (
        {name for name in own if not name.startswith("_")} - set(dir(known.ours)) - {"transpose_for_scores"}
    )
    if unknown:
        return f"it has methods that nlpfast.nn.{known.ours.__name__} lacks: {', '.join(sorted(unknown))}"
    if not isinstance(getattr(module, known.dropout, None), nn.Dropout) or not hasattr(module, known.heads):
        return f"it lacks the layer {known.dropout} or the number {known.heads}"
    before, modes = type(module), {part: part.training for part in module.modules()}
    devices = {x.device for x in module.parameters() if x.device.type != "cpu"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices, device_type=_device_type(devices)):
            return _trial(module, known)
    except Exception as error:
        return f"a trial call failed: {error}"
    finally:
        module.__class__ = before
        module.__dict__.pop("return_tuple", None)
        for part, training in modes.items():
            part.training = training


def _device_type(devices: set[torch.device]) -> str:
    return next((device.type for device in devices), "cuda")


def _trial(module: nn.Module, known: _Known) -> str | None:
    """Call the module as it is and as one of ours; return how the results differ, or None."""
    inputs = _trial_inputs(module, known)
    dropout = getattr(module, known.dropout)
    module.eval()
    expected = _first(module.forward(*inputs))
    if dropout.p > 0.0:
        dropout.train()
        module.training = True
        if torch.equal(_first(module.forward(*inputs)), expected):
            return f"it does not apply its {known.dropout}, p={dropout.p}: set p=0 there first"
        module.eval()
    _become(module, known.ours)
    found = _first(module.forward(*inputs))
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return f"it returns {list(expected.shape)} {expected.dtype}, not {list(found.shape)} {found.dtype}"
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    if not error <= _TOLERANCE[found.dtype]:
        return f"a trial call gives another result: it differs by {error:.1e} of the largest value"
    return None


def _trial_inputs(module: nn.Module, known: _Known) -> tuple[Tensor, ...]:
    """Return random arguments of the module's forward, small enough for any mask that it holds."""
    weight = next(module.parameters())
    C = weight.shape[1]
    T = min([5, *(x.shape[-1] for x in module.buffers() if x.dim() == 4)])

    def sequence(batch: int, length: int) -> Tensor:
        return torch.randn(batch, length, C, dtype=weight.dtype, device=weight.device)

    if known.ours is CausalCrossAttention:
        return sequence(2, T), sequence(1, max(1, T - 2))
    x = sequence(2, T)
    if known.ours is not BertSelfAttention:
        return (x,)
    mask = torch.zeros(2, 1, 1, T, dtype=weight.dtype, device=weight.device)
    mask[1, ..., T // 2 :] = -10000.0
    return x, mask


def _first(result: Any) -> Tensor:
    """Return the output, of a module that returns other things with it too."""
    return result[0] if isinstance(result, tuple) else result
