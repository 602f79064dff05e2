import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from nlpfast.models.gpt import GPT, GPT1Config, GPTConfig

V, T, N_LAYER, N_HEAD, C = 11, 8, 2, 4, 16


def config(**changes):
    fields = {"n_layer": N_LAYER, "n_head": N_HEAD, "n_embd": C, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    return GPTConfig(V, T, **{**fields, "attn_pdrop": 0.0, **changes})


def model(std=0.02, dtype=torch.float32, **changes):
    torch.manual_seed(1)
    gpt = GPT(config(**changes)).to(dtype)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.normal_(0.0, std)
    return gpt


def tokens(B=3, length=T, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(V, (B, length), generator=generator), torch.randint(
        V, (B, length), generator=generator
    )


def norm(x, weight, bias):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + bias


def linear(p, name, x):
    return x @ p[name + ".weight"].T + p[name + ".bias"]


def twin(p, idx, targets, ignore_index=-100):
    """The model from its formulas, a head at a time, on the parameters by name."""
    length = idx.shape[1]
    hidden = torch.ones(length, length).triu(1).bool()
    x = p["tok_emb.weight"][idx] + p["pos_emb"][:, :length]
    for n in range(N_LAYER):
        b = f"blocks.{n}."
        h = norm(x, p[b + "ln1.weight"], p[b + "ln1.bias"])
        q, k, v = (linear(p, b + "attn." + name, h) for name in ("query", "key", "value"))
        heads = []
        for columns in torch.arange(C).view(N_HEAD, -1):
            scores = q[..., columns] @ k[..., columns].transpose(1, 2) / math.sqrt(C / N_HEAD)
            weights = scores.masked_fill(hidden, -math.inf).exp()
            heads.append(weights / weights.sum(-1, keepdim=True) @ v[..., columns])
        x = x + linear(p, b + "attn.proj", torch.cat(heads, -1))
        h = linear(p, b + "mlp.0", norm(x, p[b + "ln2.weight"], p[b + "ln2.bias"]))
        x = x + linear(p, b + "mlp.2", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    logits = norm(x, p["ln_f.weight"], p["ln_f.bias"]) @ p["head.weight"].T
    counted = targets != ignore_index
    logp = logits.log_softmax(-1)[counted]
    return logits, -logp[torch.arange(len(logp)), targets[counted]].mean()


def twin_and_gradients(gpt, idx, targets, **options):
    p = {name: x.detach().double().requires_grad_() for name, x in gpt.named_parameters()}
    logits, loss = twin(p, idx, targets, **options)
    loss.backward()
    return logits, loss, {name: x.grad for name, x in p.items()}


@pytest.mark.parametrize("length", [1, 2, 5, T])
@pytest.mark.parametrize(
    ("dtype", "named", "std", "tolerance"),
    [
        (torch.float64, "reference", 0.3, 1e-11),
        (torch.float32, "reference", 0.05, 1e-5),
        (torch.float32, None, 0.05, 1e-5),
    ],
)
def test_equals_its_formulas(length, dtype, named, std, tolerance):
    gpt = model(std, dtype)
    for block in gpt.blocks:
        block.attn.backend = named
    idx, targets = tokens(length=length)
    logits, loss = gpt(idx, targets)
    loss.backward()
    expected_logits, expected_loss, gradients = twin_and_gradients(gpt, idx, targets)
    assert logits.shape == (3, length, V)
    assert logits.dtype == dtype
    assert (logits - expected_logits).abs().max() < tolerance
    assert (loss - expected_loss).abs() < tolerance
    for name, parameter in gpt.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < tolerance, name
    assert gpt(idx)[1] is None
    assert torch.equal(gpt(idx)[0], logits)
    assert torch.equal(gpt(idx, return_logits=False)[0], logits)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_loss_without_logits(dtype, tolerance):
    gpt = model(0.3, dtype)
    idx, targets = tokens()
    targets[:, ::2] = -100
    gpt.head.register_forward_hook(lambda *_: pytest.fail("all logits are computed"))
    logits, loss = gpt(idx, targets, return_logits=False)
    loss.backward()
    assert logits is None
    _, expected, gradients = twin_and_gradients(gpt, idx, targets)
    assert (loss - expected).abs() < tolerance
    for name, parameter in gpt.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < tolerance, name


def test_a_token_sees_nothing_after_it():
    gpt = model(0.3).eval()
    idx, other = tokens()
    for t in range(1, T):
        changed = torch.cat([idx[:, :t], other[:, t:]], 1)
        assert torch.equal(gpt(changed)[0][:, :t], gpt(idx)[0][:, :t])
        assert not torch.equal(gpt(changed)[0][:, t:], gpt(idx)[0][:, t:])


def test_state_dict_names_are_those_of_mingpt():
    layer = [f"{n}.{p}" for n in ("ln1", "ln2") for p in ("weight", "bias")]
    layer += [f"attn.{n}.{p}" for n in ("key", "query", "value", "proj") for p in ("weight", "bias")]
    layer += [f"mlp.{n}.{p}" for n in (0, 2) for p in ("weight", "bias")]
    names = {"tok_emb.weight", "pos_emb", "ln_f.weight", "ln_f.bias", "head.weight"}
    names |= {f"blocks.{n}.{name}" for n in range(N_LAYER) for name in layer}
    assert set(model().state_dict()) == names
    assert not list(model().named_buffers())


def test_loads_a_reference_state_dict():
    source, target = model(0.3), GPT(config())
    mask = torch.ones(1, 1, T, T).tril()
    state = {**source.state_dict(), **{f"blocks.{n}.attn.mask": mask for n in range(N_LAYER)}}
    target.load_state_dict(state, strict=True)
    idx, _ = tokens()
    assert torch.equal(target(idx)[0], source(idx)[0])
    assert "blocks.1.attn.mask" in state


@pytest.mark.parametrize("name", ["mask", "blocks.0.mask", "blocks.0.attn.masks", "blocks.2.attn.mask"])
def test_only_the_attention_masks_may_be_left_over(name):
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model().load_state_dict({**model().state_dict(), name: torch.ones(1)}, strict=True)


def test_initial_weights():
    torch.manual_seed(3)
    gpt = GPT(config(n_embd=64))
    for name, x in gpt.state_dict().items():
        if name.endswith("bias") or name == "pos_emb":
            assert not x.any(), name
        elif ".ln" in name or name.startswith("ln_f"):
            assert (x == 1).all(), name
        else:
            assert abs(x.mean()) < 0.004 and abs(x.std() - 0.02) < 0.002, name


def test_the_first_gpt_has_its_sizes():
    first = GPT1Config(V, T)
    assert (first.n_layer, first.n_head, first.n_embd) == (12, 12, 768)
    assert (first.embd_pdrop, first.resid_pdrop, first.attn_pdrop) == (0.1, 0.1, 0.1)
    small = GPT(GPT1Config(V, T, n_layer=1, n_head=2, n_embd=8))
    assert len(small.blocks) == 1
    assert small.get_block_size() == small.block_size == T


@pytest.mark.parametrize("pdrop", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_dropout_acts_in_training_only_and_follows_the_seed(pdrop):
    gpt = model(0.3, **{pdrop: 0.5})
    idx, _ = tokens()
    torch.manual_seed(4)
    first, second = gpt(idx)[0], gpt(idx)[0]
    torch.manual_seed(4)
    assert torch.equal(gpt(idx)[0], first)
    assert not torch.equal(first, second)
    plain = model(0.3)
    assert torch.equal(gpt.eval()(idx)[0], plain(idx)[0])


def test_a_block_whose_branches_are_dropped_adds_nothing():
    gpt = model(0.3, resid_pdrop=1.0)
    x = torch.randn(2, T, C)
    assert torch.equal(gpt.blocks(x), x)


@pytest.mark.parametrize("ignore_index", [-100, 0, -1])
def test_ignored_targets_do_not_count(ignore_index):
    gpt = model(0.3, torch.float64, ignore_index=ignore_index)
    idx, targets = tokens()
    targets[:, ::2] = ignore_index
    loss = gpt(idx, targets)[1]
    expected = twin_and_gradients(gpt, idx, targets, ignore_index=ignore_index)[1]
    assert (loss - expected).abs() < 1e-12


def test_takes_int32_and_compiles_whole():
    gpt = model(0.3).eval()
    idx, targets = tokens()
    logits, loss = gpt(idx, targets)
    assert torch.equal(gpt(idx.int())[0], logits)
    compiled_logits, compiled_loss = torch.compile(gpt, fullgraph=True, backend="aot_eager")(idx, targets)
    assert (compiled_logits - logits).abs().max() < 1e-5
    assert (compiled_loss - loss).abs() < 1e-5
    alone = torch.compile(gpt, fullgraph=True, backend="aot_eager")(idx, targets, return_logits=False)
    assert alone[0] is None and (alone[1] - loss).abs() < 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 0}, "config.n_layer=0 must be an integer >= 1"),
        ({"n_layer": 1.5}, "config.n_layer=1.5 must be an integer >= 1"),
        ({"n_head": 3}, "n_embd=16 must be a positive multiple of n_head=3"),
        ({"attn_pdrop": 1.5}, "config.attn_pdrop=1.5 must be a probability"),
        ({"embd_pdrop": float("nan")}, "config.embd_pdrop=nan must be a probability"),
        ({"resid_pdrop": "0.1"}, "config.resid_pdrop='0.1' must be a probability"),
        ({"n_layers": 3}, "n_layers=3 is not a field of GPTConfig; write n_layer=3"),
        ({"attn_drop": 0.1}, "attn_drop=0.1 is not a field of GPTConfig; write attn_pdrop=0.1"),
    ],
)
def test_a_wrong_configuration_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        GPT(config(**changes))
    assert message in str(error.value)


