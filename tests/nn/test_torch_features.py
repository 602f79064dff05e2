"""The drop-in modules under torch.compile, autocast, activation checkpointing and DistributedDataParallel."""

import pytest
import torch
from torch import nn
from torch.multiprocessing.spawn import spawn
from torch.utils.checkpoint import checkpoint

from benchmarks import originals as eager
from nlpfast import nn as fast

B, T, C = 4, 7, 12


class Multihead(fast.MultiheadAttention):
    """With the masks of a padded, causal call."""

    def forward(self, x):
        padding = torch.arange(T, device=x.device)[None] >= torch.tensor([[7], [5], [4], [6]])[: len(x)]
        return super().forward(x, x, x, key_padding_mask=padding, need_weights=False, is_causal=True)[0]


class Cross(fast.CausalCrossAttention):
    """With latents of its own."""

    def forward(self, x):
        return super().forward(x, self.key.weight[None, :4])


class Masked(fast.BertSelfAttention):
    """With padding."""

    def forward(self, x):
        mask = torch.zeros(1, 1, 1, T, dtype=x.dtype)
        return super().forward(x, mask.masked_fill(torch.arange(T) > 4, -10000.0))


BUILDS = {
    "CausalSelfAttention": lambda p: fast.CausalSelfAttention(eager.gpt_config(attn_pdrop=p)),
    "PackedCausalSelfAttention": lambda p: fast.PackedCausalSelfAttention(eager.gpt_config(attn_pdrop=p)),
    "CausalCrossAttention": lambda p: Cross(eager.gpt_config(attn_pdrop=p)),
    "BertSelfAttention": lambda p: Masked(eager.bert_config(attention_probs_dropout_prob=p)),
    "MultiheadAttention": lambda p: Multihead(C, 3, dropout=p, batch_first=True),
}
pytestmark = pytest.mark.parametrize("name", BUILDS)


def model(name, p=0.0):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(C, C), BUILDS[name](p), nn.Linear(C, C))


def sequences(batch=B, length=T):
    torch.manual_seed(2)
    return torch.randn(batch, length, C)


def results(call, module, x):
    x = x.clone().requires_grad_()
    y = call(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), (x, *module.parameters()))]


def assert_close(found, expected, tolerance):
    for mine, other in zip(found, expected, strict=True):
        assert mine.dtype == other.dtype
        assert other.abs().max() > 0
        assert (mine - other).abs().max() <= tolerance * max(1.0, other.abs().max())


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_break(name, dynamic):
    torch._dynamo.reset()
    module = model(name)
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for batch in (B, B - 1):
        x = sequences(batch)
        assert_close(results(compiled, module, x), results(module, module, x), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name, dtype):
    module, x = model(name), sequences()
    exact = results(module, module, x)
    with torch.autocast("cpu", dtype):
        found = results(module, module, x)
    assert found[0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in found[1:])
    for mine, other in zip(found, exact, strict=True):
        # the gradient of a key's bias is 0 but for rounding
        assert 0 < (mine.float() - other).abs().max() <= 0.05 * other.abs().max().clamp(min=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_redraws_the_same_dropout(name, reentrant):
    module, x = model(name, 0.3), sequences()
    torch.manual_seed(3)
    expected = results(module, module, x)
    torch.manual_seed(3)
    if reentrant:
        x = x.clone().requires_grad_()
        y = checkpoint(module, x, use_reentrant=True)
        y.square().sum().backward()
        found = [y, x.grad, *(p.grad for p in module.parameters())]
    else:
        found = results(lambda x: checkpoint(module, x, use_reentrant=False), module, x)
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)
    assert not torch.equal(results(module, module, sequences())[0], expected[0])


def train_a_rank(rank, name, folder):
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    module = model(name)
    parallel = nn.parallel.DistributedDataParallel(module)
    half = B // 2
    # the two halves have the same padding, since a batch of two has that of its first sequences
    parallel(sequences()[rank * half : (rank + 1) * half]).square().sum().backward()
    if rank == 0:
        torch.save([p.grad for p in module.parameters()], f"{folder}/gradients")
    # a process that leaves early is an error of the other
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_two_processes_average_the_gradients(name, tmp_path):
    spawn(train_a_rank, (name, str(tmp_path)), nprocs=2)
    found = torch.load(tmp_path / "gradients", weights_only=True)
    module, x = model(name), sequences()
    halves = [results(module, module, x[: B // 2])[2:], results(module, module, x[B // 2 :])[2:]]
    assert_close(found, [(a + b) / 2 for a, b in zip(*halves, strict=True)], 1e-5)
