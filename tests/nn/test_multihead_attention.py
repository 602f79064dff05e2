"""nlpfast.nn.MultiheadAttention against torch.nn.MultiheadAttention, alone and inside torch's layers."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from nlpfast.nn import MultiheadAttention, multihead_attention

B, L, S, E, H = 3, 5, 7, 12, 4
BUILDS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "kdim and vdim": {"kdim": 6, "vdim": 10, "batch_first": True},
    "kdim, rows first": {"kdim": 6, "vdim": 12},
    "bias_kv": {"add_bias_kv": True},
    "zero attention": {"add_zero_attn": True, "batch_first": True},
}


def pair(dtype=torch.float64, **build):
    theirs = nn.MultiheadAttention(E, H, dtype=dtype, **build)
    with torch.no_grad():
        for x in theirs.parameters():
            x.copy_(torch.randn(x.shape, dtype=dtype) / 3)
    ours = MultiheadAttention(E, H, dtype=dtype, **build)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def inputs(module, batched=True, same=False):
    def made(length, width):
        shape = (B, length, width) if module.batch_first else (length, B, width)
        x = torch.randn(shape if batched else (length, width), dtype=torch.float64)
        return x.requires_grad_()

    query = made(L, E)
    return (query, query, query) if same else (query, made(S, module.kdim), made(S, module.vdim))


def masks(kind, padding, length=S, batch=B):
    """Return attn_mask and key_padding_mask; the first key is always visible."""
    hidden = torch.rand(L, length) < 0.4
    heads = torch.rand(batch * H, L, length) < 0.4
    keys = torch.arange(length)[None] >= torch.arange(length - batch + 1, length + 1)[:, None]
    hidden[:, 0] = heads[:, :, 0] = keys[:, 0] = False
    minus = torch.zeros((), dtype=torch.float64).masked_fill(torch.ones((), dtype=torch.bool), -math.inf)
    attn_mask = {
        "none": None,
        "bool": hidden,
        "bool a head": heads,
        "added": torch.randn(L, length, dtype=torch.float64).masked_fill(hidden, -math.inf),
        "added a head": torch.randn(batch * H, L, length, dtype=torch.float64),
    }[kind]
    padded = {"none": None, "bool": keys, "added": torch.where(keys, minus, 0.25)}[padding]
    return {"attn_mask": attn_mask, "key_padding_mask": padded}


def assert_equal_with_gradients(theirs, ours, leaves, call, tolerance=1e-12):
    results = []
    for module in (ours, theirs):
        out, weights = call(module)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=out.dtype)
        parts = [x for x in {id(x): x for x in leaves}.values() if x.requires_grad]
        results.append((out, weights, *torch.autograd.grad(out, (*parts, *module.parameters()), upstream)))
    for mine, other in zip(*results, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.shape == other.shape
            assert other.abs().max() > 0
            assert (mine - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("kind", ["none", "bool"])
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_every_build(build, kind, padding, need_weights):
    theirs, ours = pair(**BUILDS[build])
    leaves, options = inputs(ours), masks(kind, padding)
    assert_equal_with_gradients(
        theirs, ours, leaves, lambda module: module(*leaves, **options, need_weights=need_weights)
    )


@pytest.mark.parametrize("kind", ["none", "bool", "bool a head", "added", "added a head"])
@pytest.mark.parametrize("padding", ["none", "bool", "added"])
@pytest.mark.parametrize("same", [False, True])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_every_mask(kind, padding, same):
    theirs, ours = pair(batch_first=True)
    leaves, options = inputs(ours, same=same), masks(kind, padding, L if same else S)
    assert_equal_with_gradients(
        theirs, ours, leaves, lambda module: module(*leaves, **options, need_weights=False)
    )


@pytest.mark.parametrize("build", ["plain", "batch_first", "kdim and vdim"])
@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("need_weights", [False, True])
def test_one_sequence_without_a_batch(build, padding, need_weights):
    theirs, ours = pair(**BUILDS[build])
    leaves, options = inputs(ours, batched=False), masks("bool", padding, batch=1)
    if padding == "bool":
        options["key_padding_mask"] = options["key_padding_mask"][0]
    assert_equal_with_gradients(
        theirs, ours, leaves, lambda module: module(*leaves, **options, need_weights=need_weights)
    )


@pytest.mark.parametrize("padding", ["none", "bool"])
@pytest.mark.parametrize("same", [False, True])
def test_causal(padding, same):
    theirs, ours = pair()
    leaves = inputs(ours, same=same)
    length = L if same else S
    options = masks("none", padding, length)
    mask = torch.ones(L, length, dtype=torch.bool).triu(1)
    assert_equal_with_gradients(
        theirs,
        ours,
        leaves,
        lambda module: module(
            *leaves, **{**options, "attn_mask": mask}, need_weights=False, is_causal=module is ours
        ),
    )
    alone = ours(*leaves, **options, need_weights=False, is_causal=True)[0]
    # what the hint says, whatever the mask says
    for other in (mask, ~mask):
        hinted = ours(*leaves, **{**options, "attn_mask": other}, need_weights=False, is_causal=True)[0]
        assert torch.equal(alone, hinted)


@pytest.mark.parametrize("average", [True, False])
def test_weights(average):
    theirs, ours = pair(batch_first=True)
    leaves = inputs(ours)
    found = ours(*leaves, average_attn_weights=average)[1]
    expected = theirs(*leaves, average_attn_weights=average)[1]
    assert found.shape == ((B, L, S) if average else (B, H, L, S))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("build", BUILDS)
def test_constructor_state_dict_and_initial_weights(build):
    torch.manual_seed(7)
    theirs = nn.MultiheadAttention(E, H, **BUILDS[build])
    torch.manual_seed(7)
    ours = MultiheadAttention(E, H, **BUILDS[build])
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, x in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], x), name


def test_copies():
    _, ours = pair()
    leaves = inputs(ours)
    ours.backend = "reference"
    expected = ours(*leaves, need_weights=False)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.backend == "reference"
        assert torch.equal(other(*leaves, need_weights=False)[0], expected)


def test_dropout_is_that_of_training():
    theirs, ours = pair(dropout=0.4, batch_first=True)
    leaves = inputs(ours)
    torch.manual_seed(3)
    a, b = (ours(*leaves, need_weights=False)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(ours(*leaves, need_weights=False)[0], a)
    assert not torch.equal(a, b)
    expected = theirs.eval()(*leaves, need_weights=False)[0]
    with torch.no_grad():
        draws = torch.stack([ours(*leaves, need_weights=False)[0] for _ in range(1500)])
    assert ((draws.mean(0) - expected).abs() <= 5 * draws.std(0) / len(draws) ** 0.5).all()
    assert (ours.eval()(*leaves, need_weights=False)[0] - expected).abs().max() < 1e-12


def test_a_row_that_sees_nothing_gives_the_bias():
    _, ours = pair(batch_first=True)
    leaves = inputs(ours)
    hidden = torch.zeros(L, S, dtype=torch.bool)
    hidden[2] = True
    out, _ = ours(*leaves, attn_mask=hidden, need_weights=False)
    assert torch.equal(out[:, 2], ours.out_proj.bias.expand(B, E))
    assert torch.isfinite(torch.autograd.grad(out.sum(), leaves[0])[0]).all()


def test_masks_of_another_shape_or_dtype_are_refused():
    _, ours = pair(batch_first=True)
    leaves = inputs(ours)
    with pytest.raises(ValueError, match="attn_mask has the shape"):
        ours(*leaves, attn_mask=torch.zeros(L, S + 1, dtype=torch.bool), need_weights=False)
    with pytest.raises(TypeError, match=r"attn_mask has the dtype torch\.int64"):
        ours(*leaves, attn_mask=torch.zeros(L, S, dtype=torch.int64), need_weights=False)


def calls_of(monkeypatch):
    """Count the calls of the ops by the module."""
    calls = []
    for name in ("attention", "varlen_attention"):
        original = getattr(multihead_attention, name)

        def counted(*args, _original=original, _name=name, **options):
            calls.append(_name)
            return _original(*args, **options)

        monkeypatch.setattr(multihead_attention, name, counted)
    return calls


def layers(ours, norm_first=False, count=2, batch_first=True):
    torch.manual_seed(11)
    layer = nn.TransformerEncoderLayer(
        E, H, 24, dropout=0.0, batch_first=batch_first, norm_first=norm_first, dtype=torch.float64
    )
    if ours:
        built = MultiheadAttention(E, H, batch_first=batch_first, dtype=torch.float64)
        built.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = built
    return nn.TransformerEncoder(layer, count, enable_nested_tensor=not (ours or norm_first))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("masked", ["none", "padding", "causal", "both"])
def test_inside_the_encoder(monkeypatch, norm_first, training, masked):
    theirs, ours = (layers(which, norm_first).train(training) for which in (False, True))
    x = torch.randn(B, L, E, dtype=torch.float64)
    padding = torch.arange(L)[None] >= torch.tensor([5, 4, 2])[:, None]
    options = {}
    if masked in ("padding", "both"):
        options["src_key_padding_mask"] = padding
    if masked in ("causal", "both"):
        options |= {"mask": torch.ones(L, L, dtype=torch.bool).triu(1), "is_causal": True}
    calls = calls_of(monkeypatch)
    with torch.set_grad_enabled(training):
        found, expected = ours(x, **options), theirs(x, **options)
    assert calls == ["attention"] * 2
    visible = ~padding if "src_key_padding_mask" in options else torch.ones_like(padding)
    assert (found - expected)[visible].abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_of_the_encoder_are_not_padded(monkeypatch):
    theirs, ours = layers(False).eval(), layers(False).eval()
    for layer in ours.layers:
        layer.self_attn.__class__ = MultiheadAttention
    x = torch.randn(B, L, E, dtype=torch.float64)
    padding = torch.arange(L)[None] >= torch.tensor([5, 4, 2])[:, None]
    calls = calls_of(monkeypatch)
    with torch.no_grad():
        found = ours(x, src_key_padding_mask=padding)
        expected = theirs(x, src_key_padding_mask=padding)
    assert calls == ["varlen_attention"] * 2
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_for_self_attention():
    _, ours = pair(batch_first=True)
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(2, E)], dtype=torch.float64)
    assert [part.shape[0] for part in ours(x, x, x, need_weights=False)[0].unbind()] == [3, 2]
    torch.manual_seed(3)
    ours.dropout = 0.5
    a, b = (
        ours.train(which)(x, x, x, need_weights=False)[0].to_padded_tensor(0.0) for which in (True, False)
    )
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="query is nested"):
        ours(x, x, x)
    with pytest.raises(ValueError, match="query is nested"):
        ours(x, x, x, need_weights=False, key_padding_mask=torch.zeros(2, 3, dtype=torch.bool))


def test_inside_the_decoder(monkeypatch):
    torch.manual_seed(11)
    layer = nn.TransformerDecoderLayer(E, H, 24, dropout=0.0, batch_first=True, dtype=torch.float64)
    theirs = nn.TransformerDecoder(layer, 2)
    ours = copy.deepcopy(theirs)
    for layer in ours.layers:
        layer.self_attn.__class__ = layer.multihead_attn.__class__ = MultiheadAttention
    x, memory = torch.randn(B, L, E, dtype=torch.float64), torch.randn(B, S, E, dtype=torch.float64)
    options = {
        "tgt_mask": nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64),
        "tgt_is_causal": True,
        "memory_key_padding_mask": torch.arange(S)[None] >= torch.tensor([7, 3, 1])[:, None],
    }
    calls = calls_of(monkeypatch)
    assert (ours(x, memory, **options) - theirs(x, memory, **options)).abs().max() < 1e-12
    assert calls == ["attention"] * 4
