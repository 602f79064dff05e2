"""Hugging Face transformers: ``attn_implementation="nlpfast"``.

Shapes: B batch, L query length, S key length, H heads, Hk key heads, D head size.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from nlpfast.ops.attention import attention

NAME = "nlpfast"

# What models pass along to every attention function and what does not change its result.
_HARMLESS = frozenset(
    {
        *("cache_position", "position_ids", "past_key_values", "use_cache", "num_items_in_batch"),
        *("output_hidden_states", "output_router_logits", "return_dict", "deterministic"),
    }
)
# They say which rows of a batch belong together; masks made from position_ids say the same.
_PACKED = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"})


class Recording:
    """What the latest call of a watched layer computed its attention from; see `recording`.

    Attributes:
        query: [B, H, L, D].
        key: [B, Hk, S, D].
        lse: [B, H, L], float32.
        scale: the factor of the scores.
    """

    query: Tensor
    key: Tensor
    lse: Tensor
    scale: float


_watched: WeakKeyDictionary[nn.Module, Recording] = WeakKeyDictionary()


@contextlib.contextmanager
def recording(layer: nn.Module) -> Iterator[Recording]:
    """Keep what word alignments, or their loss, are computed from, without switching a model to eager.

    Example::

        with nlpfast.hf.recording(model.model.decoder.layers[-1].encoder_attn) as seen:
            model(input_ids=source, labels=target)
        nlpfast.hard_alignment(seen.query, seen.key, seen.lse, scale=seen.scale, source_lengths=lengths)

    The tensors are those of the layer's latest call inside the context, with their history for autograd, so
    that ``alignment_loss`` supervises the model. Call the model on a whole target for that: `generate` calls
    the layer for one token at a time.

    Args:
        layer: the attention module of a model whose implementation is "nlpfast".

    Raises:
        NotImplementedError: where the layer is called with a bias, of which query and key do not know.
    """
    if layer in _watched:
        raise ValueError("this layer is being recorded: leave that context first")
    _watched[layer] = Recording()
    try:
        yield _watched[layer]
    finally:
        del _watched[layer]


def register() -> None:
    """Make ``attn_implementation="nlpfast"`` known to transformers: the attention and its masks.

    Equivalent: the implementation "sdpa" of transformers, on the kernels of this package::

        nlpfast.hf.register()
        model = AutoModel.from_pretrained(folder, attn_implementation="nlpfast")
        model.set_attn_implementation("nlpfast")  # a model that is there already

    Masks are those of "sdpa": boolean, and none where being causal says it all. Rows without a visible key,
    which only padding has, give 0. Calling this twice changes nothing.

    Raises:
        ImportError: if transformers is not installed or older than 4.56; says how to install it.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"nlpfast.hf needs transformers 4.56 or later: pip install 'nlpfast[hf]' ({error})"
        ) from error
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers asks for it.

    Args:
        module: the layer that asks; its ``is_causal`` counts where the argument is None.
        query: [B, H, L, D].
        key: [B, Hk, S, D], Hk a divisor of H.
        value: [B, Hk, S, Dv].
        attention_mask: broadcastable to [B, H, L, S], True = attend, or added to the scores; None: all keys,
            or those up to the query's own position if the layer is causal and L > 1.
        dropout: probability of dropping an attention weight.
        scaling: factor of Q Kᵀ; ``1 / sqrt(D)`` if None.
        is_causal: hide later keys where there is no mask.
        position_bias: [1 or B, H, L, S], added to the scores (T5); it may require grad.
        s_aux: [H], scores of a key whose value is 0 (attention sinks, gpt-oss); it may require grad.
        sliding_window: number of keys that a query sees; the mask says which.
        options: whatever else the model passes.

    Returns:
        The output [B, L, H, Dv], and None in the place of attention weights.

    Raises:
        NotImplementedError: for an option that changes the result and is not served, such as ``softcap``;
            names it.
    """
    _refuse_unserved(options, attention_mask, sliding_window, key)
    L = query.shape[2]
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    is_causal = is_causal and attention_mask is None and L > 1
    if position_bias is not None:
        attention_mask = _with_bias(attention_mask, position_bias)
    grouped = key.shape[1] != query.shape[1]
    seen = _watched.get(module)
    if s_aux is None and seen is None:
        out = attention(query, key, value, attention_mask, dropout, is_causal, scaling, grouped)
    else:
        out, lse = attention(
            query, key, value, attention_mask, dropout, is_causal, scaling, grouped, return_lse=True
        )
    if seen is not None:
        if s_aux is not None or (attention_mask is not None and attention_mask.dtype != torch.bool):
            raise _unserved("a bias", "cannot be recorded")
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        seen.query, seen.key, seen.lse, seen.scale = query, key, lse, scale
    if s_aux is not None:
        # softmax over the keys and the sink is softmax over the keys times the keys' share of the mass
        share = torch.sigmoid(lse - s_aux.reshape(1, -1, 1).to(lse.dtype))
        out = out * share.unsqueeze(-1).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _with_bias(attention_mask: Tensor | None, position_bias: Tensor) -> Tensor:
    """Return the bias, with -inf where a boolean mask hides, or plus a floating one."""
    if attention_mask is None:
        return position_bias
    if attention_mask.dtype == torch.bool:
        return position_bias.masked_fill(~attention_mask, -math.inf)
    return position_bias + attention_mask


def _refuse_unserved(
    options: dict[str, Any], attention_mask: Tensor | None, sliding_window: int | None, key: Tensor
) -> None:
    """Raise for the first option that could change the result."""
    for name, value in options.items():
        packed = name in _PACKED and attention_mask is not None
        if value is not None and value is not False and name not in _HARMLESS and not packed:
            raise _unserved(name, "is not served by it")
    if sliding_window is not None and attention_mask is None and sliding_window < key.shape[2]:
        raise _unserved("sliding_window", "comes without a mask that says which keys it hides")


def _unserved(name: str, reason: str) -> NotImplementedError:
    return NotImplementedError(
        f'{name} was passed to attn_implementation="{NAME}" and {reason}: '
        'use attn_implementation="eager" for this call'
    )