def test_sizes_that_were_not_given_are_named():
    with pytest.raises(ValueError, match=r"config\.n_layer=None must be an integer >= 1; pass n_layer="):
        GPT(GPTConfig(V, T))


def test_a_configuration_keeps_further_names():
    extended = config(bottleneck_dim=32, perceiver=False)
    assert (extended.bottleneck_dim, extended.perceiver) == (32, False)
    fields = extended.to_dict()
    assert fields["bottleneck_dim"] == 32 and fields["attn_pdrop"] == 0.0 and fields["ignore_index"] == -100
    assert vars(GPTConfig(**fields)) == fields


@pytest.mark.parametrize(
    ("idx", "targets", "message"),
    [
        ([1, 2], None, "idx has shape [2], expected [B, T]"),
        ([[0] * (T + 1)], None, f"idx has T={T + 1} tokens a row, block_size={T}"),
        ([[0, 1], [2, V]], None, f"idx[1, 1] is {V}, outside the vocabulary 0..{V - 1}"),
        ([[0, -1]], None, "idx[0, 1] is -1, outside the vocabulary"),
        ([[0, 1]], [[1]], "targets has shape [1, 1], idx [1, 2]"),
        ([[0, 1]], [[1, V]], f"target[0, 1] is {V}; it must be a class, 0..{V - 1}"),
        ([[0, 1]], [[-100, -2]], "target[0, 1] is -2; it must be a class"),
    ],
)
def test_wrong_tokens_are_refused(idx, targets, message):
    with pytest.raises(ValueError) as error:
        model()(torch.tensor(idx), None if targets is None else torch.tensor(targets))
    assert message in str(error.value)


