"""Time an implementation on a GPU: replays of CUDA graphs over several copies of its inputs.

At the lengths of this field a kernel takes about as long as Python takes to launch it, and a batch may fit
into the cache of the GPU. Neither shows in training: there Python is ahead of the GPU, and other layers have
filled the cache. Hence two graphs, of the forward passes over all copies and of the backward passes over all
copies, each with results of its own; what cannot be captured is launched as it is.
"""

from __future__ import annotations

import itertools
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Step = Callable[[], object]

# Ours by Triton's kernels, as a peer of the compiled ones.
TRITON = "triton"
MIN_COPIES = 4
WARMUP_STEPS = 3
# That Python launches without waiting for the GPU, as in training.
STEPS_IN_A_ROW = 5
# A peer whose errors are more than so many times ours computes something else, and is no rival.
MAX_PEER_ERROR = 20


@dataclass(frozen=True)
class Pass:
    """An implementation on inputs of its own.

    Attributes:
        function: of the inputs.
        inputs: tensors that want gradients.
        grad_out: the upstream gradient.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    grad_out: Tensor

    def forward(self) -> Tensor:
        """Return the output."""
        return self.function(*self.inputs)

    def backward(self, out: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs."""
        return torch.autograd.grad(out, self.inputs, self.grad_out)

    def step(self) -> tuple[Tensor, ...]:
        """Return the gradients of the inputs after a forward pass, as in training."""
        return self.backward(self.forward())


class Times(NamedTuple):
    """Seconds of one pass in one round, and of one step from Python's call until the GPU is done with it."""

    forward: float
    backward: float
    latency: float

    @property
    def step(self) -> float:
        """Forward and backward, without the time that Python takes."""
        return self.forward + self.backward


class StepTimes(NamedTuple):
    """Seconds of a training step in one round, as the replay of a graph, and as Python launches it."""

    step: float
    launched: float


