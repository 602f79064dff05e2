"""accelerate(model) and undo(model): equal twins, what is printed, and what is left alone."""

import copy
import pickle
import re

import pytest
import torch
from torch import nn

import nlpfast
from benchmarks import originals as eager
from nlpfast import nn as fast

B, T, C = 2, 7, 12
BUILDS = {
    "minGPT 2020": (lambda: eager.CausalSelfAttention(eager.gpt_config()), fast.CausalSelfAttention),
    "minGPT 2023": (lambda: eager.Packed(eager.gpt_config()), fast.PackedCausalSelfAttention),
    "nanoGPT": (
        lambda: eager.Packed(eager.gpt_config(dropout=0.0, bias=False)),
        fast.PackedCausalSelfAttention,
    ),
    "CS224N": (lambda: eager.CausalCrossAttention(eager.gpt_config()), fast.CausalCrossAttention),
    "minBERT": (lambda: eager.BertSelfAttention(eager.bert_config()), fast.BertSelfAttention),
    "transformers 4": (lambda: eager.TupleBert(eager.bert_config()), fast.BertSelfAttention),
}


def model(build, dtype=torch.float32):
    torch.manual_seed(1)
    return nn.ModuleList([eager.Layer(build()) for _ in range(2)]).to(dtype)


def inputs(name, dtype=torch.float32):
    x = torch.randn(B, T, C, generator=torch.Generator().manual_seed(2), dtype=dtype).requires_grad_()
    if name == "CS224N":
        return x, torch.randn(1, 4, C, generator=torch.Generator().manual_seed(3), dtype=dtype)
    if "BERT" in name or "transformers" in name:
        mask = torch.zeros(B, 1, 1, T, dtype=dtype)
        mask[0, ..., 4:] = -10000.0
        return x, mask
    return (x,)


