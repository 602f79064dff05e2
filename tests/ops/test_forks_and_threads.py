"""Ops in forks, in workers of a DataLoader, and in sixteen threads at once: no hang, the same bits."""

import faulthandler
import functools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nlpfast
from nlpfast import dispatch
from nlpfast.ops import dropout as op
from nlpfast.testing import make_inputs

FORKS = 20
# a hang is what takes longer; a fork has some milliseconds of work
CHILD_SECONDS, PROGRAM_SECONDS, WRONG = 30, 300, 2


# forks have those of their parent: PyTorch would make them with threads that a fork lacks
@functools.cache
def leaves(B: int, H: int, L: int, S: int, D: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return make_inputs(B, H, L, S, D, seed=seed, requires_grad=True)


def attention(seed: int, backend: str | None) -> list[Tensor]:
    query, key, value = leaves(2, 4, 65, 65, 24, seed)
    out = nlpfast.attention(query, key, value, is_causal=True, dropout_p=0.1, seed=seed, backend=backend)
    return [out, *torch.autograd.grad(out, (query, key, value), query)]


def varlen_attention(seed: int, backend: str | None) -> list[Tensor]:
    packed = [x[0] for x in leaves(1, 140, 4, 4, 24, seed)]
    ends = torch.tensor([0, 70, 71, 140])
    lengths = (ends, ends, 70, 70)
    out = nlpfast.varlen_attention(*packed, *lengths, dropout_p=0.1, seed=seed, backend=backend)
    return [out, *torch.autograd.grad(out, packed, packed[0])]


def cross_entropy(seed: int, backend: str | None) -> list[Tensor]:
    logits = leaves(1, 1, 70, 1, 1001, seed)[0][0, 0].detach().requires_grad_()
    target = torch.arange(70) * 13 % 1001
    loss = nlpfast.cross_entropy(logits, target, label_smoothing=0.1, backend=backend)
    return [loss, *torch.autograd.grad(loss, (logits,))]


def linear_cross_entropy(seed: int, backend: str | None) -> list[Tensor]:
    hidden, weight, _ = leaves(1, 1, 70, 1001, 16, seed)
    target = torch.arange(70) * 13 % 1001
    loss = nlpfast.linear_cross_entropy(hidden[0, 0], weight[0, 0], target, backend=backend)
    return [loss, *torch.autograd.grad(loss, (hidden, weight))]


def alignment_loss(seed: int, backend: str | None) -> list[Tensor]:
    query, key, value = leaves(3, 4, 65, 65, 24, seed)
    out, lse = nlpfast.attention(query, key, value, return_lse=True, backend=backend)
    rows = torch.arange(120)
    pairs = torch.stack([rows % 3, rows % 65, rows * 7 % 65], 1)
    loss = nlpfast.alignment_loss(query, key, lse, pairs, backend=backend)
    return [loss, *torch.autograd.grad(out.mean() + loss, (query, key, value))]


def add_layer_norm(seed: int, backend: str | None) -> list[Tensor]:
    part, residual, _ = (x[0, 0] for x in leaves(1, 1, 700, 700, 48, seed))
    weight = torch.ones(48, requires_grad=True)
    found = nlpfast.add_layer_norm(part, residual, weight, None, 0.1, seed=seed, backend=backend)
    return [*found, *torch.autograd.grad(found, (part, residual, weight), (residual, part))]


def dropout(seed: int, backend: str | None) -> list[Tensor]:
    x = leaves(1, 1, 700, 700, 48, seed)[0]
    out = op.dropout(x, 0.1, seed=seed, backend=backend)
    return [out, *torch.autograd.grad(out, (x,), x)]


OPS: dict[str, Callable[[int, str | None], list[Tensor]]] = {
    function.__name__: function
    for function in (
        *(attention, varlen_attention, cross_entropy, linear_cross_entropy, alignment_loss),
        *(add_layer_norm, dropout),
    )
}

# the first call in a fork is of a kernel, which may use several threads there; the last two compute
# with PyTorch's own operations, and have them use one
ORDER = ["attention", "varlen_attention", "add_layer_norm", "dropout"]
ORDER += ["cross_entropy", "alignment_loss", "linear_cross_entropy"]


def same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    # by numpy, as torch.equal would take several threads
    bits = [[x.detach().numpy().tobytes() for x in tensors] for tensors in (actual, expected)]
    return bits[0] == bits[1]


def in_forks(work: Callable[[], bool], forks: int = FORKS) -> None:
    """Do some work in forks, one after the other; leave with a message if one hangs or is wrong."""
    # tells where it hangs
    faulthandler.register(signal.SIGALRM, chain=True)
    for number in range(forks):
        pid = os.fork()
        if pid == 0:
            signal.alarm(CHILD_SECONDS)
            os._exit(0 if work() else WRONG)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code:
            sys.exit(f"fork {number} " + ("gave other results" if code == WRONG else f"ended with {code}"))


def forks_of_a_process(first: str) -> None:
    """Fork before and after several threads were used, by a kernel of nlpfast or by PyTorch."""
    torch.set_num_threads(1)
    expected = {name: OPS[name](0, "cpu") for name in OPS}
    torch.set_num_threads(2)
    in_forks(lambda: all(same(OPS[name](0, "cpu"), expected[name]) for name in ORDER))
    if first == "nlpfast":
        OPS["attention"](0, "cpu")
    else:
        torch.ones(1_000_000).exp()
    in_forks(lambda: all(same(OPS[name](0, "cpu"), expected[name]) for name in ORDER))
    # a fork of a fork, and the parent afterwards
    in_forks(lambda: in_forks(lambda: same(OPS["attention"](0, "cpu"), expected["attention"]), 1) is None, 1)
    assert same(OPS["attention"](0, "cpu"), expected["attention"])


class Results(torch.utils.data.Dataset):
    """Results of all ops, computed where they are asked for."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, seed: int) -> list[list[Tensor]]:
        return [[x.detach() for x in OPS[name](seed, None)] for name in OPS]


def workers_of_a_loader(start: str) -> None:
    torch.set_num_threads(1)
    expected = [Results()[seed] for seed in range(4)]
    torch.set_num_threads(2)
    OPS["attention"](0, None)
    loader = torch.utils.data.DataLoader(
        Results(), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=PROGRAM_SECONDS
    )
    results = list(loader)
    assert len(results) == 4
    for ours, theirs in zip(results, expected, strict=True):
        assert all(same(a, e) for a, e in zip(ours, theirs, strict=True))


def run(program: str, *arguments: str) -> None:
    """Run a function of this module, or a program, in a process of its own."""
    here = Path(__file__)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), *sys.path])}
    if program in globals():
        program = f"import sys, {here.stem} as tests; tests.{program}(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PROGRAM_SECONDS,
    )
    assert done.returncode == 0, done.stdout + done.stderr


missing = isinstance(dispatch.registry["attention"]["cpu"], str)
native = pytest.mark.skipif(missing, reason="no native library")


@native
@pytest.mark.parametrize("first", ["nlpfast", "torch"])
def test_forks_before_and_after_threads_were_used(first: str) -> None:
    run("forks_of_a_process", first)


IMPORTED_IN_A_FORK = """
import os, signal, torch
torch.set_num_threads(2)
torch.ones(1_000_000).exp()
for _ in range(2):
    if os.fork() == 0:
        signal.alarm(200)
        import nlpfast
        query = torch.ones(2, 4, 65, 24)
        out = nlpfast.attention(query, query, query, is_causal=True, backend="cpu")
        os._exit(0 if (out - 1).abs().max() < 1e-6 else 2)
codes = [os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)]
assert codes == [0, 0], codes
"""


@native
def test_import_in_forks_after_threads_were_used() -> None:
    run(IMPORTED_IN_A_FORK)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_first_call_in_workers_of_a_loader(start: str) -> None:
    run("workers_of_a_loader", start)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


CASES = [
    (op, backend)
    for op in list(OPS)[1:]
    for backend in ("cpu", "reference")
    if not isinstance(dispatch.registry[op][backend], str)
]


# attention is in test_attention_torch.py
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("op", "chosen"), CASES)
def test_sixteen_threads_equal_serial_calls(op: str, chosen: str) -> None:
    serial = [OPS[op](seed, chosen) for seed in range(16)]
    parallel: list[list[Tensor]] = [[] for _ in range(16)]
    start = threading.Barrier(16)

    def work(seed: int) -> None:
        start.wait()
        for _ in range(3):
            parallel[seed] = OPS[op](seed, chosen)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for actual, expected in zip(parallel, serial, strict=True):
        assert same(actual, expected)
