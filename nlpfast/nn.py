"""Drop-in modules: torch.nn modules with the constructors and state-dict names of the originals.

Shapes: B batch, T sequence length, C channels, H heads, D = C / H head size.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from nlpfast.ops.attention import attention

__all__ = ["AttentionConfig", "CausalSelfAttention"]


class AttentionConfig(Protocol):
    """What `CausalSelfAttention` reads from its configuration; any object with these attributes will do."""

    n_embd: int
    n_head: int
    attn_pdrop: float
    resid_pdrop: float
    block_size: int


class CausalSelfAttention(nn.Module):
    """Attend from every position to itself and the positions before it, with several heads.

    The module has the constructor and the state-dict names of minGPT (2020): `key`, `query`, `value` and
    `proj` are linear layers with bias. It computes the same as::

        q, k, v = (layer(x).view(B, T, H, D).transpose(1, 2) for layer in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=attn_pdrop, is_causal=True)
        resid_drop(proj(y.transpose(1, 2).reshape(B, T, C)))

    The causal mask is part of the attention kernel, so the module has no `mask` buffer and takes any T; state
    dicts that hold the `mask` buffer of the original load with ``strict=True``, the buffer is left out.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    backend: str | None

    def __init__(self, config: AttentionConfig) -> None:
        """Build the four linear layers.

        Args:
            config: object with `n_embd` (C), `n_head` (H), `attn_pdrop`, `resid_pdrop`; its `block_size` is
                not used.

        Raises:
            ValueError: when `n_embd` is not a positive multiple of `n_head`.
        """
        super().__init__()
        if config.n_head < 1 or config.n_embd < 1 or config.n_embd % config.n_head != 0:
            raise ValueError(
                f"n_embd={config.n_embd} must be a positive multiple of n_head={config.n_head}; "
                "change one of the two"
            )
        self.key = nn.Linear(config.n_embd, config.n_embd)
        self.query = nn.Linear(config.n_embd, config.n_embd)
        self.value = nn.Linear(config.n_embd, config.n_embd)
        # carries the probability and the train/eval switch; the kernel does the dropping
        self.attn_drop = nn.Dropout(config.attn_pdrop)
        self.resid_drop = nn.Dropout(config.resid_pdrop)
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        self.n_head = config.n_head
        self.backend = None

    def forward(self, x: Tensor, layer_past: None = None) -> Tensor:
        """Return the attended sequence.

        Args:
            x: [B, T, C], any floating dtype that the backend serves.
            layer_past: part of the original signature; there is no cache here, so it must be None.

        Returns:
            [B, T, C], the dtype of `x`.

        Raises:
            ValueError: when `x` is not [B, T, n_embd] or `layer_past` is given.
        """
        if layer_past is not None:
            raise ValueError(
                "layer_past must be None: this module keeps no cache; pass the whole sequence as x"
            )
        C = self.proj.in_features
        if x.dim() != 3 or x.shape[2] != C:
            raise ValueError(f"x has shape {list(x.shape)}, expected [B, T, {C}]; the last size is n_embd")
        B, T, _ = x.shape
        heads = (B, T, self.n_head, C // self.n_head)
        q = self.query(x).view(heads).transpose(1, 2)  # [B, H, T, D], a view
        k = self.key(x).view(heads).transpose(1, 2)
        v = self.value(x).view(heads).transpose(1, 2)
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        y = attention(q, k, v, dropout_p=dropout_p, is_causal=True, backend=self.backend)
        out: Tensor = self.resid_drop(self.proj(y.transpose(1, 2).reshape(B, T, C)))
        return out

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # state_dict is torch's own copy, so the caller's dictionary keeps its mask
        state_dict.pop(prefix + "mask", None)
        super()._load_from_state_dict(state_dict, prefix, *args)