def run(stack, arguments):
    """Return the outputs of every layer, and the gradients of the input and the parameters."""
    x, *others = arguments
    results = []
    for layer in stack:
        if others and others[0].dim() == 3:
            # of a bottleneck: what is attended to, and the latents; Layer adds to the queries
            y = layer.attn(layer.ln(x), layer.ln(others[0]))
        else:
            y = layer(x, *others)
        results.append(y)
    total = sum((y.square()).sum() for y in results)
    return [*results, *torch.autograd.grad(total, (x, *stack.parameters()), allow_unused=True)]


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_results_gradients_and_state_dict_are_those_of_the_twin(name, dtype, tolerance, capsys):
    build, ours = BUILDS[name]
    before, after = model(build, dtype), model(build, dtype)
    parameters = dict(after.named_parameters())
    assert nlpfast.accelerate(after) is after
    assert "2 x benchmarks.originals." in capsys.readouterr().out
    assert all(type(layer.attn) is ours for layer in after)
    assert list(after.state_dict()) == list(before.state_dict())
    assert all(parameters[key] is p for key, p in after.named_parameters())
    after.load_state_dict(before.state_dict(), strict=True)
    arguments = inputs(name, dtype)
    others = (arguments[0], arguments[0][:, :4]) if name == "CS224N" else arguments
    assert type(after[0].attn(*others)) is type(before[0].attn(*others))
    for mine, other in zip(run(after, arguments), run(before, arguments), strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert other.abs().max() > 0
            assert (mine - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("copied", [False, True])
def test_undo_gives_the_same_bits(name, copied, capsys):
    stack = model(BUILDS[name][0])
    classes = [type(m) for m in stack.modules()]
    arguments = inputs(name)
    expected = run(stack, arguments)
    state = {key: dict(vars(m)) for key, m in stack.named_modules()}
    nlpfast.accelerate(stack)
    assert [type(m) for m in stack.modules()] != classes
    if copied:
        stack = copy.deepcopy(stack)
    assert nlpfast.undo(stack) is stack
    assert capsys.readouterr().out.endswith("nlpfast: 2 switched back\n")
    assert [type(m) for m in stack.modules()] == classes
    assert {key: list(vars(m)) for key, m in stack.named_modules()} == {k: list(v) for k, v in state.items()}
    for mine, other in zip(run(stack, arguments), expected, strict=True):
        assert mine is other is None or torch.equal(mine, other)


def test_what_is_printed(capsys):
    stack = nn.ModuleDict(
        {
            "gpt": model(BUILDS["minGPT 2020"][0]),
            "many": nn.ModuleList(nn.MultiheadAttention(C, 3) for _ in range(5)),
            "odd": nn.MultiheadAttention(C, 3, add_zero_attn=True),
        }
    )
    nlpfast.accelerate(stack)
    assert capsys.readouterr().out.splitlines() == [
        "nlpfast: 2 x benchmarks.originals.CausalSelfAttention -> nlpfast.nn.CausalSelfAttention "
        "(gpt.0.attn, gpt.1.attn)",
        "nlpfast: 5 x torch.nn.modules.activation.MultiheadAttention -> nlpfast.nn.MultiheadAttention "
        "(many.0, many.1, and 3 more)",
        "nlpfast: not switched: 1 x torch.nn.modules.activation.MultiheadAttention (odd): "
        "add_bias_kv and add_zero_attn are computed by PyTorch alone",
    ]
    nlpfast.accelerate(stack)
    assert capsys.readouterr().out.splitlines()[0].startswith("nlpfast: not switched: 1 x torch.nn")
    nlpfast.undo(stack)
    assert capsys.readouterr().out == "nlpfast: 7 switched back\n"
    nlpfast.accelerate(nn.Linear(2, 2))
    assert capsys.readouterr().out == "nlpfast: nothing to switch\n"
    alone = nn.MultiheadAttention(C, 3)
    nlpfast.accelerate(alone)
    assert type(alone) is fast.MultiheadAttention
    assert "(the model itself)" in capsys.readouterr().out


def named(name, base, **members):
    return type(name, (base,), {"__module__": __name__, **members})


def wrong_scale(self, x, layer_past=None):
    return eager.CausalSelfAttention.forward(self, 1.1 * x)


def not_causal(self, x, layer_past=None):
    self.mask.fill_(1.0)
    return eager.CausalSelfAttention.forward(self, x)


def no_dropout(self, query, key, value, mask):
    weights = (query @ key.mT / 2 + mask).softmax(-1)
    return eager.rows_first(weights @ value)


SPECIAL = {
    "another result": (
        lambda: named("CausalSelfAttention", eager.CausalSelfAttention, forward=wrong_scale)(
            eager.gpt_config()
        ),
        "a trial call gives another result",
    ),
    "not causal": (
        lambda: named("CausalSelfAttention", eager.CausalSelfAttention, forward=not_causal)(
            eager.gpt_config()
        ),
        "a trial call gives another result",
    ),
    "another method": (
        lambda: named("CausalSelfAttention", eager.CausalSelfAttention, scores=lambda self: 1)(
            eager.gpt_config()
        ),
        "it has methods that nlpfast.nn.CausalSelfAttention lacks: scores",
    ),
    "other layers": (
        lambda: named("CausalSelfAttention", nn.Linear)(C, C),
        "it has other layers than that class should",
    ),
    "no dropout layer": (
        lambda: named("BertSelfAttention", nn.MultiheadAttention, key=None, query=None, value=None)(C, 3),
        "it lacks the layer dropout",
    ),
    "another signature": (
        lambda: named("CausalSelfAttention", eager.CausalCrossAttention)(eager.gpt_config()),
        "a trial call failed: .*missing 1 required positional argument",
    ),
    "dropout is not applied": (
        lambda: named("BertSelfAttention", eager.BertSelfAttention, _mix=no_dropout)(
            eager.bert_config(attention_probs_dropout_prob=0.1)
        ),
        "it does not apply its dropout, p=0.1: set p=0 there first",
    ),
    "no values": (
        lambda: eager.CausalSelfAttention(eager.gpt_config()).to("meta"),
        "a trial call",
    ),
}


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("training", [False, True])
def test_what_computes_something_else_is_left_alone(name, training, capsys):
    build, reason = SPECIAL[name]
    module = build().train(training)
    kind, state, rng = type(module), dict(vars(module)), torch.get_rng_state()
    nlpfast.accelerate(nn.ModuleList([module]))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"nlpfast: not switched: 1 x {kind.__module__}.{kind.__name__} (0): ")
    assert re.search(reason, line), line
    assert type(module) is kind
    assert dict(vars(module)) == state
    assert all(part.training == training for part in module.modules())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("training", [False, True])
def test_a_trial_leaves_no_trace(training):
    stack = model(BUILDS["minGPT 2020"][0]).train(training)
    weights = {key: x.clone() for key, x in stack.state_dict().items()}
    rng = torch.get_rng_state()
    nlpfast.accelerate(stack)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(x, weights[key]) for key, x in stack.state_dict().items())
    assert all(p.grad is None for p in stack.parameters())
    assert all(part.training == training for part in stack.modules())


