import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nlpfast.nn import CausalSelfAttention
from nlpfast.nn import causal_attention as fast

B, T, C, H = 2, 7, 12, 3


def config(**changes):
    fields = {"n_embd": C, "n_head": H, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "block_size": 16}
    return SimpleNamespace(**{**fields, **changes})


def module(dtype=torch.float64, **changes):
    torch.manual_seed(1)
    return CausalSelfAttention(config(**changes)).to(dtype)


def inputs(length=T, dtype=torch.float64):
    return torch.randn(B, length, C, generator=torch.Generator().manual_seed(2), dtype=dtype)


def equivalent(layer, x):
    heads = (*x.shape[:2], H, C // H)
    q, k, v = (part(x).view(heads).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return layer.proj(y.transpose(1, 2).reshape(x.shape))


@pytest.mark.parametrize("length", [0, 1, 2, 7, 16, 33])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_equals_the_pytorch_of_its_docstring(length, dtype, tolerance):
    layer, x = module(dtype), inputs(length, dtype).requires_grad_()
    upstream = inputs(length, dtype).flip(0)
    results = []
    for y in (layer(x), equivalent(layer, x)):
        results.append((y, *torch.autograd.grad(y, (x, *layer.parameters()), upstream)))
    assert results[0][0].shape == (B, length, C)
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == dtype
        if ours.numel():
            assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max())


def test_names_are_those_of_mingpt():
    expected = {f"{name}.{part}" for name in ("key", "query", "value", "proj") for part in ("weight", "bias")}
    assert set(module().state_dict()) == expected
    assert not list(module().buffers())


@pytest.mark.parametrize("prefix", ["", "attn."])
def test_a_mask_buffer_is_left_out(prefix):
    layer = module()
    outer = torch.nn.ModuleDict({"attn": layer}) if prefix else layer
    state = {name: torch.ones_like(x) for name, x in outer.state_dict().items()}
    state[prefix + "mask"] = torch.ones(1, 1, 16, 16)
    outer.load_state_dict(state, strict=True)
    assert prefix + "mask" in state
    assert (layer.value.weight == 1).all()


@pytest.mark.parametrize("name", ["masks", "bias", "key.mask", "proj.mask"])
def test_nothing_else_is_left_out(name):
    layer = module()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        layer.load_state_dict({**layer.state_dict(), name: torch.ones(1)}, strict=True)


def test_missing_keys_are_still_errors():
    layer = module()
    state = layer.state_dict()
    del state["key.bias"]
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({**state, "mask": torch.ones(1)}, strict=True)


def recorded_call(monkeypatch, layer):
    calls = []

    def record(q, k, v, **options):
        calls.append(((q, k, v), options))
        return torch.zeros_like(q)

    monkeypatch.setattr(fast, "attention", record)
    layer(inputs())
    return calls[0]


@pytest.mark.parametrize(
    ("training", "pdrop", "expected"), [(True, 0.25, 0.25), (False, 0.25, 0.0), (True, 0.0, 0.0)]
)
def test_what_the_op_is_given(monkeypatch, training, pdrop, expected):
    layer = module(attn_pdrop=pdrop).train(training)
    layer.backend = "some"
    tensors, options = recorded_call(monkeypatch, layer)
    causal = {"is_causal": True, "causal_align": "top_left", "prefix_lengths": None}
    assert options == {"dropout_p": expected, **causal, "backend": "some"}
    for x in tensors:
        # a transposed view of a projection, not a copy
        assert x.shape == (B, H, T, C // H) and x.stride() == (T * C, C // H, C, 1)


def test_queries_keys_and_values_are_not_exchanged(monkeypatch):
    layer = module()
    (q, k, v), _ = recorded_call(monkeypatch, layer)
    for x, part in ((q, layer.query), (k, layer.key), (v, layer.value)):
        assert torch.equal(x.transpose(1, 2).reshape(B, T, C), part(inputs()))


def test_backends_by_name():
    layer = module(torch.float32)
    assert layer.backend is None
    expected = layer(inputs(dtype=torch.float32))
    layer.backend = "reference"
    assert (layer(inputs(dtype=torch.float32)) - expected).abs().max() < 1e-6
    layer.backend = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        layer(inputs(dtype=torch.float32))


@pytest.mark.parametrize("pdrop", ["attn_pdrop", "resid_pdrop"])
def test_dropout_in_training_only(pdrop):
    layer, x = module(**{pdrop: 0.5}), inputs()
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    assert (layer.eval()(x) - equivalent(layer, x)).abs().max() < 1e-13


def test_dropout_keeps_the_mean():
    layer, x, count = module(attn_pdrop=0.3), inputs()[:1], 4000
    torch.manual_seed(4)
    draws = layer(x.expand(count, T, C)).detach()
    error = draws.mean(0) - equivalent(layer, x).detach()[0]
    assert draws.std(0).min() > 1e-3
    assert (error.abs() <= 5 * draws.std(0) / count**0.5).all()


def test_copies_keep_weights_and_backend():
    layer = module()
    layer.backend = "reference"
    other = copy.deepcopy(layer)
    assert other.backend == "reference"
    assert torch.equal(other(inputs()), layer(inputs()))


@pytest.mark.parametrize(("n_embd", "n_head"), [(10, 3), (0, 1), (4, 0), (4, 8), (4, -2)])
def test_heads_must_divide_the_channels(n_embd, n_head):
    with pytest.raises(ValueError, match=f"n_embd={n_embd} must be a positive multiple of n_head={n_head}"):
        CausalSelfAttention(config(n_embd=n_embd, n_head=n_head))


@pytest.mark.parametrize("shape", [(T, C), (B, T, C + 1), (B, H, T, C)])
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"x has shape .* expected \[B, T, 12\]"):
        module()(torch.zeros(shape, dtype=torch.float64))


def test_there_is_no_cache():
    with pytest.raises(ValueError, match="layer_past must be None"):
        module()(inputs(), layer_past=(inputs(), inputs()))
    assert module()(inputs(), layer_past=None).shape == (B, T, C)
