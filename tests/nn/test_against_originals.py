"""Each drop-in module against its eager twin: the same names, results, gradients and dropout."""

import copy

import pytest
import torch

from benchmarks import originals as eager
from nlpfast import nn as fast

B, T, C = 2, 7, 12


def sequence(batch=B, length=T, seed=2, dtype=torch.float64):
    x = torch.randn(batch, length, C, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x.requires_grad_()


def padding(dtype=torch.float64):
    mask = torch.zeros(B, 1, 1, T, dtype=dtype)
    mask[0, ..., 4:] = -10000.0
    return mask


# name: the twin, ours, how to build a configuration, the arguments of forward
PAIRS = {
    "minGPT 2020": (
        eager.CausalSelfAttention,
        fast.CausalSelfAttention,
        eager.gpt_config,
        lambda dtype: (sequence(dtype=dtype),),
    ),
    "minGPT 2023": (
        eager.Packed,
        fast.PackedCausalSelfAttention,
        eager.gpt_config,
        lambda dtype: (sequence(dtype=dtype),),
    ),
    "nanoGPT": (
        eager.Packed,
        fast.PackedCausalSelfAttention,
        lambda attn_pdrop=0.0, **changes: eager.gpt_config(dropout=attn_pdrop, bias=False, **changes),
        lambda dtype: (sequence(dtype=dtype),),
    ),
    "CS224N, down": (
        eager.CausalCrossAttention,
        fast.CausalCrossAttention,
        eager.gpt_config,
        lambda dtype: (sequence(dtype=dtype), sequence(1, 4, 3, dtype)),
    ),
    "CS224N, up": (
        eager.CausalCrossAttention,
        fast.CausalCrossAttention,
        eager.gpt_config,
        lambda dtype: (sequence(B, 4, 3, dtype), sequence(dtype=dtype)),
    ),
    "CS224N, one latent sequence": (
        eager.CausalCrossAttention,
        fast.CausalCrossAttention,
        eager.gpt_config,
        lambda dtype: (sequence(1, 4, 3, dtype), sequence(dtype=dtype)),
    ),
    "minBERT": (
        eager.BertSelfAttention,
        fast.BertSelfAttention,
        eager.bert_config,
        lambda dtype: (sequence(dtype=dtype), padding(dtype)),
    ),
    "transformers 4": (
        eager.TupleBert,
        lambda config: fast.BertSelfAttention(config, return_tuple=True),
        eager.bert_config,
        lambda dtype: (sequence(dtype=dtype), padding(dtype)),
    ),
}
MASKS = ("mask", "bias")


def pair(name, dtype=torch.float64, **changes):
    theirs, ours, config, inputs = PAIRS[name]
    theirs, ours = theirs(config(**changes)), ours(config(**changes))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs.to(dtype), ours.to(dtype), inputs(dtype)


def first(y):
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_results_and_gradients(name, dtype, tolerance):
    theirs, ours, inputs = pair(name, dtype)
    leaves = [x for x in inputs if x.requires_grad]
    results = []
    for module in (ours, theirs):
        y = first(module(*inputs))
        upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=dtype)
        results.append((y, *torch.autograd.grad(y, (*leaves, *module.parameters()), upstream)))
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == dtype
        assert mine.shape == other.shape
        assert other.abs().max() > 0
        assert (mine - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("name", PAIRS)
def test_state_dicts_go_both_ways(name):
    theirs, ours, _ = pair(name)
    state = {key: x for key, x in theirs.state_dict().items() if key not in MASKS}
    assert list(ours.state_dict()) == list(state)
    assert not list(ours.buffers())
    for key, x in ours.state_dict().items():
        assert torch.equal(x, state[key])
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert set(missing.missing_keys) <= set(MASKS)
    assert not missing.unexpected_keys


@pytest.mark.parametrize("name", PAIRS)
def test_unknown_and_missing_keys_are_errors(name):
    _, ours, _ = pair(name)
    state = ours.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict({**state, "other": torch.ones(1)})
    state.pop(next(iter(state)))
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict(state)


DROPOUTS = [(n, d) for n in PAIRS for d in ("attn_pdrop", "resid_pdrop") if "BERT" not in n and "4" not in n]
DROPOUTS = [(n, d) for n, d in DROPOUTS if (n, d) != ("nanoGPT", "resid_pdrop")]
DROPOUTS += [(name, "attention_probs_dropout_prob") for name in ("minBERT", "transformers 4")]


@pytest.mark.parametrize(("name", "dropout"), DROPOUTS)
def test_dropout_in_training_only_and_with_the_same_mean(name, dropout):
    theirs, ours, inputs = pair(name, **{dropout: 0.3})
    torch.manual_seed(3)
    a, b = first(ours(*inputs)), first(ours(*inputs))
    torch.manual_seed(3)
    assert torch.equal(first(ours(*inputs)), a)
    assert not torch.equal(a, b)
    expected = first(theirs.eval()(*inputs))
    assert (first(ours.eval()(*inputs)) - expected).abs().max() < 1e-12
    ours.train()
    with torch.no_grad():
        draws = torch.stack([first(ours(*inputs)) for _ in range(1500)])
    error = (draws.mean(0) - expected).abs()
    assert draws.std(0).max() > 1e-3
    assert (error <= 5 * draws.std(0) / len(draws) ** 0.5 + 1e-9).all()


@pytest.mark.parametrize("name", PAIRS)
def test_copies_and_backends_by_name(name):
    _, ours, inputs = pair(name, torch.float32)
    assert ours.backend is None
    expected = first(ours(*inputs))
    ours.backend = "reference"
    other = copy.deepcopy(ours)
    assert other.backend == "reference"
    assert (first(other(*inputs)) - expected).abs().max() < 1e-5
    ours.backend = "nonsense"
    with pytest.raises(ValueError, match="nonsense"):
        ours(*inputs)


def test_keys_that_no_latent_sees_are_not_computed():
    _, ours, _ = pair("CS224N, down")
    x_kv, x_q = sequence(), sequence(1, 4, 3)
    seen = []
    ours.key.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1]))
    expected = ours(x_kv, x_q)
    with torch.no_grad():
        spoilt = x_kv.clone()
        spoilt[:, 4:] = torch.nan
    found = ours(spoilt.requires_grad_(), x_q)
    assert torch.equal(found, expected)
    assert seen == [4, 4]
    (gradient,) = torch.autograd.grad(found.sum(), spoilt)
    assert (gradient[:, 4:] == 0).all()
    assert (gradient[:, :4] != 0).any()


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((B, T, C + 1), (B, T, C)), r"x_kv has shape .* expected \[B, T, 12\]"),
        (((B, T, C), (T, C)), r"x_q has shape .* expected \[B, T, 12\]"),
        (((3, T, C), (2, T, C)), "x_kv has a batch of 3 and x_q one of 2"),
    ],
)
def test_cross_attention_names_what_does_not_fit(shapes, message):
    _, ours, _ = pair("CS224N, down")
    with pytest.raises(ValueError, match=message):
        ours(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


@pytest.mark.parametrize("name", ["minGPT 2023", "minBERT"])
def test_inputs_of_another_shape_are_refused(name):
    _, ours, _ = pair(name)
    with pytest.raises(ValueError, match=r"has shape .* expected \[B, T, 12\]"):
        ours(torch.zeros(B, T, C + 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("ours", "config", "message"),
    [
        (fast.CausalCrossAttention, eager.gpt_config(n_head=5), "n_embd=12 must be .* n_head=5"),
        (fast.PackedCausalSelfAttention, eager.gpt_config(n_head=5), "n_embd=12 must be .* n_head=5"),
        (
            fast.BertSelfAttention,
            eager.bert_config(num_attention_heads=5),
            "hidden_size=12 must be .* num_attention_heads=5",
        ),
    ],
)
def test_heads_must_divide_the_channels(ours, config, message):
    with pytest.raises(ValueError, match=message):
        ours(config)


def test_bert_refuses_by_name_what_would_change_the_result():
    _, ours, inputs = pair("transformers 4")
    expected = ours(*inputs)[0]
    assert torch.equal(ours(*inputs, None, output_attentions=False, cache_position=3)[0], expected)
    for name in ("head_mask", "encoder_hidden_states", "past_key_values", "output_attentions", "unheard_of"):
        with pytest.raises(NotImplementedError, match=f"{name} is given"):
            ours(*inputs, **{name: True})
    with pytest.raises(NotImplementedError, match="argument 4 of the forward call is given"):
        ours(*inputs, None, torch.ones(3))


def test_bert_with_a_row_that_sees_nothing_is_plain_softmax_as_minbert_has_it():
    theirs, ours, (x, _) = pair("minBERT")
    mask = torch.full((B, 1, 1, T), -10000.0, dtype=torch.float64)
    assert (ours(x, mask) - theirs(x, mask)).abs().max() < 1e-12
    assert (ours(x, mask > 0) == 0).all()
