"""The two-layer network, and what stands between the parts of a layer: fused or not, the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nlpfast.models.gpt import GPT, Block, GPTConfig
from nlpfast.nn import network
from nlpfast.nn.joined import joined_on, joins
from nlpfast.nn.network import Network, linear_gelu, linear_relu
from nlpfast.nn.residual import Stream


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of what went through the fused ops."""
    shapes = []

    def watched(right):
        return lambda x, *args, **kwargs: (shapes.append(x.shape), right(x, *args, **kwargs))[1]

    for name in ("bias_gelu", "bias_relu"):
        monkeypatch.setattr(network, name, watched(getattr(network, name)))
    return shapes


@pytest.mark.parametrize("kind", ["none", "tanh", "relu"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_and_activation_are_the_two_modules(fused, kind, bias):
    linear, x = nn.Linear(5, 12, bias=bias), torch.randn(2, 3, 5, requires_grad=True)
    leaves, upstream = (x, *linear.parameters()), torch.randn(2, 3, 12)
    if kind == "relu":
        found, want = linear_relu(x, linear), F.relu(linear(x))
    else:
        found, want = linear_gelu(x, linear, kind), F.gelu(linear(x), approximate=kind)
    assert fused == [(2, 3, 12)]
    torch.testing.assert_close(found, want)
    for a, b in zip(
        torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_under_autocast_the_result_is_what_the_next_layer_reads(fused):
    net, x = Network(16, 0.0), torch.randn(9, 16)
    with torch.autocast("cpu", torch.bfloat16):
        middle = linear_gelu(x, net[0])
        assert middle.dtype == torch.bfloat16 and net(x).dtype == torch.bfloat16
        net(x).float().sum().backward()
    assert len(fused) == 3
    assert net[0].bias.grad.dtype == torch.float32
    torch.testing.assert_close(middle.float(), F.gelu(net[0](x)), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "register",
    [
        nn.Module.register_forward_hook,
        nn.Module.register_forward_pre_hook,
        nn.Module.register_full_backward_hook,
        nn.Module.register_full_backward_pre_hook,
    ],
)
def test_hooks_of_the_linear_layer_are_called(fused, register):
    linear, calls = nn.Linear(5, 12), []
    handle = register(linear, lambda *_: calls.append(1))
    x = torch.randn(3, 5, requires_grad=True)
    linear_gelu(x, linear).sum().backward()
    assert calls and not fused
    handle.remove()
    linear_gelu(x, linear)
    assert len(calls) == 1 and len(fused) == 1


def test_a_layer_of_another_class_and_other_dtypes_do_their_own_work(fused):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    linear, x = Doubled(5, 12), torch.randn(3, 5)
    assert torch.equal(linear_gelu(x, linear), F.gelu(linear(x)))
    assert torch.equal(linear_relu(x, linear), F.relu(linear(x)))
    plain, wide = nn.Linear(5, 12).double(), x.double()
    assert torch.equal(linear_gelu(wide, plain), F.gelu(plain(wide)))
    assert not fused


def test_the_network_drops_its_output_or_leaves_it_to_the_caller():
    net, x = Network(6, 0.5), torch.randn(40, 6)
    kept = net(x, drop_output=False)
    assert torch.equal(kept, net.eval()(x)) and (kept != 0).all()
    dropped = net.train()(x)
    share = (dropped == 0).double().mean()
    assert 0.3 < share < 0.7
    torch.testing.assert_close(dropped[dropped != 0], 2 * kept[dropped != 0])


def test_a_stream_adds_up():
    x, part = torch.randn(3, 4), torch.randn(3, 4)
    assert Stream(x).total() is x
    assert torch.equal(Stream(x, part, nn.Dropout(0.0)).total(), x + part)
    assert torch.equal(Stream(x, part, nn.Dropout(1.0)).total(), x)


def test_layers_of_a_model_are_blocks_one_after_the_other():
    """With tensors between them, or with sums that are left to the next norm."""
    gpt = GPT(GPTConfig(11, 8, n_layer=3, n_head=2, n_embd=16))
    x = torch.randn(2, 8, 16, requires_grad=True)
    gpt.eval()
    apart = x
    for block in gpt.blocks:
        apart = block(apart)
    together = gpt._through_blocks(x).total()
    torch.testing.assert_close(together, apart)
    upstream = torch.randn_like(x)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, upstream)[0] for y in (together, apart)))


def test_hooks_of_a_block_see_tensors():
    gpt = GPT(GPTConfig(11, 8, n_layer=3, n_head=2, n_embd=16)).eval()
    idx, seen = torch.randint(11, (2, 8)), {}
    before = gpt(idx)[0]
    for n in (0, 2):
        gpt.blocks[n].register_forward_hook(lambda _, args, out, n=n: seen.update({n: (args[0], out)}))
    torch.testing.assert_close(gpt(idx)[0], before)
    assert {n: [x.shape for x in pair] for n, pair in seen.items()} == dict.fromkeys((0, 2), [(2, 8, 16)] * 2)
    torch.testing.assert_close(Block.forward(gpt.blocks[2], seen[2][0]), seen[2][1])


@pytest.mark.parametrize("name", ["ln_f", "blocks.1.ln1", "blocks.1.ln2"])
def test_hooks_of_a_norm_are_called(name):
    gpt = GPT(GPTConfig(11, 8, n_layer=3, n_head=2, n_embd=16)).eval()
    idx, seen = torch.randint(11, (2, 8)), []
    before = gpt(idx)[0]
    gpt.get_submodule(name).register_forward_hook(
        lambda module, args, out: seen.append((module, args[0], out))
    )
    torch.testing.assert_close(gpt(idx)[0], before)
    ((norm, x, out),) = seen
    torch.testing.assert_close(F.layer_norm(x, (16,), norm.weight, norm.bias), out)


def test_a_norm_of_another_class_does_its_own_work():
    gpt, idx = GPT(GPTConfig(11, 8, n_layer=2, n_head=2, n_embd=16)).eval(), torch.randint(11, (2, 8))
    gpt.ln_f = nn.Identity()
    assert torch.equal(gpt(idx)[0], gpt.head(gpt._last_layer(idx).total()))


def test_another_activation_or_a_hook_on_it_is_heeded(fused):
    net, x, seen = Network(6, 0.0), torch.randn(3, 6), []
    net[1].register_forward_hook(lambda module, args, out: seen.append(out))
    net(x)
    assert torch.equal(seen[0], F.gelu(net[0](x)))
    net[1] = nn.ReLU()
    assert torch.equal(net(x), net[2](F.relu(net[0](x)))) and not fused
    net[1] = nn.GELU("tanh")
    torch.testing.assert_close(net(x), net[2](F.gelu(net[0](x), approximate="tanh")))
    assert len(fused) == 1


def test_operations_are_joined_on_cpus_and_where_one_asks_for_it() -> None:
    cpu, other = torch.empty(1), torch.empty(1, device="meta")
    assert joins(cpu) and not joins(other)
    with joined_on("meta"):
        with joined_on("cpu"), joined_on("meta"):
            assert joins(other)
        assert joins(cpu) and joins(other)
    assert joins(cpu) and not joins(other)
