"""The sizes and options of a GPT, what they may be, and how a model of them can be called."""

from __future__ import annotations

import difflib
from typing import Any

from torch import Tensor

from nlpfast.nn.packing import Packing

__all__ = [
    "GPT1Config",
    "GPTConfig",
    "check_call",
    "check_config",
    "check_prompts",
    "outside_vocabulary",
]


class GPTConfig:
    """The sizes of a GPT; every keyword becomes an attribute.

    Attributes:
        vocab_size: V.
        block_size: longest sequence.
        n_layer: number of blocks.
        n_head: attention heads, a divisor of `n_embd`.
        n_embd: channels, C.
        embd_pdrop: dropout after the embeddings.
        resid_pdrop: dropout of what a block adds.
        attn_pdrop: dropout of the attention probabilities.
        ignore_index: targets with this value do not count in the loss.
        perceiver: whether there is a bottleneck, in the place of the first and the last block.
        bottleneck_dim: its latents, m.
        causal_align: of the bottleneck. "top_left" as in the assignment: learned latents see the first m
            tokens. "bottom_right", Perceiver AR: the latents are the last m tokens, which see all before
            them; it takes the place of the first block alone, and there are logits of these tokens only.
        latent_init: "xavier" or "normal": see `perceiver.PerceiverConfig`, also for the next two.
        normalize_query: False as in the assignment.
        residual: False as in the assignment.
    """

    vocab_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    embd_pdrop: float = 0.1
    resid_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    ignore_index: int = -100
    perceiver: bool = False
    bottleneck_dim: int = 32
    causal_align: str = "top_left"
    latent_init: str = "xavier"
    normalize_query: bool = False
    residual: bool = False

    def __init__(self, vocab_size: int, block_size: int, **kwargs: Any) -> None:
        """Set the attributes.

        Args:
            vocab_size: V.
            block_size: longest sequence.
            **kwargs: further attributes; names that are not listed above are kept as they are.

        Raises:
            ValueError: when a keyword is almost, but not quite, one of the names above.
        """
        self.vocab_size = vocab_size
        self.block_size = block_size
        known = list(GPTConfig.__annotations__)
        for name, value in kwargs.items():
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near and name not in known and not hasattr(self, name):
                raise ValueError(
                    f"{name}={value!r} is not a field of {type(self).__name__}; write {near[0]}={value!r}"
                )
            setattr(self, name, value)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name, class defaults included.

        Raises:
            ValueError: when a field is not a number, a string, a truth value or None, as config.json holds no
                others.
        """
        defaults = [name for cls in reversed(type(self).__mro__) for name in vars(cls)]
        names = dict.fromkeys([*GPTConfig.__annotations__, *defaults, *vars(self)])
        fields = {name: getattr(self, name) for name in names if name[0] != "_" and hasattr(self, name)}
        fields = {name: value for name, value in fields.items() if not callable(value)}
        for name, value in fields.items():
            if not isinstance(value, (int, float, str, type(None))):
                raise ValueError(
                    f"config.{name} is a {type(value).__name__}, expected a number, a string, a bool or "
                    "None; remove it before saving"
                )
        return fields


class GPT1Config(GPTConfig):
    """The first GPT: 12 layers, 12 heads, 768 channels (Radford et al. 2018)."""

    n_layer = 12
    n_head = 12
    n_embd = 768


def check_config(config: GPTConfig) -> None:
    """Raise ValueError unless there is a model of these sizes.

    Args:
        config: of the model.
    """
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(
                f"config.{name}={value!r} must be an integer >= 1; pass {name}= to the configuration"
            )
    if config.perceiver and not 1 <= config.bottleneck_dim <= config.block_size:
        rule = f"must be within 1..{config.block_size}, the block_size; latents beyond it see nothing"
        raise ValueError(f"config.bottleneck_dim={config.bottleneck_dim!r} {rule}")
    if config.causal_align not in ("top_left", "bottom_right"):
        rule = "must be 'top_left' or 'bottom_right'; pass one of them"
        raise ValueError(f"config.causal_align={config.causal_align!r} {rule}")
    if config.causal_align == "bottom_right" and not config.perceiver:
        rule = "is an alignment of the bottleneck; pass perceiver=True too"
        raise ValueError(f"config.causal_align='bottom_right' {rule}")
    if config.perceiver and config.causal_align == "top_left" and config.n_layer < 2:
        rule = "must be at least 2 with perceiver=True; two are the bottleneck's"
        raise ValueError(f"config.n_layer={config.n_layer} {rule}")
    for name in ("embd_pdrop", "resid_pdrop", "attn_pdrop"):
        value = getattr(config, name)
        if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
            raise ValueError(f"config.{name}={value!r} must be a probability in [0, 1]; 0 turns dropout off")


def check_call(
    config: GPTConfig,
    idx: Tensor,
    targets: Tensor | None,
    prefix_lengths: Tensor | None,
    packing: Packing | None,
) -> None:
    """Raise ValueError unless a model of these sizes can be called like that; see `GPT.forward`.

    Args:
        config: of the model.
        idx: tokens.
        targets: those that follow.
        prefix_lengths: of prefixes that are seen from everywhere.
        packing: of a packed batch.
    """
    dimensions = 1 if packing is not None else 2
    if idx.dim() != dimensions:
        shape = "[N] with packing" if packing is not None else "[B, T]; add the batch dimension"
        raise ValueError(f"idx has shape {list(idx.shape)}, expected {shape}")
    T = idx.shape[1] if packing is None else packing.longest
    if config.block_size < T:
        raise ValueError(
            f"idx has T={T} tokens a row, block_size={config.block_size} is the most this model reads; "
            "crop idx or build the model with a larger block_size"
        )
    if targets is not None and targets.shape != idx.shape:
        raise ValueError(
            f"targets has shape {list(targets.shape)}, idx {list(idx.shape)}; both must be the same"
        )
    if prefix_lengths is not None and config.perceiver:
        rule = "latents see the first tokens in their order; build the model with perceiver=False"
        raise ValueError(f"prefix_lengths is given to a model with a bottleneck: {rule}")
    if packing is not None and config.perceiver and config.causal_align == "bottom_right":
        rule = "the last m tokens are those of all rows alike; leave it out"
        raise ValueError(f"packing is given to a model with causal_align='bottom_right': {rule}")


def check_prompts(idx: Tensor, lengths: Tensor, prefix_lengths: Tensor | None) -> None:
    """Raise ValueError unless prompts have these lengths; see `GPT.prefill`.

    Args:
        idx: tokens [B, T].
        lengths: of the prompts.
        prefix_lengths: of prefixes that are seen from everywhere.
    """
    B, T = idx.shape
    if lengths.shape != (B,) or bool(((lengths < 1) | (lengths > T)).any()):
        raise ValueError(f"lengths={lengths.tolist()} must be one number within 1..{T} for each of {B} rows")
    if prefix_lengths is not None and bool((prefix_lengths > lengths).any()):
        rule = f"must lie within the prompts, whose lengths are {lengths.tolist()}"
        raise ValueError(f"prefix_lengths={prefix_lengths.tolist()} {rule}")


def outside_vocabulary(idx: Tensor, V: int) -> ValueError:
    """Return the error that names the first token outside of 0..V-1.

    Args:
        idx: tokens, one of them outside.
        V: characters of the vocabulary.
    """
    place = ((idx < 0) | (idx >= V)).nonzero()[0].tolist()
    return ValueError(
        f"idx{place} is {int(idx[tuple(place)])}, outside the vocabulary 0..{V - 1}; "
        "encode the text with the vocabulary the model was built for"
    )
