"""Perceiver AR: the last m tokens look at all before them, and only they are predicted from."""

import json
import math

import pytest
import torch
from test_perceiver import linear, mlp, norm

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.perceiver import RecentTokensBlock
from nlpfast.nn import causal_attention

V, T, M, C, H = 13, 12, 5, 16, 4


def config(**changes):
    fields = {"n_layer": 3, "n_head": H, "n_embd": C, "perceiver": True, "bottleneck_dim": M}
    no_dropout = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPTConfig(V, T, **{**fields, **no_dropout, "causal_align": "bottom_right", **changes})


def model(dtype=torch.float64, std=0.3, **changes):
    torch.manual_seed(1)
    gpt = GPT(config(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0.0, std)
    return gpt


def tokens(length=T, B=3):
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(V, (B, length), generator=generator) for _ in range(2))


def attend(p, name, x_kv, x_q):
    """A mask in which the queries are the last positions: query i sees the keys 0..i + Tk - Tq."""
    q, k, v = (
        linear(p, f"{name}.{part}", x).unflatten(-1, (H, -1)).transpose(1, 2)
        for part, x in (("query", x_q), ("key", x_kv), ("value", x_kv))
    )
    places = torch.arange(k.shape[2])
    hidden = places > places[-q.shape[2] :, None]
    weights = (q @ k.mT / math.sqrt(C / H)).masked_fill(hidden, -math.inf).softmax(-1)
    return linear(p, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))


def twin(p, idx, layers, m=M):
    """The model from its formulas; the logits of the last min(T, m) positions."""
    x = p["tok_emb.weight"][idx] + p["pos_emb"][:, : idx.shape[1]]
    h = norm(p, "recent_block.ln1", x)
    x = mlp(p, "recent_block", x[:, -m:] + attend(p, "recent_block.attn", h, h[:, -m:]))
    for n in range(layers - 1):
        h = norm(p, f"blocks.{n}.ln1", x)
        x = mlp(p, f"blocks.{n}", x + attend(p, f"blocks.{n}.attn", h, h))
    return norm(p, "ln_f", x) @ p["head.weight"].T


@pytest.mark.parametrize("length", [1, 2, M - 1, M, M + 1, T])
@pytest.mark.parametrize(
    "options", [{}, {"n_layer": 1}, {"bottleneck_dim": 1}, {"bottleneck_dim": T}], ids=str
)
@pytest.mark.parametrize(
    ("dtype", "std", "tolerance"), [(torch.float64, 0.3, 1e-11), (torch.float32, 0.05, 1e-5)]
)
def test_equals_its_formulas(length, options, dtype, std, tolerance):
    gpt = model(dtype, std, **options)
    m = min(gpt.config.bottleneck_dim, length)
    p = {name: x.detach().double().requires_grad_() for name, x in gpt.named_parameters()}
    idx, targets = tokens(length)
    # the first of the targets that count is left out
    targets[0, length - m] = -100 if m > 1 else targets[0, length - m]
    logits, loss = gpt(idx, targets)
    expected = twin(p, idx, gpt.config.n_layer, m)
    assert logits.shape == (3, m, V) and logits.dtype == dtype
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets[:, -m:].flatten())
    nothing, alone = gpt(idx, targets, return_logits=False)
    assert nothing is None
    for found in (loss, alone):
        assert (found - expected_loss).abs() < tolerance
    expected_loss.backward()
    for found in (loss, alone):
        gpt.zero_grad()
        found.backward()
        for name, parameter in gpt.named_parameters():
            grad = parameter.grad.double()
            torch.testing.assert_close(grad, p[name].grad, rtol=0, atol=tolerance, msg=name)
    assert gpt(idx)[1] is None
    assert torch.equal(gpt(idx, return_logits=False)[0], logits)


@pytest.mark.parametrize("layers", [1, 3])
def test_every_token_so_far_is_seen_and_none_ahead(layers):
    gpt = model(n_layer=layers)
    # all different, so that a row of the embedding is one place of the text
    idx = torch.randperm(V, generator=torch.Generator().manual_seed(3))[None, :T]
    logits = gpt(idx)[0]
    for query in range(M):
        seen = T - M + query
        gradient, positions = torch.autograd.grad(
            logits[0, query].square().sum(), (gpt.tok_emb.weight, gpt.pos_emb), retain_graph=True
        )
        assert (gradient[idx[0]] != 0).any(-1).tolist() == [t <= seen for t in range(T)]
        assert (positions[0] != 0).any(-1).tolist() == [t <= seen for t in range(T)]


@torch.no_grad()
def test_targets_of_earlier_tokens_are_not_looked_at():
    gpt, (idx, targets) = model(), tokens()
    expected = gpt(idx, targets)[1]
    spoilt = targets.clone()
    spoilt[:, : T - M] = V + 5
    for return_logits in (True, False):
        torch.testing.assert_close(
            gpt(idx, spoilt, return_logits=return_logits)[1], expected, rtol=0, atol=1e-13
        )
    with pytest.raises(ValueError, match=r"targets has shape \[3, 5\], idx \[3, 12\]"):
        gpt(idx, targets[:, -M:])


@torch.no_grad()
def test_only_the_last_tokens_go_through_the_layers(monkeypatch):
    gpt, looked, rows = model(), [], []
    attention = causal_attention.attention

    def counted(q, k, v, **options):
        looked.append((q.shape[2], k.shape[2]))
        return attention(q, k, v, **options)

    monkeypatch.setattr(causal_attention, "attention", counted)
    for part in (gpt.recent_block.mlp, *gpt.blocks, gpt.head):
        part.register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0].shape[1]))
    gpt(next(tokens()))
    assert looked == [(M, T), (M, M), (M, M)] and rows == [M] * 4


def test_its_layers_and_their_names():
    gpt = model()
    names = {name.split(".")[0] for name in gpt.state_dict()}
    assert names == {"tok_emb", "pos_emb", "recent_block", "blocks", "ln_f", "head"}
    assert isinstance(gpt.recent_block, RecentTokensBlock) and len(gpt.blocks) == 2
    assert gpt.recent_block.attn.causal_align == "bottom_right"
    assert len(model(n_layer=1).blocks) == 0


def test_saved_and_read_again(tmp_path):
    gpt = model(torch.float32)
    gpt.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["causal_align"] == "bottom_right"
    )
    again = GPT.from_pretrained(tmp_path)
    assert again.config.causal_align == "bottom_right" and again.config.bottleneck_dim == M
    idx, targets = tokens()
    for ours, theirs in zip(again(idx, targets), gpt.eval()(idx, targets), strict=True):
        assert torch.equal(ours, theirs)


def test_a_configuration_without_the_field_is_the_bottleneck_of_the_assignment(tmp_path):
    gpt = model(torch.float32, causal_align="top_left")
    gpt.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    fields = json.loads(path.read_text(encoding="utf-8"))
    del fields["causal_align"]
    path.write_text(json.dumps(fields), encoding="utf-8")
    idx, _ = tokens()
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], gpt.eval()(idx)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal_align": "bottom"}, "causal_align='bottom' must be 'top_left' or 'bottom_right'"),
        ({"causal_align": None}, "causal_align=None must be 'top_left' or 'bottom_right'"),
        ({"causal_aling": "top_left"}, "write causal_align='top_left'"),
        ({"bottleneck_dim": 0}, "bottleneck_dim=0 must be within 1..12"),
        ({"bottleneck_dim": T + 1}, "bottleneck_dim=13 must be within 1..12"),
        ({"n_layer": 0}, "n_layer=0 must be an integer >= 1"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(config(**changes))
