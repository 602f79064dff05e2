"""Alignment loss on a CUDA device: values, gradients through attention, graphs, streams, odd pairs."""

import pytest
import torch
from test_alignment_loss import HEADS, drawn
from torch import Tensor

from nlpfast import alignment_loss, attention, attention_at, dispatch
from nlpfast.testing import make_inputs

OP = "alignment_loss"
DEVICE = "cuda"
pytest.importorskip("nlpfast.ops.alignment_loss.triton")
pytestmark = pytest.mark.cuda

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results(tensors: list[Tensor], pairs: Tensor, linked: bool = True, **options) -> list[Tensor]:
    """Loss and gradients of attention and alignment loss together."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse = attention(*leaves, enable_gqa=True, return_lse=True)
    query = leaves[0] if linked else leaves[0] * 1
    loss = alignment_loss(query, leaves[1], lse, pairs, **options)
    return [loss.detach(), *torch.autograd.grad(out.float().square().sum() + loss.sum(), leaves)]


def inputs(dtype: torch.dtype, P: int = 60, D: int = 64) -> tuple[list[Tensor], Tensor]:
    tensors = make_inputs(4, 8, 33, 40, D, Hk=4, Dv=64, dtype=dtype, device=DEVICE)
    return list(tensors), drawn(P, 4, 33, 40).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("D", [64, 33])
def test_equals_the_definition(dtype: torch.dtype, heads: object, linked: bool, D: int) -> None:
    tensors, pairs = inputs(dtype, D=D)
    found = results(tensors, pairs, linked, heads=heads, reduction="none")
    exact = results([x.double().cpu() for x in tensors], pairs.cpu(), heads=heads, reduction="none")
    assert (found[0].double().cpu() - exact[0]).abs().max() < 1e-4
    limit = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    for a, b in zip(found[1:], exact[1:], strict=True):
        assert a.dtype == dtype
        assert (a.double().cpu() - b).abs().max() <= limit * (1 + b.abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time_and_nothing_waits(dtype: torch.dtype) -> None:
    tensors, pairs = inputs(dtype, 500)
    wanted = results(tensors, pairs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(250):
            found = results(tensors, pairs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_cuda_graph() -> None:
    tensors, pairs = inputs(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            results(tensors, pairs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(tensors, pairs)
    for seed in range(3):
        pairs.copy_(drawn(60, 4, 33, 40, seed))
        for x in tensors:
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        for a, b in zip(captured, results(tensors, pairs), strict=True):
            assert torch.equal(a, b)


def test_pairs_that_are_not_there() -> None:
    tensors, pairs = inputs(torch.float32)
    _, lse = attention(*tensors, enable_gqa=True, return_lse=True)
    wrong = torch.cat((pairs, torch.tensor([[4, 0, 0], [0, 33, 0], [0, 0, -1]], device=DEVICE)))
    weights = torch.ones(len(wrong), device=DEVICE)
    leaves = [x.requires_grad_() for x in (tensors[0], tensors[1], lse)]
    losses = alignment_loss(*leaves, wrong, weights, reduction="none")
    assert losses[-3:].isnan().all() and torch.isfinite(losses[:-3]).all()
    for a, b in zip(
        torch.autograd.grad(losses[:-3].sum(), leaves),
        torch.autograd.grad(alignment_loss(*leaves, pairs, weights[:-3]), leaves),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert alignment_loss(*leaves, wrong).isnan()
    torch.cuda.synchronize()
    assert torch.isfinite(attention_at(*leaves, pairs)).all()


def test_another_stream() -> None:
    tensors, pairs = inputs(torch.bfloat16)
    wanted = results(tensors, pairs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        found = results([x.clone() for x in tensors], pairs)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_compile() -> None:
    torch._dynamo.reset()
    tensors, pairs = inputs(torch.float32)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = attention(q * 2, k, v, enable_gqa=True, return_lse=True)
        return out.sum() + alignment_loss(q * 2, k, lse, pairs)

    found = []
    for function in (torch.compile(total, fullgraph=True), total):
        leaves = [x.detach().requires_grad_() for x in tensors]
        value = function(*leaves)
        found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_choice_of_the_backend() -> None:
    tensors, pairs = inputs(torch.bfloat16)
    request = (*tensors[:2], torch.empty(4, 8, 33, device=DEVICE), pairs)
    assert dispatch.choose(OP, DEVICE, None, request) is dispatch.registry[OP]["triton"]
