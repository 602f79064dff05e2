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

LEVELS = ("DEFAULT", "AVX2", "AVX512", "AVX512_AMX")
OPS = torch.ops.nlpfast


def arguments(dropout_p: float, requires_grad: bool = False) -> tuple:
    query, key, value = make_inputs(2, 4, 5, 7, 8, Hk=2, Dv=6, requires_grad=requires_grad)
    seed = torch.tensor([5, 6]) if dropout_p else None
    return query, key, value, torch.tensor([3, 7]), seed, dropout_p, 1, 0.3


def backward_arguments(dropout_p: float, requires_grad: bool = False) -> tuple:
    forward = arguments(dropout_p, requires_grad)
    results = OPS.attention_forward(*(x.detach() if isinstance(x, torch.Tensor) else x for x in forward))
    grad_out = torch.randn_like(results[0]).requires_grad_(requires_grad)
    return grad_out, torch.randn_like(results[1]), *forward[:3], *results, *forward[3:]


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
        (replaced(0, torch.randn(2, 4, 5, 8).double()), "query must be float32"),
        (replaced(0, torch.randn(4, 5, 8)), "query must have 4 dimensions"),
        (replaced(0, torch.randn(2, 3, 5, 8)), "must be a multiple of the 2 heads"),
        (replaced(1, torch.randn(2, 2, 7, 9)), "key must have size 8 in dimension 3"),
        (replaced(2, torch.randn(2, 2, 6, 6)), "value must have size 7 in dimension 2"),
        (replaced(2, torch.randn(2, 2, 7, 257)), "at most 256, got 8 .* and 257"),
        (replaced(3, torch.tensor([3, 8])), r"key_lengths\[1\] is 8; it must be within 0..7"),
        (replaced(3, torch.tensor([-1, 7])), r"key_lengths\[0\] is -1"),
        (replaced(3, torch.tensor([3])), "key_lengths must be contiguous"),
        (replaced(3, torch.tensor([3, 4], dtype=torch.int32)), "key_lengths must be int64"),
        (replaced(4, None), "seed must be given"),
        (replaced(4, torch.tensor([1])), "seed must be contiguous"),
        (replaced(5, 1.5), r"dropout_p must be in \[0, 1\]"),
        (replaced(6, 3), "causal must be 0, 1 or 2"),
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
    ],
)
def test_bad_arguments_of_backward_are_refused(position: int, value: torch.Tensor, message: str) -> None:
    changed = list(backward_arguments(0.0))
    changed[position] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.attention_backward(*changed)


@pytest.mark.parametrize("heads", [(1, 1), (1, 2), (2, 3)])
@pytest.mark.parametrize("causal", [False, True])
def test_few_heads_split_over_threads_give_the_same_bits(heads: tuple[int, int], causal: bool) -> None:
    """With fewer heads than threads the backward runs as two passes over parts of a head."""
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 8):
        torch.set_num_threads(threads)
        query, key, value = make_inputs(*heads, 300, 333, 24, requires_grad=True)
        out = attention(query, key, value, None, 0.1, causal, seed=3, backend="cpu")
        results.append([out, *torch.autograd.grad(out.square().sum(), (query, key, value))])
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
    name = {"DEFAULT": "default", "AVX2": "avx2", "AVX512": "avx512"}[level]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": name}
    code = "from nlpfast import native; print(native.cpu_capability())"
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said.stdout.strip() == level
    folder = Path(__file__).parent
    tests = [str(folder / f"test_attention{part}.py") for part in ("", "_properties")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "cpu or without_attn_mask",
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
    rest = (None, None, 0.0, 1, 0.5)
    call = (*inputs, *OPS.attention_forward(*inputs, *rest), *rest)
    wanted = OPS.attention_backward(grad_out, None, *call)
    far.copy_(grad_out)
    actual = OPS.attention_backward(far, None, *call)
    assert all(torch.equal(a, w) for a, w in zip(actual, wanted, strict=True))