class Gpu:
    """What the timing asks of a GPU; tests put something else in its place."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.l2_bytes: int = torch.cuda.get_device_properties(self.device).L2_cache_size
        # For warm-up and capture: libraries and autograd remember the stream on which they were first used.
        self.stream = torch.cuda.Stream(self.device)

    def synchronize(self) -> None:
        """Wait until the GPU is done with everything."""
        torch.cuda.synchronize(self.device)

    def warm_up(self, step: Step) -> int:
        """Run a step a few times, and return how many bytes it takes beyond those that were there before."""
        self.synchronize()
        with torch.cuda.stream(self.stream):
            for _ in range(WARMUP_STEPS):
                step()
            self.synchronize()
            before = torch.cuda.memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            step()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def capture(self, works: Sequence[Step]) -> list[Step]:
        """Capture a graph of each work, and return what replays them; the replays must keep the order."""
        self.synchronize()
        pool, graphs = torch.cuda.graph_pool_handle(), [torch.cuda.CUDAGraph() for _ in works]
        # Entered here too: a capture that fails leaves its own stream the current one.
        with torch.cuda.stream(self.stream):
            for graph, work in zip(graphs, works, strict=True):
                with torch.cuda.graph(graph, pool=pool, stream=self.stream):
                    work()
        return [graph.replay for graph in graphs]

    def seconds_of(self, work: Step) -> float:
        """Return how long one piece of work takes."""
        return self.seconds([work])[0]

    def seconds(self, works: Sequence[Step]) -> list[float]:
        """Return how long each work takes, one after the other.

        All are done once before: while the GPU is at that, Python queues the timed ones, and the GPU need not
        wait for it.
        """
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(works) + 1)]
        for work in works:
            work()
        events[0].record()
        for work, event in zip(works, events[1:], strict=True):
            work()
            event.record()
        self.synchronize()
        return [begin.elapsed_time(end) / 1e3 for begin, end in itertools.pairwise(events)]


def timers_of(
    bench: ModuleType, case: Any, names: Sequence[str], settings: Any, gpu: Any
) -> tuple[dict[str, Any], dict[str, dict[str, float]], list[str]]:
    """Check every implementation of a case and make it ready to be timed.

    Args:
        bench: a benchmark module.
        case: one of its cases.
        names: of the implementations, ours first.
        settings: what is measured.
        gpu: a `Gpu`.

    Returns:
        The timers and the errors of those that serve the case, by name; and a note for each that does not,
        and for each that is timed without a graph.

    Raises:
        RuntimeError: ours fail, or are wrong; without enough memory for ours, or if the backend that was
            asked for does not serve the case, there is no timer instead.
    """
    timers, errors, notes = {}, {}, []
    if settings.backend is not None:
        try:
            bench.chosen(case, settings)
        except RuntimeError as error:
            return {}, {}, [f"{case.name}: left out: {error}"]
    kind = getattr(bench, "CUDA_TIMER", Timer)
    # a step goes over weights, gradients and all that is between: more than a cache
    copies = 1 if kind is StepTimer else copies_of(bench.traffic(case)[0], gpu)
    for name in names:
        given = replace(settings, backend=TRITON) if name == TRITON else settings
        asked = bench.OURS if name == TRITON else name
        reason = bench.unserved(case, asked)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                if reason is None:
                    errors[name] = bench.errors(case, [asked], given)[asked]
                    reason = _disagreement(errors[bench.OURS], errors[name])
                if reason is None:
                    timers[name] = kind(bench.passes(case, asked, given, copies), gpu)
            # Whatever a peer fails with, the others can be measured.
            except Exception as error:
                if name == bench.OURS and not isinstance(error, torch.OutOfMemoryError):
                    raise
                # PyTorch says in warnings why none of its kernels would do.
                reason = _reason(error, said)
        if reason is not None:
            notes.append(f"{case.name}: {name} was left out: {reason}")
            if name == bench.OURS:
                break
        elif timers[name].refusal is not None:
            notes.append(f"{case.name}: {name} was timed without a CUDA graph: {timers[name].refusal}")
    return timers, {name: errors[name] for name in timers}, notes


def copies_of(nbytes: int, gpu: Any) -> int:
    """Return how many copies of inputs of that size exceed the GPU's cache, at least MIN_COPIES."""
    return max(MIN_COPIES, gpu.l2_bytes // max(nbytes, 1) + 1)


class Timer:
    """An implementation ready to be timed.

    Attributes:
        memory: bytes that a step takes at most beyond its inputs.
        refusal: why it could not be captured, or None; its launches then take the time that they take.
    """

    def __init__(self, passes: Sequence[Pass], gpu: Any) -> None:
        """Warm up on every copy of the inputs, and capture."""
        self.gpu, self.passes = gpu, passes
        self.memory = max([gpu.warm_up(each.step) for each in passes])
        self.turns: Iterator[Pass] = itertools.cycle(passes)
        # Kept, so that no copy's results lie where another's do: the cache would absorb them.
        self.outs: list[Tensor] = []
        self.grads: list[tuple[Tensor, ...]] = []
        self.refusal: str | None = None
        self.replays: list[Step] = []
        try:
            self.replays = gpu.capture((self._forward, self._backward))
            # The nodes of autograd go, with the stream that they remember: `times` makes its own.
            self.outs = [out.detach() for out in self.outs]
        except RuntimeError as error:
            self.refusal = _reason(error)
            # What a capture left half done lies in memory of its own.
            self.outs, self.grads = [], []

    def times(self) -> Times:
        """Return the seconds of one pass each way, the mean over the copies, and the latency of a step."""
        forward, backward = self.gpu.seconds(self.replays or (self._forward, self._backward))
        each = next(self.turns)
        self.gpu.synchronize()
        start = time.perf_counter()
        each.step()
        self.gpu.synchronize()
        latency = time.perf_counter() - start
        return Times(forward / len(self.passes), backward / len(self.passes), latency)

    def _forward(self) -> None:
        self.outs = [each.forward() for each in self.passes]

    def _backward(self) -> None:
        pairs = zip(self.passes, self.outs, strict=True)
        self.grads = [each.backward(out) for each, out in pairs]


class StepTimer:
    """A training step ready to be timed.

    Attributes:
        memory: bytes that it takes at most beyond model, optimizer and batch.
        refusal: why it could not be captured, or None; both times are then of its launches.
    """

    def __init__(self, steps: Sequence[Any], gpu: Any) -> None:
        """Warm up, and capture.

        Args:
            steps: one, whose `step` trains.
            gpu: a `Gpu`.
        """
        [self.each], self.gpu = steps, gpu
        self.memory = gpu.warm_up(self.each.step)
        self.refusal: str | None = None
        self.replay: Step = self.each.step
        try:
            [self.replay] = gpu.capture([self.each.step])
        except RuntimeError as error:
            self.refusal = _reason(error)

    def times(self) -> StepTimes:
        """Return the seconds of a step, in a graph, and the mean of some that Python launches."""
        step = self.gpu.seconds_of(self.replay)
        self.gpu.synchronize()
        start = time.perf_counter()
        for _ in range(STEPS_IN_A_ROW):
            self.each.step()
        self.gpu.synchronize()
        return StepTimes(step, (time.perf_counter() - start) / STEPS_IN_A_ROW)


def _disagreement(ours: dict[str, float], peer: dict[str, float]) -> str | None:
    """Return why a peer does not compute what ours do, or None."""
    # a single number of ours, such as a loss, may be right by luck
    limit = MAX_PEER_ERROR * max(ours.values()) + 1e-6
    for tensor, error in peer.items():
        # a NaN is not within any limit
        if not error <= limit:
            return f"it computes something else: {tensor} has error {error:.1e}, ours {ours[tensor]:.1e}"
    return None


def _reason(error: BaseException, said: Sequence[warnings.WarningMessage] = ()) -> str:
    """Return in one line what an error says, what the one before it said, and what warnings came with it."""
    first: BaseException = error
    while first.__cause__ or first.__context__:
        first = first.__cause__ or first.__context__ or first
    words = [_first_line(each) for each in (error, first, *(warning.message for warning in said))]
    return "; ".join(dict.fromkeys(words))


def _first_line(message: object) -> str:
    """Return the beginning of what a message says, or its kind where it says nothing."""
    lines = [line.strip() for line in str(message).splitlines()]
    return textwrap.shorten(next(filter(None, lines), type(message).__name__), 200, placeholder=" ...")