def test_defaults_of_a_subclass_are_fields_too():
    class Mine(GPTConfig):
        n_layer, n_head, n_embd = 1, 1, 4
        n_heads = 2

    mine = Mine(V, T, n_heads=3)
    assert mine.n_heads == 3
    fields = Mine(V, T).to_dict()
    assert (fields["n_heads"], fields["n_embd"], fields["resid_pdrop"]) == (2, 4, 0.1)
    assert not [name for name in fields if name.startswith("_") or name == "to_dict"]


def test_only_weights_of_linear_layers_decay():
    gpt = model(0.3)
    options = SimpleNamespace(learning_rate=0.5, betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = gpt.configure_optimizers(options)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert all(group["lr"] == 0.5 and group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)
    before = {name: x.clone() for name, x in gpt.state_dict().items()}
    for parameter in gpt.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, x in gpt.state_dict().items():
        layer = name.removesuffix(".weight").split(".")[-1]
        decays = name.endswith(".weight") and layer in ("key", "query", "value", "proj", "0", "2", "head")
        assert torch.allclose(x, before[name] * (0.95 if decays else 1.0), rtol=1e-6, atol=0), name


@pytest.fixture
def one_thread():
    # many small steps on two threads are slow on a machine that does something else as well
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_it_learns():
    torch.manual_seed(5)
    gpt = GPT(config())
    optimizer = gpt.configure_optimizers(
        SimpleNamespace(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    )
    idx = torch.arange(T + 1).repeat(4, 1)
    losses = []
    for _ in range(100):
        loss = gpt(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - math.log(V)) < 0.1
    assert losses[-1] < 0.1


def test_logits_follow_the_weights_of_pytorch_modules():
    # the same layers called through torch's own functions, as a second opinion on the twin
    gpt = model(0.3, torch.float64)
    idx, _ = tokens()
    x = gpt.tok_emb(idx) + gpt.pos_emb
    for block in gpt.blocks:
        h = block.ln1(x)
        q, k, v = (
            layer(h).view(3, T, N_HEAD, -1).transpose(1, 2)
            for layer in (block.attn.query, block.attn.key, block.attn.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.attn.proj(y.transpose(1, 2).reshape(3, T, C))
        x = x + block.mlp(block.ln2(x))
    assert (gpt(idx)[0] - gpt.head(gpt.ln_f(x))).abs().max() < 1e-12