def transformer(kind, dtype=torch.float64):
    torch.manual_seed(1)
    options = {"dim_feedforward": 24, "dropout": 0.0, "batch_first": True, "dtype": dtype}
    if kind == "encoder":
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(C, 4, **options), 2)
    if kind == "decoder":
        return nn.TransformerDecoder(nn.TransformerDecoderLayer(C, 4, **options), 2)
    return nn.Transformer(C, 4, 2, 2, **options)


def masks(kind, causal, padded):
    padding = torch.arange(T)[None] >= torch.tensor([T, 4])[:, None]
    square = torch.ones(T, T, dtype=torch.bool).triu(1)
    prefix = {"encoder": "src_", "decoder": "tgt_", "both": "tgt_"}[kind]
    options = {}
    if padded:
        options[prefix + "key_padding_mask"] = padding
        if kind != "encoder":
            options["memory_key_padding_mask"] = padding
    if causal:
        options |= {"mask": square} if kind == "encoder" else {"tgt_mask": square}
    return options, ~padding if padded else torch.ones_like(padding)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", ["encoder", "decoder", "both"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_torch_transformers(kind, training, causal, padded, capsys):
    before, after = transformer(kind).train(training), transformer(kind).train(training)
    nlpfast.accelerate(after)
    count = {"encoder": 2, "decoder": 4, "both": 6}[kind]
    assert f"{count} x torch.nn.modules.activation.MultiheadAttention ->" in capsys.readouterr().out
    options, visible = masks(kind, causal, padded)
    arguments = [torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)]
    if kind != "encoder":
        arguments.append(torch.randn(B, T, C, dtype=torch.float64, requires_grad=True))
    results = []
    for which in (after, before, nlpfast.undo(after)):
        with torch.set_grad_enabled(training):
            out = which(*arguments, **options)[visible]
        grads = torch.autograd.grad(out.square().sum(), (*arguments, *which.parameters())) if training else ()
        results.append((out, *grads))
    for mine, other, undone in zip(results[0], results[1], results[2], strict=True):
        assert (mine - other).abs().max() <= 1e-11 * max(1.0, other.abs().max())
        assert torch.equal(undone, other)


def test_switched_modules_pickle_and_train_on():
    stack = model(BUILDS["minGPT 2020"][0])
    optimizer = torch.optim.SGD(stack.parameters(), lr=1e-3)
    nlpfast.accelerate(stack)
    arguments = inputs("minGPT 2020")
    first = sum(layer(*arguments).square().sum() for layer in stack)
    first.backward()
    optimizer.step()
    assert sum(layer(*arguments).square().sum() for layer in stack) < first
    again = pickle.loads(pickle.dumps(stack))
    assert torch.equal(again[0](*arguments), stack[0](*arguments))
    assert type(nlpfast.undo(again)[0].attn) is eager.CausalSelfAttention


class Model(nn.Module):
    """Tokens to logits; with `latents` through CS224N's bottleneck, down and up."""

    def __init__(self, build, latents: bool):
        super().__init__()
        self.tokens = nn.Embedding(20, C)
        self.latents = nn.Parameter(torch.randn(1, 3, C)) if latents else None
        self.layers = nn.ModuleList(eager.Layer(build()) for _ in range(2))
        self.head = nn.Linear(C, 20, bias=False)

    def forward(self, tokens):
        x = self.tokens(tokens)
        if self.latents is None:
            for layer in self.layers:
                x = layer(x)
            return self.head(x)
        down, up = self.layers
        h = down.attn(x_kv=down.ln(x), x_q=down.ln(self.latents))
        return self.head(up.attn(x_kv=up.ln(h + down.mlp(down.ln2(h))), x_q=x))


@pytest.mark.parametrize("name", ["minGPT 2020", "minGPT 2023", "nanoGPT", "CS224N"])
def test_logits_of_whole_models(name, capsys):
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(Model(BUILDS[name][0], latents=name == "CS224N").double())
    before, after = models
    nlpfast.accelerate(after)
    assert "2 x benchmarks.originals." in capsys.readouterr().out
    tokens = torch.randint(20, (B, T))
    found, expected = after(tokens), before(tokens)
    assert (found - expected).abs().max() < 1e-12
    upstream = torch.randn_like(expected)
    grads = [
        torch.autograd.grad(y, list(m.parameters()), upstream, allow_unused=True)
        for y, m in ((found, after), (expected, before))
    ]
    for (key, _), mine, other in zip(before.named_parameters(), *grads, strict=True):
        assert (mine is None) == (other is None), key
        assert mine is None or (mine - other).abs().max() < 1e-11, key
    after.load_state_dict(before.state_dict(), strict=True)
    before.load_state_dict(after.state_dict(), strict=True)
    assert torch.equal(nlpfast.undo(after)(tokens), expected)
