"""The CUDA kernels of attention over few keys, by the emulator, against the definition in float64."""

import math
import os

import pytest
import torch
from torch import Tensor

from nlpfast import alignment_loss, attention, dispatch
from nlpfast.ops.varlen_attention import varlen_attention

EMULATED = True
pytestmark = pytest.mark.skipif("EMULATED_CUDA" not in os.environ, reason="make test-cuda emulates a device")

CAUSAL = {"none": 0, "top_left": 1, "bottom_right": 2}
SEED = torch.tensor([1234, 7])


def inputs(B: int, H: int, Hk: int, L: int, S: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(L * S + D)
    sizes = ((B, H, L, D), (B, Hk, S, D), (B, Hk, S, D))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def run(q: Tensor, k: Tensor, v: Tensor, causal: str = "none", **options) -> tuple[Tensor, Tensor]:
    """Run the kernel in memory that holds no numbers."""
    out = torch.full_like(q, torch.nan)
    names = ("key_lengths", "prefix_lengths", "cu_seq_q", "cu_seq_k")
    longest = options.get("longest", (q.shape[-2], k.shape[-2]))
    lse = torch.ops.nlpfast.cuda_attention_forward(
        *(q, k, v, *(options.get(name) for name in names), *longest, options.get("seed")),
        *(options.get("dropout_p", 0.0), CAUSAL[causal], q.shape[-1] ** -0.5, out),
    )
    return out, lse


def definition(q: Tensor, k: Tensor, v: Tensor, causal: str = "none", **options) -> tuple[Tensor, Tensor]:
    causal_options = {} if causal == "none" else {"is_causal": True, "causal_align": causal}
    return attention(
        *(x.double() for x in (q, k, v)), **causal_options, **options, return_lse=True, backend="reference"
    )


def assert_right(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    bound = 2e-2 if dtype == torch.bfloat16 else 3e-3
    for ours, exact in zip(found, expected, strict=True):
        assert torch.equal(ours.isinf(), exact.isinf()) and torch.equal(ours.isnan(), exact.isnan())
        finite = exact.isfinite()
        assert (ours.double() - exact)[finite].abs().max() < bound


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1), (16, 16), (17, 9), (64, 64), (33, 65), (5, 128), (100, 129), (20, 256), (130, 400)],
    ids=str,
)
def test_forward(sizes: tuple[int, int], dtype: torch.dtype, D: int, causal: str) -> None:
    q, k, v = inputs(2, 3, 3, *sizes, D, dtype)
    assert_right(run(q, k, v, causal), definition(q, k, v, causal), dtype)


@pytest.mark.parametrize("causal", CAUSAL)
def test_masks_and_grouped_heads(causal: str) -> None:
    q, k, v = inputs(4, 4, 2, 40, 50, 32, torch.bfloat16)
    lengths = {"key_lengths": torch.tensor([0, 1, 33, 50])}
    if causal != "none":
        lengths["prefix_lengths"] = torch.tensor([5, 0, 40, 20])
    found = run(q, k, v, causal, **lengths)
    assert_right(found, definition(q, k, v, causal, **lengths, enable_gqa=True), torch.bfloat16)
    assert not found[0][0].any() and found[1][0].isneginf().all()
    # what is no key may hold anything
    for b, n in enumerate(lengths["key_lengths"].tolist()):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.inf
    for ours, before in zip(run(q, k, v, causal, **lengths), found, strict=True):
        assert torch.equal(ours, before)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_that_of_the_definition(p: float) -> None:
    q, k, v = inputs(2, 2, 2, 37, 70, 32, torch.float16)
    found = run(q, k, v, "top_left", dropout_p=p, seed=SEED)
    expected = definition(q, k, v, "top_left", dropout_p=p, seed=SEED)
    assert_right(found, expected, torch.float16)


