"""The compiled operations themselves: PyTorch's own checks, argument checks, every instruction set."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from nlpfast import attention, native
from nlpfast.testing import make_inputs

LEVELS = ("DEFAULT", "AVX2", "AVX512", "AVX512_BF16", "AVX512_AMX")
OPS = torch.ops.nlpfast


def arguments(dropout_p: float, requires_grad: bool = False) -> tuple:
    query, key, value = make_inputs(2, 4, 5, 7, 8, Hk=2, Dv=6, requires_grad=requires_grad)
    seed = torch.tensor([5, 6]) if dropout_p else None
    mask = torch.randn(2, 1, 5, 7)
    lengths, prefix = torch.tensor([3, 7]), torch.tensor([0, 2])
    return query, key, value, mask, lengths, prefix, seed, dropout_p, 1, 0.3


def backward_arguments(dropout_p: float, requires_grad: bool = False) -> tuple:
    forward = (*arguments(dropout_p, requires_grad), True)
    results = OPS.attention_forward(*(x.detach() if isinstance(x, torch.Tensor) else x for x in forward[:-1]))
    grad_out = torch.randn_like(results[0]).requires_grad_(requires_grad)
    pairs = torch.tensor([[0, 1, 2], [1, 4, 0], [0, 1, 2]]), torch.randn(3, 4)
    return grad_out, torch.randn_like(results[1]), *forward[:3], *results, *forward[3:], *pairs


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck(dropout_p: float) -> None:
    opcheck(OPS.attention_forward, arguments(dropout_p))
    opcheck(OPS.attention_backward, backward_arguments(dropout_p))


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_opcheck_with_inputs_that_require_grad(dropout_p: float) -> None:
    # Autograd belongs to attention(), not to the operations: PyTorch warns whoever differentiates these.
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        opcheck(OPS.attention_forward, arguments(dropout_p, requires_grad=True))
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        opcheck(OPS.attention_backward, backward_arguments(dropout_p, requires_grad=True))


def replaced(position: int, value: object) -> tuple:
    new = list(arguments(0.2))
    new[position] = value
    return tuple(new)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (replaced(0, torch.randn(2, 4, 5, 8).double()), "query must be float32, bfloat16 or float16"),
        (replaced(1, torch.randn(2, 2, 7, 8).half()), "key must have the dtype of query"),
        (replaced(2, torch.randn(2, 2, 7, 6).bfloat16()), "value must have the dtype of query"),
        (replaced(0, torch.randn(4, 5, 8)), "query must have 4 dimensions"),
        (replaced(0, torch.randn(2, 3, 5, 8)), "must be a multiple of the 2 heads"),
        (replaced(1, torch.randn(2, 2, 7, 9)), "key must have size 8 in dimension 3"),
        (replaced(2, torch.randn(2, 2, 6, 6)), "value must have size 7 in dimension 2"),
        (replaced(2, torch.randn(2, 2, 7, 257)), "at most 256, got 8 .* and 257"),
        (replaced(3, torch.randn(5, 7)), "attn_mask must have 4 dimensions"),
        (replaced(3, torch.randn(2, 1, 5, 6)), "attn_mask has size 6 in dimension 3; it must be 1 or 7"),
        (replaced(3, torch.randn(2, 1, 5, 7).double()), "attn_mask, unless bool, must be float32"),
        (replaced(4, torch.tensor([3, 8])), r"key_lengths\[1\] is 8; it must be within 0..7"),
        (replaced(4, torch.tensor([-1, 7])), r"key_lengths\[0\] is -1"),
        (replaced(4, torch.tensor([3])), "key_lengths must be contiguous"),
        (replaced(4, torch.tensor([3, 4], dtype=torch.int32)), "key_lengths must be int64"),
        (replaced(5, torch.tensor([3, 8])), r"prefix_lengths\[1\] is 8"),
        (replaced(6, None), "seed must be given"),
        (replaced(6, torch.tensor([1])), "seed must be contiguous"),
        (replaced(7, 1.5), r"dropout_p must be in \[0, 1\]"),
        (replaced(8, 3), "causal must be 0, 1 or 2"),
    ],
)
def test_bad_arguments_are_refused(changed: tuple, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        OPS.attention_forward(*changed)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.randn(2, 4, 5, 7), "grad_out must have size 6"),
        (1, torch.randn(2, 4, 4), "grad_lse must have size 5"),
        (5, torch.randn(2, 4, 4, 6), "out must have size 5"),
        (6, torch.randn(2, 3, 5), "lse must have size 4"),
        (7, torch.randn(2, 4, 6), "lse_low must have size 5"),
        (8, None, "mask_gradient needs a floating attn_mask"),
        (8, torch.ones(2, 1, 5, 7, dtype=torch.bool), "mask_gradient needs a floating attn_mask"),
        (16, torch.tensor([[0, 1, 2], [2, 0, 0], [0, 0, 0]]), "pair 1 lies outside"),
        (16, torch.tensor([[0, 1, 2], [0, 0, 0], [0, 5, 0]]), "pair 2 lies outside"),
        (16, torch.tensor([[0, 1, -1], [0, 0, 0], [0, 0, 0]]), "pair 0 lies outside"),
        (16, torch.tensor([[0, 1, 7], [0, 0, 0], [0, 0, 0]]), "pair 0 lies outside"),
        (16, torch.zeros(3, 2, dtype=torch.int64), "pairs must be contiguous"),
        (16, torch.zeros(2, 3, dtype=torch.int64), "pair_gradients must have size 2"),
        (16, None, "belong together"),
        (17, torch.zeros(3, 3), "pair_gradients must have size 4"),
        (17, torch.zeros(4, 3).T, "pair_gradients must be contiguous"),
        (17, None, "belong together"),
    ],
)
def test_bad_arguments_of_backward_are_refused(position: int, value: torch.Tensor, message: str) -> None:
    changed = list(backward_arguments(0.0))
    changed[position] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.attention_backward(*changed)


def test_mask_offsets_beyond_two_to_the_thirty_second() -> None:
    """A mask [B, 1, 1, S] whose batch entries lie 2^32 elements apart (pytorch#187227)."""
    inputs = make_inputs(2, 1, 5, 9, 8)
    memory = torch.empty(2**32 + 9, dtype=torch.bool)
    far = memory.as_strided((2, 1, 1, 9), (2**32, 9, 9, 1))
    near = torch.rand(2, 1, 1, 9) < 0.5
    far.copy_(near)
    assert torch.equal(attention(*inputs, far, backend="cpu"), attention(*inputs, near, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_few_heads_split_over_threads_give_the_same_bits(
    heads: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    """With fewer heads than threads the backward runs as two passes over parts of a head."""
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        inputs = make_inputs(*heads, 300, 333, 24, dtype=dtype, requires_grad=True)
        mask = torch.linspace(-1, 1, 333).requires_grad_()
        out = attention(*inputs, mask, 0.1, causal, seed=3, backend="cpu")
        results.append([out, *torch.autograd.grad(out.square().sum(), (*inputs, mask))])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def lower_levels() -> list[str]:
    """The levels below the one in use, which this CPU has too."""
    return [level for level in LEVELS[: LEVELS.index(native.cpu_capability())] if level in LEVELS]


@pytest.mark.slow
@pytest.mark.parametrize("level", lower_levels())
def test_every_lower_instruction_set_passes_the_same_tests(level: str) -> None:
    """Run the tests of the CPU backend again, as on a CPU that has no more than this level."""
    # One thread: these are many small calls, whose threads would mostly wait for each other.
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": level.lower(), "OMP_NUM_THREADS": "1"}
    code = "from nlpfast import native; print(native.cpu_capability())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == level
    folder = Path(__file__).parent
    names = ("attention", "attention_hidden", "attention_properties", "varlen_attention", "dropout")
    names += ("add_layer_norm", "bias_gelu")
    tests = [str(folder / f"test_{name}.py") for name in names]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        # PyTorch does not know the level between AVX-512 and AMX, and says so.
        "-W",
        "ignore:ignoring invalid value for ATEN_CPU_CAPABILITY",
        "-k",
        "(cpu or any_call) and not reference",
        *tests,
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder.parents[1])
    summary = result.stdout.strip().splitlines()[-1]
    print(f"{level}: {summary}")
    assert result.returncode == 0 and "passed" in summary, result.stdout[-3000:]


def test_offsets_beyond_two_to_the_thirty_first() -> None:
    """Batch entries 2^30 elements apart: the last one starts at 2^31. Only the pages that are used exist."""
    inputs = make_inputs(3, 1, 9, 9, 8)
    memory = torch.empty(2**31 + 72)
    far = memory.as_strided((3, 1, 9, 8), (2**30, 72, 8, 1))
    near = attention(*inputs, is_causal=True, backend="cpu")
    far.copy_(inputs[0])
    assert torch.equal(attention(far, *inputs[1:], is_causal=True, backend="cpu"), near)
    grad_out = torch.randn_like(near)
    rest = (None, None, None, None, 0.0, 1, 0.5)
    call = (*inputs, *OPS.attention_forward(*inputs, *rest), *rest, False, None, None)
    wanted = OPS.attention_backward(grad_out, None, *call)
    far.copy_(grad_out)
    actual = OPS.attention_backward(far, None, *call)
    assert all(torch.equal(a, w) for a, w in zip(actual[:3], wanted[:3], strict=True))
