"""The bottleneck: its formulas, what it does not see nor compute, and state dicts of the assignment."""

import math

import pytest
import torch

from nlpfast.models.gpt import GPT, GPTConfig
from nlpfast.models.perceiver import DownProjectBlock, UpProjectBlock

V, T, M, C, H, LAYERS = 11, 12, 5, 16, 4, 4


def config(**changes):
    fields = {"n_layer": LAYERS, "n_head": H, "n_embd": C, "perceiver": True, "bottleneck_dim": M}
    return GPTConfig(V, T, **{**fields, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0, **changes})


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


def norm(p, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    return centred * scale * p[f"{name}.weight"] + p[f"{name}.bias"]


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def attend(p, name, x_kv, x_q):
    """All keys and all queries, and a mask in which query i sees the keys 0..i."""
    q, k, v = (
        linear(p, f"{name}.{part}", x).unflatten(-1, (H, -1)).transpose(1, 2)
        for part, x in (("query", x_q), ("key", x_kv), ("value", x_kv))
    )
    hidden = torch.ones(q.shape[2], k.shape[2]).triu(1).bool()
    weights = (q @ k.mT / math.sqrt(C / H)).masked_fill(hidden, -math.inf).softmax(-1)
    return linear(p, f"{name}.proj", (weights @ v).transpose(1, 2).flatten(2))


def mlp(p, name, x):
    h = linear(p, f"{name}.mlp.0", norm(p, f"{name}.ln2", x))
    return x + linear(p, f"{name}.mlp.2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))


def twin(p, idx, normalize_query=False, residual=False):
    """The assignment's model from its formulas, with all of its latents and keys."""
    x = p["tok_emb.weight"][idx] + p["pos_emb"][:, : idx.shape[1]]
    latents = norm(p, "down_block.ln1", p["down_block.C"]).expand(len(idx), -1, -1)
    y = mlp(p, "down_block", attend(p, "down_block.attn", norm(p, "down_block.ln1", x), latents))
    for n in range(LAYERS - 2):
        h = norm(p, f"blocks.{n}.ln1", y)
        y = mlp(p, f"blocks.{n}", y + attend(p, f"blocks.{n}.attn", h, h))
    query = norm(p, "up_block.ln1", x) if normalize_query else x
    h = attend(p, "up_block.attn", norm(p, "up_block.ln1", y), query)
    x = mlp(p, "up_block", x + h if residual else h)
    return norm(p, "ln_f", x) @ p["head.weight"].T


@pytest.mark.parametrize("length", [1, 2, M - 1, M, M + 1, T])
@pytest.mark.parametrize("options", [{}, {"normalize_query": True}, {"residual": True}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "std", "tolerance"), [(torch.float64, 0.3, 1e-11), (torch.float32, 0.05, 1e-5)]
)
def test_equals_its_formulas(length, options, dtype, std, tolerance):
    gpt = model(dtype, std, **options)
    p = {name: x.detach().double().requires_grad_() for name, x in gpt.named_parameters()}
    idx, targets = tokens(length)
    logits, loss = gpt(idx, targets)
    expected = twin(p, idx, **options)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=tolerance)
    loss.backward()
    torch.nn.functional.cross_entropy(expected.flatten(0, 1), targets.flatten()).backward()
    for name, parameter in gpt.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(grad.double(), p[name].grad, rtol=0, atol=tolerance, msg=name)


def test_tokens_beyond_the_latents_pass_through_their_own_positions_alone():
    """Their gradient through the down block is exactly 0: not small, not there."""
    gpt = model()
    x = torch.randn(2, T, C, dtype=torch.float64, requires_grad=True)
    gpt.down_block(x).square().sum().backward()
    assert torch.equal(x.grad[:, M:], torch.zeros(2, T - M, C, dtype=torch.float64))
    assert bool((x.grad[:, :M] != 0).all())
    spoilt = x.detach().clone()
    spoilt[:, M:] = math.nan
    assert torch.equal(gpt.down_block(spoilt), gpt.down_block(x.detach()[:, :M]))
    idx, _ = tokens()
    before = gpt(idx)[0]
    changed = idx.clone()
    changed[:, M + 1] = (changed[:, M + 1] + 1) % V
    after = gpt(changed)[0]
    differs = (before != after).any(-1).any(0)
    assert differs.nonzero().flatten().tolist() == [M + 1]


def test_nothing_looks_ahead_and_unseen_latents_are_not_computed(monkeypatch):
    gpt = model()
    idx, _ = tokens()
    whole = gpt(idx)[0]
    for length in range(1, T):
        torch.testing.assert_close(gpt(idx[:, :length])[0], whole[:, :length], rtol=0, atol=1e-12)
    rows = []
    gpt.blocks[0].register_forward_pre_hook(lambda block, inputs: rows.append(inputs[0].shape[1]))
    gpt.down_block.ln1.register_forward_pre_hook(lambda block, inputs: rows.append(inputs[0].shape[1]))
    for length in (2, T):
        gpt(idx[:, :length])
    assert rows == [2, 2, 2, M, M, M]


def test_state_dicts_of_the_assignment_load():
    gpt = model()
    state = gpt.state_dict()
    names = {name.rpartition(".")[0] for name in state if "block." in name}
    assert {"down_block.attn.key", "down_block", "up_block.mlp.2", "up_block.ln1"} <= names
    assert "down_block.C" in state and state["down_block.C"].shape == (1, M, C)
    size = {"down_block": T, "up_block": T, "blocks.0": M, "blocks.1": M}
    masks = {f"{name}.attn.mask": torch.ones(n, n).tril().view(1, 1, n, n) for name, n in size.items()}
    other = GPT(config()).double()
    other.load_state_dict({**state, **masks})
    idx, _ = tokens()
    assert torch.equal(other(idx)[0], gpt(idx)[0])


def test_saved_and_read_again(tmp_path):
    gpt = model(torch.float32, normalize_query=True)
    gpt.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path)
    assert again.config.bottleneck_dim == M and again.config.normalize_query
    idx, _ = tokens()
    assert torch.equal(again(idx)[0], gpt.eval()(idx)[0])