def test_packed_sequences() -> None:
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in inputs(1, 2, 2, 90, 90, 32, torch.bfloat16))
    ends = torch.tensor([0, 10, 10, 57, 90])
    found = run(q, k, v, "top_left", cu_seq_q=ends, cu_seq_k=ends, longest=(47, 47), dropout_p=0.2, seed=SEED)
    expected = varlen_attention(
        *(x.double() for x in (q, k, v)), ends, ends, 47, 47, is_causal=True, dropout_p=0.2, seed=SEED,
        return_lse=True, backend="reference",
    )  # fmt: skip
    assert_right((found[0], found[1].t()), expected, torch.bfloat16)


def test_heads_lie_anywhere() -> None:
    packed = torch.randn(2, 30, 3, 2, 32).half()
    q, k, v = packed.permute(2, 0, 3, 1, 4)
    assert_right(run(q, k, v), definition(q, k, v), torch.float16)
    found = run(*(x.contiguous() for x in (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(found, run(q, k, v), strict=True))


def results(backend: str, tensors: list[Tensor], upstream: list[Tensor], **options) -> list[Tensor]:
    """Output, lse, and the gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    found = attention(*leaves, **options, return_lse=True, backend=backend)
    return [x.detach() for x in found] + list(torch.autograd.grad(found, leaves, upstream))


def assert_as_defined(
    tensors: list[Tensor], dtype: torch.dtype, with_lse: bool = True, **options
) -> list[Tensor]:
    """Compare with the definition in float64; the errors are those of 16-bit weights and gradients."""
    q = tensors[0]
    upstream = [torch.randn(q.shape).to(dtype), torch.randn(q.shape[:-1]) * with_lse]
    found = results("cuda", tensors, upstream, **options)
    exact = results("reference", [x.double() for x in tensors], [x.double() for x in upstream], **options)
    step = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    for name, ours, expected in zip(("out", "lse", "dq", "dk", "dv"), found, exact, strict=True):
        assert ours.shape == expected.shape
        seen = expected.isfinite()
        assert torch.equal(ours.isfinite(), seen), name
        error = (ours.double() - expected)[seen].abs().max() if seen.any() else torch.zeros(())
        largest = expected[seen].abs().max() if seen.any() else torch.zeros(())
        assert error <= 4 * step * max(largest, 1.0), (name, error, largest)
    return found


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("D", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1),
        (16, 16),
        (17, 9),
        (64, 64),
        (33, 65),
        (150, 40),
        (128, 128),
        (100, 99),
        (60, 200),
        (140, 129),
        (33, 290),
    ],
    ids=str,
)
def test_gradients(sizes: tuple[int, int], dtype: torch.dtype, D: int, causal: str) -> None:
    kind = {} if causal == "none" else {"is_causal": True, "causal_align": causal}
    assert_as_defined(inputs(1, 2, 2, *sizes, D, dtype), dtype, **kind)


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize(("S", "length", "prefix"), [(50, 33, 20), (190, 150, 140)])
def test_gradients_of_grouped_heads_and_lengths(causal: str, S: int, length: int, prefix: int) -> None:
    tensors = inputs(3, 4, 2, 70, S, 32, torch.float16)
    options = {"key_lengths": torch.tensor([0, 1, length]), "enable_gqa": True}
    if causal != "none":
        options.update(is_causal=True, causal_align=causal, prefix_lengths=torch.tensor([5, 0, prefix]))
    _, _, dq, dk, dv = assert_as_defined(tensors, torch.float16, **options)
    assert not dq[0].any() and not dk[0].any() and not dv[2, :, length:].any()


@pytest.mark.parametrize("p", [0.1, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("L", "S"), [(90, 100), (200, 170)])
def test_gradients_with_dropout(p: float, dtype: torch.dtype, L: int, S: int) -> None:
    tensors = inputs(2, 2, 2, L, S, 32, dtype)
    # so that large factors do not make large errors
    tensors[2] *= 1 - min(p, 0.9)
    assert_as_defined(tensors, dtype, dropout_p=p, seed=SEED, is_causal=True)


def test_gradients_without_one_of_lse() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(1, 1, 1, 20, 20, 64, torch.float16))
    upstream = torch.randn(q.shape).half()
    found = torch.autograd.grad(attention(q, k, v, backend="cuda"), (q, k, v), upstream)
    exact = torch.autograd.grad(attention(q, k, v, backend="reference"), (q, k, v), upstream)
    for ours, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, expected, atol=4e-3, rtol=4e-3)


def test_gradients_lie_as_the_inputs() -> None:
    packed = torch.randn(2, 30, 3, 2, 32).half()
    q, k, v = (x.requires_grad_() for x in packed.permute(2, 0, 3, 1, 4))
    out = attention(q, k, v, is_causal=True, backend="cuda")
    assert out.stride() == q.new_empty(2, 30, 2, 32).transpose(1, 2).stride()
    found = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert all(x.stride() == out.stride() for x in found)
    same = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    out = attention(*same, is_causal=True, backend="cuda")
    again = torch.autograd.grad(out, same, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_rows_that_begin_anywhere_are_copied() -> None:
    storage = torch.randn(3, 2 * 2 * 20 * 33 + 1).half()
    odd = [x[1:].view(2, 2, 20, 33)[..., :32] for x in storage]
    upstream = [torch.ones(2, 2, 20, 32).half(), torch.zeros(2, 2, 20)]
    for ours, expected in zip(
        results("cuda", odd, upstream), results("cuda", [x.contiguous() for x in odd], upstream), strict=True
    ):
        assert torch.equal(ours, expected)


def test_pairs_are_added() -> None:
    """An alignment loss leaves its gradients to the kernel's."""
    q, k, v = (x.requires_grad_() for x in inputs(1, 2, 2, 12, 14, 32, torch.float16))
    pairs = torch.tensor([[0, 1, 2], [0, 5, 5]])
    found = []
    for backend in ("cuda", "reference"):
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
        loss = alignment_loss(q, k, lse, pairs) + out.float().sum()
        found.append(torch.autograd.grad(loss, (q, k, v)))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=8e-3, rtol=8e-3)


def test_what_is_refused() -> None:
    q, k, v = inputs(1, 1, 1, 4, 4, 32, torch.float16)
    refusal = dispatch.registry["attention"]["cuda"].refusal
    assert refusal(q, k, v, None, None, None) is None
    for changed, said in (
        ((q.float(), k.float(), v.float(), None), "computes in bfloat16 and float16"),
        ((q[..., :16], k[..., :16], v[..., :16], None), "got 16 and 16"),
        ((q, k, v[..., :16], None), "got 32 and 16"),
        ((q, k.expand(1, 1, 4, 32).repeat(1, 1, 129, 1), v, None), "got 516"),
        ((q, k, v, torch.ones(4, 4, dtype=torch.bool)), "no attn_mask"),
        ((q.to("meta"), k, v, None), "are on meta"),
    ):
        assert said in refusal(*changed, None, None)


def test_nothing_is_left_over() -> None:
    """Sizes of 0, and queries that see nothing."""
    for B, H, L, S in ((0, 1, 4, 4), (1, 1, 0, 4), (1, 2, 4, 0)):
        q, k, v = (x.requires_grad_() for x in inputs(B, H, H, L, S, 32, torch.float16))
        out, lse = attention(q, k, v, return_lse=True, backend="cuda")
        assert out.shape == q.shape and not out.any() and (lse == -math.inf).all()
        for x, grad in zip((q, k, v), torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
            assert grad.shape == x.shape and not grad.any()


PACKED = {
    "as many": ([5, 0, 31, 66, 1], [5, 0, 31, 66, 1]),
    "few and many": ([7, 100, 0, 16], [128, 1, 9, 0]),
    "more than a chunk": ([30, 140, 3], [200, 140, 0]),
    "none": ([], []),
}


@pytest.mark.parametrize("causal", CAUSAL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lengths", list(PACKED))
@pytest.mark.parametrize(("H", "Hk", "D", "p"), [(3, 3, 32, 0.0), (4, 2, 64, 0.2)])
def test_gradients_of_packed_sequences(
    lengths: str, dtype: torch.dtype, causal: str, H: int, Hk: int, D: int, p: float
) -> None:
    queries, keys = PACKED[lengths]
    generator = torch.Generator().manual_seed(len(queries))
    sizes = ((sum(queries), H, D), (sum(keys), Hk, D), (sum(keys), Hk, D))
    tensors = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    # rows that begin anywhere too
    tensors[1] = torch.cat((tensors[1], tensors[1][..., :4]), -1)[..., 3:-1].detach().requires_grad_()
    ends = [torch.tensor([0, *side]).cumsum(0).int() for side in (queries, keys)]
    upstream = torch.randn(sizes[0], generator=generator), torch.randn(sizes[0][:2], generator=generator)
    options = {
        "is_causal": causal != "none",
        "dropout_p": p,
        "seed": 5,
        "enable_gqa": True,
        "return_lse": True,
    }
    if causal != "none":
        options["causal_align"] = causal
    found = []
    for backend, wide in (("cuda", None), ("reference", None), ("reference", torch.float64)):
        inputs = [x if wide is None else x.detach().to(wide).requires_grad_() for x in tensors]
        longest = (max(queries, default=0), max(keys, default=0))
        out, lse = varlen_attention(*inputs, *ends, *longest, **options, backend=backend)
        some = lse.isfinite()
        loss = (out * upstream[0].to(out.dtype)).sum() + (lse[some] * upstream[1].to(lse.dtype)[some]).sum()
        found.append([out, *torch.autograd.grad(loss, inputs)])
    for ours, eager, exact in zip(*found, strict=True):
        assert ours.shape == exact.shape and ours.dtype == dtype
        if exact.numel():
            error, allowed = (ours.double() - exact).abs().max(), (eager.double() - exact).abs().max()
            assert error <= 2 * allowed + 2e-3


@pytest.mark.parametrize("scale", [-0.3, 0.0, 7.0])
@pytest.mark.parametrize("causal", ["none", "bottom_right"])
def test_scales(scale: float, causal: str) -> None:
    tensors = inputs(2, 2, 2, 40, 70, 32, torch.float16)
    options = {"scale": scale, **({} if causal == "none" else {"is_causal": True, "causal_align": causal})}
    assert_as_defined(tensors, torch.float16, **options)


def test_rows_that_lie_far_apart_are_copied() -> None:
    """Kernels count in 32 bits how far rows are from one another, in numbers."""
    cuda = dispatch.registry["attention"]["cuda"]
    memory = torch.empty(2**31 + 128, dtype=torch.float16)
    rows = [memory.as_strided((2, 1, 1, 64), (distance, 64, 64, 1)) for distance in (2**31 - 8, 2**31)]
    for x in rows:
        x.copy_(torch.arange(128.0).view(2, 1, 1, 64))
    near, far = (cuda.lying(x) for x in rows)
    assert near.data_ptr() == rows[0].data_ptr() and far.stride(0) == 64 and torch.equal(far, rows[1])
    # nobody goes along the first dimension
    assert cuda.lying(rows[1][:1]).data_ptr() == rows[1].data_ptr()
    with pytest.raises(RuntimeError, match="query has a size or a stride of over"):
        run(rows[1], rows[0], rows[0])
    reason = cuda.refusal(far.expand(2, 1, 2**25, 64), far, far, None, None, None)
    assert reason == f"it takes up to {2**31 - 1} numbers of a sequence's queries, and got {2**31}"


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("Hk", [1, 2, 3, 5])
def test_any_number_of_heads(Hk: int, group: int) -> None:
    """A block finds the sequence and the head of a number by a product and a shift."""
    q, k, v = inputs(7, group * Hk, Hk, 5, 6, 32, torch.float16)
    assert_right(run(q, k, v), definition(q, k, v, enable_gqa=True), torch.float16)
