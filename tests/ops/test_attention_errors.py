"""Mistakes in calls of attention: one line that names the argument, the value, the rule and the fix."""

import pytest
import torch

from nlpfast import attention
from nlpfast.testing import make_inputs

OP = "attention"
LENGTHS = torch.tensor([5, 17])
X = torch.zeros(2, 4, 3, 8)
K = torch.zeros(2, 4, 5, 8)
IDS = torch.zeros(2, dtype=torch.int64)
MISTAKES = {
    "query_3d": (
        ValueError,
        r"query has the shape \[4, 3, 8\]",
        (X[0], K, K),
        {},
    ),
    "dtype": (TypeError, "value has the dtype torch.float64", (X, K, K.double()), {}),
    "integers": (TypeError, "query has the dtype torch.int64", (X.long(), K.long(), K.long()), {}),
    "device": (ValueError, "key is on meta", (X, K.to("meta"), K), {}),
    "batch": (ValueError, r"key has the shape \[1, 4, 5, 8\]", (X, K[:1], K), {}),
    "head_size": (ValueError, r"key has the shape \[2, 4, 5, 7\]", (X, K[..., 1:], K), {}),
    "head_size_0": (ValueError, "query has the head size 0", (X[..., :0], K[..., :0], K), {}),
    "value_head_size_0": (ValueError, "value has the head size 0", (X, K, K[..., :0]), {}),
    "value_length": (ValueError, r"value has the shape \[2, 4, 4, 8\]", (X, K, K[:, :, 1:]), {}),
    "value_heads": (ValueError, r"value has the shape \[2, 2, 5, 8\]", (X, K, K[:, :2]), {}),
    "heads": (ValueError, "pass enable_gqa=True", (X, K[:, :2], K[:, :2]), {}),
    "heads_do_not_divide": (ValueError, "multiple of key's 3", (X, K[:, :3], K[:, :3]), {"enable_gqa": True}),
    "no_key_heads": (ValueError, "multiple of key's 0", (X, K[:, :0], K[:, :0]), {"enable_gqa": True}),
    "mask_shape": (
        ValueError,
        r"attn_mask has the shape \[3, 4\]",
        (X, K, K),
        {"attn_mask": torch.zeros(3, 4)},
    ),
    "mask_5d": (ValueError, "attn_mask has the shape", (X, K, K), {"attn_mask": torch.zeros(1, 1, 1, 3, 5)}),
    "mask_dtype": (TypeError, "attn_mask has the dtype torch.int64", (X, K, K), {"attn_mask": IDS}),
    "mask_device": (
        ValueError,
        "attn_mask is on meta",
        (X, K, K),
        {"attn_mask": torch.zeros(3, 5, device="meta")},
    ),
    "lengths_dtype": (
        TypeError,
        "key_lengths has the dtype torch.int32",
        (X, K, K),
        {"key_lengths": IDS.int()},
    ),
    "lengths_shape": (
        ValueError,
        r"key_lengths has the shape \[3\]",
        (X, K, K),
        {"key_lengths": LENGTHS[[0, 1, 1]]},
    ),
    "lengths_device": (ValueError, "key_lengths is on meta", (X, K, K), {"key_lengths": IDS.to("meta")}),
    "prefix_without_causal": (ValueError, "set is_causal=True", (X, K, K), {"prefix_lengths": IDS}),
    "align": (ValueError, "causal_align is 'left'", (X, K, K), {"causal_align": "left"}),
    "dropout": (ValueError, "dropout_p is 1.5", (X, K, K), {"dropout_p": 1.5}),
    "dropout_nan": (ValueError, "dropout_p is nan", (X, K, K), {"dropout_p": float("nan")}),
    "seed": (ValueError, "seed is 9223372036854775808", (X, K, K), {"dropout_p": 0.1, "seed": 2**63}),
    "seed_dtype": (TypeError, "seed has the dtype", (X, K, K), {"dropout_p": 0.1, "seed": IDS.int()}),
    "seed_shape": (ValueError, "seed has the shape", (X, K, K), {"dropout_p": 0.1, "seed": IDS[[0, 1, 1]]}),
    "seed_device": (ValueError, "seed is on meta", (X, K, K), {"dropout_p": 0.1, "seed": IDS.to("meta")}),
    "backend": (ValueError, "attention has no such backend", (X, K, K), {"backend": "abacus"}),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes_are_named_in_one_line(mistake: str) -> None:
    kind, message, tensors, kwargs = MISTAKES[mistake]
    with pytest.raises(kind, match=message) as caught:
        attention(*tensors, **kwargs)
    # What was seen, the rule, and the fix after a colon.
    assert "\n" not in str(caught.value) and ": " in str(caught.value)


@pytest.mark.parametrize("bad", [-1, 6])
@pytest.mark.parametrize("name", ["key_lengths", "prefix_lengths"])
def test_lengths_out_of_range(backend: str, name: str, bad: int) -> None:
    with pytest.raises((ValueError, RuntimeError), match=name):
        attention(X, K, K, is_causal=True, **{name: torch.tensor([5, bad])}, backend=backend)


def test_lengths_out_of_range_are_clamped_where_values_are_not_looked_at() -> None:
    tensors = make_inputs(2, 4, 3, 5, 8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    actual = compiled(*tensors, key_lengths=torch.tensor([-3, 99]), backend="reference")
    torch.testing.assert_close(actual, attention(*tensors, key_lengths=torch.tensor([0, 5])))
