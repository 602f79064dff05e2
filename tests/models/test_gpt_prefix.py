"""Prefixes that are seen from everywhere (UniLM): what sees what, and equality with an explicit mask."""

import pytest
import torch
import torch.nn.functional as F

from nlpfast.models.gpt import GPT, GPTConfig

V, T, C, H, LAYERS = 11, 9, 16, 4, 2


def model(dtype=torch.float64, std=0.3, **changes):
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    torch.manual_seed(1)
    gpt = GPT(GPTConfig(V, T, n_layer=LAYERS, n_head=H, n_embd=C, **no_dropout, **changes)).to(dtype)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0.0, std)
    return gpt


def tokens(B, length=T):
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(V, (B, length), generator=generator) for _ in range(2))


def twin(p, idx, prefixes):
    """The model from the functions of PyTorch, on float64 parameters, with a mask of each row."""
    length = idx.shape[1]
    visible = torch.ones(length, length).tril().bool() | (torch.arange(length) < prefixes[:, None, None])
    x = p["tok_emb.weight"][idx] + p["pos_emb"][:, :length]
    for n in range(LAYERS):
        layer = {name.removeprefix(f"blocks.{n}."): w for name, w in p.items()}

        def linear(name, x, layer=layer):
            return F.linear(x, layer[f"{name}.weight"], layer[f"{name}.bias"])

        h = F.layer_norm(x, (C,), layer["ln1.weight"], layer["ln1.bias"])
        heads = (linear(f"attn.{name}", h).unflatten(-1, (H, -1)) for name in ("query", "key", "value"))
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in heads), visible[:, None])
        x = x + linear("attn.proj", y.transpose(1, 2).flatten(2))
        h = F.layer_norm(x, (C,), layer["ln2.weight"], layer["ln2.bias"])
        x = x + linear("mlp.2", F.gelu(linear("mlp.0", h)))
    return F.linear(F.layer_norm(x, (C,), p["ln_f.weight"], p["ln_f.bias"]), p["head.weight"])


@pytest.mark.parametrize("length", [1, 6, T])
@pytest.mark.parametrize(
    ("dtype", "std", "tolerance"), [(torch.float64, 0.3, 1e-11), (torch.float32, 0.05, 1e-5)]
)
def test_equals_an_explicit_mask(length, dtype, std, tolerance):
    """Every prefix length there is, one in each row, with the loss and its gradients."""
    gpt, prefixes = model(dtype, std), torch.arange(length + 1)
    p = {name: x.detach().double().requires_grad_() for name, x in gpt.named_parameters()}
    idx, targets = tokens(length + 1, length)
    # nobody is asked to predict what it can see
    targets[torch.arange(length) < prefixes[:, None] - 1] = -100
    logits, loss = gpt(idx, targets, prefix_lengths=prefixes)
    expected = twin(p, idx, prefixes)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)
    loss.backward()
    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    expected_loss.backward()
    assert (loss - expected_loss).abs() < tolerance
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(parameter.grad.double(), p[name].grad, rtol=0, atol=tolerance, msg=name)
    alone = gpt(idx, targets, prefix_lengths=prefixes, return_logits=False)
    assert alone[0] is None and (alone[1] - expected_loss).abs() < tolerance


def test_without_a_prefix_it_is_the_causal_model():
    gpt = model()
    idx, targets = tokens(3)
    ours = gpt(idx, targets, prefix_lengths=torch.zeros(3, dtype=torch.int64))
    for one, other in zip(ours, gpt(idx, targets), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)


@torch.no_grad()
@pytest.mark.parametrize("prefix", [0, 1, 4, T])
def test_which_tokens_move_which_logits(prefix):
    """A token of the prefix all of them, a later one those from its own place on."""
    gpt, lengths = model(), torch.tensor([prefix])
    idx, _ = tokens(1)
    before = gpt(idx, prefix_lengths=lengths)[0]
    for place in range(T):
        changed = idx.clone()
        changed[0, place] = (changed[0, place] + 1) % V
        moved = (gpt(changed, prefix_lengths=lengths)[0] != before).any(-1)[0]
        assert moved.tolist() == [place < prefix or t >= place for t in range(T)]


@torch.no_grad()
def test_each_row_has_its_own_prefix():
    gpt, prefixes = model(), torch.tensor([0, 5, T])
    idx = next(tokens(1)).expand(3, T)
    logits = gpt(idx, prefix_lengths=prefixes)[0]
    for row, prefix in enumerate(prefixes):
        alone = gpt(idx[:1], prefix_lengths=prefix[None])[0]
        torch.testing.assert_close(logits[row], alone[0], rtol=0, atol=1e-13)
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert bool((logits[one, 1:] != logits[other, 1:]).any(-1).all())


@pytest.mark.parametrize("causal_align", ["top_left", "bottom_right"])
def test_a_bottleneck_has_no_prefixes(causal_align):
    gpt = model(perceiver=True, bottleneck_dim=4, causal_align=causal_align)
    prefixes, idx = torch.tensor([2, 2]), next(tokens(2))
    with pytest.raises(ValueError, match="prefix_lengths is given to a model with a bottleneck"):
        gpt(idx, prefix_lengths=prefixes)
    with pytest.raises(ValueError, match="prefix_lengths is given to a model with a bottleneck"):
        gpt.prefill(idx, torch.tensor([T, T]), prefix_lengths=prefixes)


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        ([2, T + 1], "prefix_lengths has the value 10; lengths must lie in 0..9"),
        ([2], "it must be .B. = .2."),
    ],
)
def test_prefixes_that_do_not_fit_are_refused(prefixes, message):
    with pytest.raises(ValueError, match=message):
        model()(next(tokens(2)), prefix_lengths=torch.tensor(prefixes))
