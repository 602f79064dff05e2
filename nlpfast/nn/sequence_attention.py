"""Attention of an encoder and a decoder: packed sentences in training, one token a step in translation.

Shapes: N rows of a packed batch, and M of the other side; R hypotheses that are written, K of each of B
sentences; S source tokens of the longest; C = H D channels, H heads, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from nlpfast.nn.heads import check_heads, dropout_of
from nlpfast.nn.packing import Packing
from nlpfast.ops.attention import attention
from nlpfast.ops.varlen_attention import varlen_attention

__all__ = ["Attended", "CrossAttention", "SelfAttention"]


class Attended(NamedTuple):
    """What attention's probabilities follow from; a packed batch counts as one entry.

    Attributes:
        query: [1, H, M, D].
        key: [1, H, N, D].
        lse: [1, H, M], float32 (float64 for float64).
    """

    query: Tensor
    key: Tensor
    lse: Tensor


class SelfAttention(nn.Module):
    """Attend from every token of a sentence to every token of it, or to those before.

    Equivalent: ``torch.nn.MultiheadAttention`` of each sentence alone, with its `in_proj` and `out_proj`.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    backend: str | None = None

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        """Build the projections.

        Args:
            channels: C.
            heads: H.
            dropout: of attention probabilities.

        Raises:
            ValueError: C is not a multiple of H.
        """
        super().__init__()
        check_heads("channels", channels, "heads", heads)
        self.heads = heads
        self.in_proj = nn.Linear(channels, 3 * channels)
        self.out_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, packing: Packing, *, is_causal: bool = False) -> Tensor:
        """Return what each row attends to; [N, C] -> [N, C].

        Args:
            x: sentences one after the other.
            packing: where they begin and end.
            is_causal: hide later rows of the sentence.
        """
        q, k, v = self.in_proj(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        cu, longest = packing.cu_seqlens, packing.longest
        options = {"dropout_p": dropout_of(self.dropout), "is_causal": is_causal, "backend": self.backend}
        out: Tensor = self.out_proj(
            varlen_attention(q, k, v, cu, cu, longest, longest, **options).flatten(1)  # type: ignore[call-overload]
        )
        return out

    def step(self, x: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
        """Return what one new token of each hypothesis attends to; [R, C] -> [R, C].

        Args:
            x: the tokens.
            keys: [R, H, room, D]; gets those of the tokens at `position`.
            values: likewise.
            position: tokens that each hypothesis had before.
        """
        q, k, v = self.in_proj(x).unflatten(1, (3, self.heads, -1)).unbind(1)
        keys[:, :, position], values[:, :, position] = k, v
        seen = keys[:, :, : position + 1], values[:, :, : position + 1]
        out: Tensor = self.out_proj(attention(q.unsqueeze(2), *seen, backend=self.backend).flatten(1))
        return out


class CrossAttention(nn.Module):
    """Attend from every token of a sentence to every token of the sentence that it translates.

    Attributes:
        backend: name of the attention backend, None to let the device and the dtype decide.
    """

    backend: str | None = None

    def __init__(self, channels: int, heads: int, dropout: float) -> None:
        """Build the projections.

        Args:
            channels: C.
            heads: H.
            dropout: of attention probabilities.

        Raises:
            ValueError: C is not a multiple of H.
        """
        super().__init__()
        check_heads("channels", channels, "heads", heads)
        self.heads = heads
        self.query_proj = nn.Linear(channels, channels)
        self.key_value_proj = nn.Linear(channels, 2 * channels)
        self.out_proj = nn.Linear(channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, packing: Packing, memory: Tensor, memory_packing: Packing, *, aligned: bool = False
    ) -> tuple[Tensor, Attended | None]:
        """Return what each row attends to, [M, C], and what the probabilities follow from, if asked for.

        Args:
            x: [M, C], sentences one after the other.
            packing: where they begin and end.
            memory: [N, C], the encoder's output.
            memory_packing: where its sentences begin and end, as many.
            aligned: return the second, too.
        """
        q = self.query_proj(x).unflatten(1, (self.heads, -1))
        k, v = self._keys_and_values(memory)
        y, lse = self._attend(q, k, v, packing, memory_packing, dropout_of(self.dropout))
        out: Tensor = self.out_proj(y.flatten(1))
        return out, _attended(q, k, lse) if aligned else None

    def probe(self, x: Tensor, packing: Packing, memory: Tensor, memory_packing: Packing) -> Attended:
        """Return what the probabilities follow from, without anything that is attended to.

        The arguments are those of `forward`.
        """
        q = self.query_proj(x).unflatten(1, (self.heads, -1))
        weight, bias = self.key_value_proj.weight, self.key_value_proj.bias
        channels = len(weight) // 2
        k = nn.functional.linear(memory, weight[:channels], bias[:channels]).unflatten(1, (self.heads, -1))
        # one column stands for the values, of which nothing is used
        _, lse = self._attend(q, k, k.detach()[..., :1], packing, memory_packing, 0.0)
        return _attended(q, k, lse)

    def _keys_and_values(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        k, v = self.key_value_proj(memory).unflatten(1, (2, self.heads, -1)).unbind(1)
        return k, v

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, memory_packing: Packing, dropout_p: float
    ) -> tuple[Tensor, Tensor]:
        y, lse = varlen_attention(
            *(q, k, v, packing.cu_seqlens, memory_packing.cu_seqlens),
            *(packing.longest, memory_packing.longest),
            dropout_p=dropout_p,
            return_lse=True,
            backend=self.backend,
        )
        return y, lse

    def memory_of(self, memory: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a batch of sentences, [B, H, S, D] each, for `step`.

        Args:
            memory: [N, C], the encoder's output.
            packing: where its sentences begin and end.
        """
        k, v = (packing.padded(part).transpose(1, 2) for part in self._keys_and_values(memory))
        return k.contiguous(), v.contiguous()

    def step(self, x: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
        """Return what one token of each hypothesis attends to; [R, C] -> [R, C].

        The hypotheses of a sentence are queries of the same keys, which are there once.

        Args:
            x: the tokens, K of each sentence, sentence after sentence.
            keys: [B, H, S, D].
            values: likewise.
            lengths: int64 [B], source tokens of each sentence.
        """
        B, C = len(keys), x.shape[1]
        q = self.query_proj(x).view(B, -1, self.heads, C // self.heads).transpose(1, 2)
        y = attention(q, keys, values, key_lengths=lengths, backend=self.backend)
        out: Tensor = self.out_proj(y.transpose(1, 2).reshape(-1, C))
        return out


def _attended(q: Tensor, k: Tensor, lse: Tensor) -> Attended:
    return Attended(q.transpose(0, 1)[None], k.transpose(0, 1)[None], lse.mT[None])
