import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nlpfast.nn import CausalCrossAttention, CausalSelfAttention
from nlpfast.nn import causal_attention as fast
from nlpfast.nn.key_value_cache import KeyValueCache
from nlpfast.nn.packing import Packing

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


def attended(layer, x_kv, x_q, visible):
    """PyTorch's attention with an explicit mask [Tq, Tk], or one of each sequence."""
    q, k, v = (
        part(x).unflatten(-1, (H, -1)).transpose(1, 2)
        for part, x in ((layer.query, x_q), (layer.key, x_kv), (layer.value, x_kv))
    )
    if visible.dim() == 3:
        visible = visible[:, None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    return layer.proj(y.transpose(1, 2).flatten(2))


def causal(queries, keys, shift=0):
    """Query i sees the keys 0..i + shift."""
    return torch.ones(queries, keys).tril(shift).bool()


def assert_same(ours, theirs, inputs, upstream, tolerance):
    """Both the same, and their gradients too; what has no gradient has the gradient 0."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= tolerance
    both = (torch.autograd.grad(y, inputs, upstream, materialize_grads=True) for y in (ours, theirs))
    for one, other in zip(*both, strict=True):
        assert (one - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("prefixes", [(0, 0), (1, 4), (T, 0), (T, 3), (T, T)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_a_prefix_is_seen_from_everywhere(prefixes, dtype, tolerance):
    layer, x = module(dtype), inputs(dtype=dtype).requires_grad_()
    lengths = torch.tensor(prefixes)
    visible = causal(T, T) | (torch.arange(T) < lengths[:, None, None])
    y = layer(x, prefix_lengths=lengths)
    expected = attended(layer, x, x, visible)
    assert_same(y, expected, (x, *layer.parameters()), inputs(dtype=dtype).flip(0), tolerance)


PACKED = [[1], [7], [3, 1, 4], [5, 5]]


@pytest.mark.parametrize("lengths", PACKED, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_packed_sequences_are_attended_each_alone(lengths, dtype, tolerance):
    layer, rows = module(dtype), inputs(sum(lengths), dtype)[0].requires_grad_()
    y = layer(rows, packing=Packing.of_lengths(torch.tensor(lengths)))
    alone = torch.cat([layer(part[None])[0] for part in rows.split(lengths)])
    upstream = inputs(sum(lengths), dtype)[1]
    assert_same(y, alone, (rows, *layer.parameters()), upstream, tolerance)


@torch.no_grad()
@pytest.mark.parametrize("prompts", [(1, 1), (4, 4), (2, 5), (T, 3)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
def test_with_a_cache_each_position_is_attended_once(prompts, dtype, tolerance):
    """Rows of different lengths; what fills up the shorter prompt is not seen later on."""
    layer, x, steps = module(dtype), inputs(2 * T, dtype), T
    cache, lengths = KeyValueCache(2 * T, torch.tensor(prompts)), torch.tensor(prompts)
    padded = x[:, : max(prompts)].masked_fill(
        torch.arange(max(prompts))[:, None] >= lengths[:, None, None], 9
    )
    whole, rows = layer(x), torch.arange(B)
    y = layer(padded, cache)
    for b, n in enumerate(prompts):
        assert (y[b, :n] - whole[b, :n]).abs().max() <= tolerance
    for step in range(steps):
        y = layer(x[rows, lengths + step][:, None], layer_past=cache)
        assert y.shape == (B, 1, C)
        assert (y[:, 0] - whole[rows, lengths + step]).abs().max() <= tolerance
    assert cache.lengths.tolist() == [n + steps for n in prompts]


@torch.no_grad()
def test_a_cache_with_keys_takes_one_position():
    layer, cache = module(), KeyValueCache(T, torch.tensor([2, 2]))
    layer(inputs(2), cache)
    with pytest.raises(ValueError, match="x has T=2 positions, with keys in layer_past it takes one"):
        layer(inputs(2), cache)
    assert cache.lengths.tolist() == [2, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["layer_past", "packing"], "layer_past and packing cannot be given together; leave out packing"),
        (["prefix_lengths", "packing"], "prefix_lengths and packing cannot be given together"),
        (
            ["layer_past", "prefix_lengths", "packing"],
            "layer_past and prefix_lengths and packing cannot be given together",
        ),
    ],
)
def test_packed_sequences_have_neither_prefix_nor_cache(names, message):
    lengths = torch.tensor([3, 4])
    options = {
        "layer_past": KeyValueCache(T, lengths),
        "prefix_lengths": lengths,
        "packing": Packing.of_lengths(lengths),
    }
    with pytest.raises(ValueError, match=message):
        module()(inputs()[0], **{name: options[name] for name in names})


def cross(dtype=torch.float64, causal_align="top_left"):
    torch.manual_seed(1)
    return CausalCrossAttention(config(), causal_align).to(dtype)


@pytest.mark.parametrize("queries", [1, 3, T])
@pytest.mark.parametrize("keys", [T, T + 1, 2 * T])
@pytest.mark.parametrize("batches", [(B, B), (1, B), (B, 1)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_queries_that_are_the_last_positions_see_all_before_them(queries, keys, batches, dtype, tolerance):
    layer = cross(dtype, "bottom_right")
    x_kv = inputs(keys, dtype)[: batches[0]].requires_grad_()
    x_q = inputs(queries, dtype).flip(0)[: batches[1]].requires_grad_()
    visible = causal(queries, keys, keys - queries)
    upstream = inputs(queries, dtype).flip(1)
    expected = attended(layer, x_kv.expand(B, -1, -1), x_q.expand(B, -1, -1), visible)
    parts = (x_kv, x_q, *layer.parameters())
    assert_same(layer(x_kv=x_kv, x_q=x_q), expected, parts, upstream, tolerance)
    assert bool((torch.autograd.grad(layer(x_kv, x_q).sum(), x_kv)[0] != 0).all())


def test_aligned_at_the_bottom_right_the_first_of_more_queries_see_nothing():
    layer, x_kv, x_q = cross(causal_align="bottom_right"), inputs(3), inputs()
    y = layer(x_kv, x_q)
    assert torch.equal(y[:, : T - 3], layer.proj.bias.expand(B, T - 3, C))
    assert (y[:, T - 3 :] - layer(x_kv, x_q[:, T - 3 :])).abs().max() < 1e-13


@pytest.mark.parametrize("keys", [1, 3, T, T + 4])
def test_by_default_query_i_sees_the_keys_up_to_i(keys):
    layer = cross()
    x_kv, x_q = inputs(keys).requires_grad_(), inputs().flip(0).requires_grad_()
    expected = attended(layer, x_kv, x_q, causal(T, keys))
    assert_same(layer(x_kv, x_q), expected, (x_kv, x_q, *layer.parameters()), inputs().flip(1), 1e-13)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [([3, 1, 4], [3, 1, 4]), ([2, 1, 4], [5, 3, 4]), ([5, 3, 4], [2, 1, 4]), ([1], [6])],
    ids=str,
)
def test_packed_queries_see_the_keys_of_their_own_sequence(queries, keys, align):
    layer = cross(causal_align=align)
    x_q, x_kv = inputs(sum(queries))[0].requires_grad_(), inputs(sum(keys))[1].requires_grad_()
    packing, kv_packing = (Packing.of_lengths(torch.tensor(lengths)) for lengths in (queries, keys))
    y = layer(x_kv, x_q, packing=packing, kv_packing=kv_packing)
    pairs = zip(x_kv.split(keys), x_q.split(queries), strict=True)
    alone = torch.cat([layer(kv[None], q[None])[0] for kv, q in pairs])
    upstream = inputs(sum(queries))[1]
    assert_same(y, alone, (x_kv, x_q, *layer.parameters()), upstream, 1e-13)


@torch.no_grad()
def test_a_cached_query_sees_all_keys_that_came_for_its_sequence():
    layer, x, m = cross(), inputs(2 * T), 4
    lengths, rows = torch.tensor([2, 5]), torch.arange(B)
    cache = KeyValueCache(m, lengths)
    y = layer(x_kv=x[:, :m], x_q=x[:, :5].flip(1), layer_past=cache)
    assert torch.equal(y, layer(x_kv=x[:, :m], x_q=x[:, :5].flip(1)))
    for n in (3, 4, 5):
        lengths = lengths + 1
        query = x[rows, lengths].flip(0)[:, None]
        y = layer(x[rows, lengths - 1][:, None], query, layer_past=cache)
        # the second sequence has had m keys from the beginning
        visible = torch.arange(m) < torch.tensor([min(n, m), m])[:, None, None]
        assert (y - attended(layer, x[:, :m], query, visible)).abs().max() < 1e-13
        # asking again without a new key changes nothing
        assert (layer(None, query, layer_past=cache) - y).abs().max() < 1e-13
    assert cache.lengths.tolist() == [m, m]


def test_keys_are_needed_from_somewhere():
    message = r"x_kv is None, and there are no keys in layer_past; give \[B, Tk, C\]"
    for options in ({}, {"layer_past": KeyValueCache(T, torch.tensor([1, 1]))}):
        with pytest.raises(ValueError, match=message):
            cross()(None, inputs(1), **options)


@pytest.mark.parametrize("align", ["top_left", "bottom_right"])
def test_batches_that_differ_are_refused(align):
    with pytest.raises(ValueError, match="x_kv has a batch of 4 and x_q one of 2; they must be equal"):
        cross(causal_align=align)(inputs().repeat(2, 1, 1), inputs())


def test_an_alignment_that_is_neither_is_refused():
    with pytest.raises(ValueError, match="causal_align='bottom' must be 'top_left' or 'bottom_right'"):
        cross(causal_align="bottom")


@pytest.mark.parametrize(
    "given", [{"packing"}, {"kv_packing"}, {"packing", "kv_packing", "layer_past"}], ids=str
)
def test_packings_go_together_and_alone(given):
    packing = Packing.of_lengths(torch.tensor([2, 3]))
    rows = torch.zeros(5, C, dtype=torch.float64)
    every = {"packing": packing, "kv_packing": packing, "layer_past": KeyValueCache(T, torch.tensor([2, 3]))}
    options = {name: every[name] for name in given}
    with pytest.raises(
        ValueError, match="packing and kv_packing go together, with x_kv and without layer_past"
    ):
        cross()(rows, rows, **options)
    with pytest.raises(ValueError, match="packing and kv_packing go together"):
        cross()(None, rows, packing=packing, kv_packing=packing)


@pytest.mark.parametrize(("queries", "keys"), [(2, 1), (1, 2), (2, None)])
def test_keys_that_are_there_are_asked_one_by_one(queries, keys):
    cache = KeyValueCache(T, torch.tensor([2, 2]))
    with torch.no_grad():
        cross()(inputs(2), inputs(2), layer_past=cache)
        with pytest.raises(ValueError, match="with keys in layer_past there is one position of each"):
            cross()(None if keys is None else inputs(keys), inputs(queries), layer_past=cache)