def test_initial_latents():
    torch.manual_seed(0)
    drawn = DownProjectBlock(GPTConfig(V, 128, n_head=8, n_embd=256, bottleneck_dim=64)).C.detach()
    bound = math.sqrt(6 / (65 * 256))
    assert 0.98 * bound < drawn.abs().max() <= bound
    assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    options = {"n_head": 8, "n_embd": 256, "bottleneck_dim": 64, "latent_init": "normal"}
    drawn = DownProjectBlock(GPTConfig(V, 128, **options)).C.detach()
    assert drawn.std().item() == pytest.approx(0.02, rel=0.02)
    # the model's own initialisation leaves the latents alone, and has them not decay
    gpt = GPT(config())
    assert gpt.down_block.C.abs().max() <= math.sqrt(6 / ((M + 1) * C))
    optimizer = gpt.configure_optimizers(
        type("", (), {"learning_rate": 1, "betas": (0.9, 0.9), "weight_decay": 1})
    )
    assert any(p is gpt.down_block.C for p in optimizer.param_groups[1]["params"])
    assert isinstance(gpt.up_block, UpProjectBlock) and len(gpt.blocks) == LAYERS - 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bottleneck_dim": 0}, "bottleneck_dim=0 must be within 1..12"),
        ({"bottleneck_dim": T + 1}, "bottleneck_dim=13 must be within 1..12"),
        ({"n_layer": 1}, "n_layer=1 must be at least 2 with perceiver"),
        ({"latent_init": "uniform"}, "latent_init='uniform' must be one of xavier, normal"),
        ({"bottleneck_dims": 5}, "write bottleneck_dim=5"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GPT(config(**changes))
