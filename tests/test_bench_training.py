"""The benchmark of whole training steps, at small sizes, and the eager code that it is against."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_benchmarks import FakeGpu
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_training as bench
from benchmarks import gpu, measure, originals, report, training_steps
from benchmarks.measure import Settings
from benchmarks.training_steps import Block, Case, Pretraining, PretrainingStep, documents, step_of, unpadded
from nlpfast.data import birthplaces
from nlpfast.models.gpt import GPT
from nlpfast.models.perceiver import DownProjectBlock
from nlpfast.nn.packing import Packing

SIZES = {"C": 16, "H": 2, "LATENTS": 8, "DOCUMENTS": 6, "FEW": 3, "B": 2, "COMPARED": 4}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SIZES.items():
        monkeypatch.setattr(training_steps, name, size)


def shrunk(case: Case) -> Case:
    """Return a case of a block with a sixteenth of the tokens and latents."""
    if isinstance(case, Pretraining):
        return case
    return dataclasses.replace(case, tokens=case.tokens // 16, latents=case.latents // 16)


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_every_case_is_right_and_runs(case: Case) -> None:
    case = shrunk(case)
    names = [bench.OURS, *case.peers]
    errors = bench.errors(case, names, Settings())
    assert list(errors) == names
    for name, found in errors.items():
        assert found.keys() == {"loss" if isinstance(case, Pretraining) else "out", "gradients"}
        half = case.dtype == torch.bfloat16 and name != training_steps.EAGER
        assert (1e-4 if half else 0) < max(found.values()) < (0.2 if half else 1e-5)
    for name in names:
        if name != "compile":
            steps = bench.passes(case, name, Settings(), 2)
            assert len(steps) == 2
            before = [p.detach().clone() for p in steps[0].model.parameters()]
            steps[0].step()
            trained = isinstance(case, Pretraining)
            after = list(steps[0].model.parameters())
            assert all(torch.equal(x, y) != trained for x, y in zip(before, after, strict=True))
            assert all(p.grad is not None and bool(p.grad.any()) for p in after)


def test_run_has_the_peers_and_the_rounds_of_each_case(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    monkeypatch.setattr(measure, "SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    monkeypatch.setattr(measure, "MIN_ROUNDS", 4)
    # a process of its own, at full size
    taken = {bench.OURS: 100.0, training_steps.EAGER: 200.0}
    monkeypatch.setattr(bench, "memory", lambda case, name: taken.get(name))
    # it is asked for, and not waited for
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    kept = [case for case in bench.CASES if case.quick or case.dtype == torch.bfloat16]
    monkeypatch.setattr(bench, "CASES", tuple(map(shrunk, kept)))
    result = measure.run(bench, Settings(threads=(1,)))
    found = [(row["name"], row["peer"], row["rounds"]) for row in result["rows"]]
    steps = {
        "vanilla pretraining step float32, 3 documents": ("eager float32", "sdpa", "compile"),
        "vanilla pretraining step bfloat16, 3 documents": ("eager float32", "eager", "sdpa", "compile"),
        "vanilla pretraining step bfloat16": ("eager float32", "eager", "sdpa"),
        "perceiver pretraining step bfloat16": ("eager float32", "eager", "sdpa"),
    }
    block = ("down block, 64 tokens, 4 latents", "eager float32", 4)
    assert found == [*((name, peer, 3) for name, peers in steps.items() for peer in peers), block]
    assert [row["goal"] for row in result["rows"]] == [3.0] * 3 + [8.0] * 10 + [10.0]
    assert {row["goal_peer"] for row in result["rows"]} == {"eager float32"}
    assert {row["peer"]: row["memory_mb"] for row in result["rows"]}["eager float32"] == {
        "peer": 200,
        "ours": 100,
    }
    assert "memory <= 60% met" in report.verdict(result["rows"][0])
    quick = measure.run(bench, Settings(quick=True, threads=(1,)))
    assert [(row["name"], row["peer"]) for row in quick["rows"]] == [found[0][:2], block[:2]]


def test_steps_on_a_gpu_are_timed_in_graphs_and_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    monkeypatch.setattr(measure, "CUDA_SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    result = measure.run(bench, Settings(quick=True), gpu=FakeGpu())
    name, peers = "vanilla pretraining step bfloat16", ["eager", "sdpa", "compile", "nlpfast, joined"]
    found = [(row["name"], row["peer"]) for row in result["rows"]]
    assert found == [(each, peer) for each in (name, f"{name}, launched by Python") for peer in peers]
    assert result["notes"] == []
    first, *_, last, _ = result["rows"]
    assert first["ours_ms"]["min"] == first["peer_ms"]["min"] == 6.0 != last["ours_ms"]["min"]
    assert first["captured"] == {"ours": True, "peer": True} and first["memory_mb"]["ours"] == 2.0
    assert report.verdict(first) == ">= 2 MISSED, memory <= 60% MISSED"
    assert report.verdict(result["rows"][2]) == ">= 1.3 MISSED" and ">= 1.3" in report.verdict(last)
    assert name in report.section("training", result)


def test_all_models_are_timed_on_a_gpu_and_one_has_goals() -> None:
    goals = {case.name: (case.goals, case.quick) for case in bench.CUDA_CASES}
    assert goals == {
        "vanilla pretraining step bfloat16": ({"eager": 2.0, "compile": 1.3}, True),
        "perceiver pretraining step bfloat16": ({}, False),
        "vanilla pretraining step bfloat16, 3 documents": ({}, False),
    }
    assert {"eager", "compile"} <= {*bench.CUDA_PEERS[: bench.CUDA_QUICK_PEERS]}
    assert {case.memory_peer for case in bench.CUDA_CASES} == {"eager"}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", [bench.OURS, training_steps.JOINED, *bench.CUDA_PEERS[:2]])
def test_a_step_is_captured_on_a_gpu(name: str) -> None:
    """What is replayed trains on as what is launched does."""
    case = dataclasses.replace(bench.CUDA_CASES[0], goals={})
    step, other = (PretrainingStep(case, name, 1e-9, device="cuda") for _ in range(2))
    timer = gpu.StepTimer([step], gpu.Gpu("cuda"))
    assert timer.refusal is None
    timer.times()
    # warming up is 4 steps, a graph is replayed twice, and capturing takes none
    for _ in range(4 + 2 + gpu.STEPS_IN_A_ROW):
        loss = other.step()
    assert abs(step.step().item() / other.step().item() - 1) < 0.05 and bool(loss.isfinite())


def test_goals_are_those_that_were_promised() -> None:
    assert {case.name: case.goal for case in bench.CASES if case.goal} == {
        "vanilla pretraining step float32, 3 documents": 3.0,
        "vanilla pretraining step bfloat16, 3 documents": 8.0,
        "vanilla pretraining step float32": 3.0,
        "vanilla pretraining step bfloat16": 8.0,
        "perceiver pretraining step float32": 3.0,
        "perceiver pretraining step bfloat16": 8.0,
        "down block, 1024 tokens, 64 latents": 10.0,
    }


def one_more(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs, **options: right(*inputs, **options) + 1.0


def not_finite(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs, **options: right(*inputs, **options) * math.nan


def a_little(right: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *inputs, **options: right(*inputs, **options) * 1.001


@pytest.mark.parametrize("spoil", [one_more, not_finite, a_little])
@pytest.mark.parametrize("kind", ["step", "block"])
def test_wrong_results_are_not_timed(spoil: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Pretraining("vanilla", torch.float32, 2.0) if kind == "step" else Block(9, 4)
    module = GPT if kind == "step" else DownProjectBlock
    if kind == "step":
        right = GPT.forward
        monkeypatch.setattr(GPT, "forward", lambda *a, **k: (None, spoil(lambda: right(*a, **k)[1])()))
    else:
        monkeypatch.setattr(module, "forward", spoil(DownProjectBlock.forward))
    with pytest.raises(RuntimeError, match=rf"{case.name}: (loss|out) has error .* fix the kernel"):
        bench.errors(case, [bench.OURS, training_steps.EAGER], Settings())


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Pretraining("perceiver", torch.float32, 2.0)
    results = PretrainingStep.results

    def wrong(step: PretrainingStep) -> dict[str, dict[str, Tensor]]:
        found = results(step)
        if isinstance(step.model, GPT):
            found["gradients"]["blocks.0.attn.query.weight"] *= 1.1
        return found

    monkeypatch.setattr(PretrainingStep, "results", wrong)
    with pytest.raises(RuntimeError, match=r"gradients has error .* fix the kernel"):
        bench.errors(case, [bench.OURS, training_steps.EAGER], Settings())


def test_a_missing_gradient_is_an_error() -> None:
    x = {"a": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"there are \['a'\], expected \['a', 'b'\]"):
        bench.distance(x, {**x, "b": torch.ones(1)})


@pytest.mark.parametrize("model", ["vanilla", "perceiver"])
def test_flops_are_those_of_the_documents_one_by_one(model: str) -> None:
    case = Pretraining(model, torch.float32, 2.0)
    counted = 0
    for x, y in unpadded(case.documents):
        eager = originals.GPT(
            training_steps._config(min(len(x), training_steps.LATENTS), training_steps.T, 0.0)
        )
        if model == "perceiver":
            eager = originals.GPT(
                training_steps._config(
                    min(len(x), training_steps.LATENTS), training_steps.T, 0.0, perceiver=True
                )
            )
            # the others are masked
            eager.down_block.register_forward_pre_hook(lambda block, x: (x[0][:, : block.C.shape[1]],))
        with FlopCounterMode(display=False) as counter:
            eager(x[None], y[None])[1].backward()
        counted += counter.get_total_flops()
    # the batch shares the queries of the latents
    repeated = (
        6 * (case.documents - 1) * training_steps.LATENTS * training_steps.C**2 if model == "perceiver" else 0
    )
    assert bench.flops(case) == counted - repeated


@pytest.mark.parametrize("tokens", [3, 4, 9])
def test_flops_of_a_block(tokens: int) -> None:
    block = originals.DownProjectBlock(training_steps._config(min(tokens, 4), tokens, 0.0))
    x = torch.randn(training_steps.B, min(tokens, 4), training_steps.C, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        block(x).sum().backward()
    assert bench.flops(Block(tokens, 4)) == counter.get_total_flops()


def drawn(perceiver: bool, fused: bool = False) -> tuple[originals.GPT, GPT]:
    """Return the eager model and ours, in float64, with the same weights, none of which is 0."""
    config = training_steps._config(
        training_steps.LATENTS, training_steps.T, 0.0, perceiver=perceiver, fused=fused
    )
    eager, ours = originals.GPT(config).double(), GPT(config).double()
    with torch.no_grad():
        for parameter in eager.parameters():
            parameter.normal_(0.0, 0.3)
    assert "blocks.0.attn.mask" in eager.state_dict()
    ours.load_state_dict(eager.state_dict(), strict=True)
    return eager, ours


@pytest.mark.parametrize("perceiver", [False, True])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("packing", [False, True])
def test_the_eager_model_is_ours(perceiver: bool, fused: bool, packing: bool) -> None:
    eager, ours = drawn(perceiver, fused)
    items = documents(5)
    x, y = (torch.stack(part) for part in zip(*items, strict=True))
    logits, expected = eager(x, y)
    if packing:
        tokens, targets, ends, longest = birthplaces.packed(items)
        assert len(tokens) < x.numel()
        _, loss = ours(tokens, targets, return_logits=False, packing=Packing(ends, longest))
    else:
        found, loss = ours(x, y)
        torch.testing.assert_close(found, logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    expected.backward()
    loss.backward()
    own = dict(ours.named_parameters())
    assert own.keys() == dict(eager.named_parameters()).keys()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(own[name].grad, parameter.grad, rtol=0, atol=1e-10, msg=name)


@pytest.mark.parametrize("model", ["vanilla", "perceiver"])
def test_a_step_is_the_same_for_both(model: str) -> None:
    """Gradients are clipped alike, and the same weights are decayed, by as much."""
    case = Pretraining(model, torch.float32, 2.0)
    ours, eager = (step_of(case, name, 0.0, torch.float64) for name in (bench.OURS, training_steps.EAGER))
    for step in (ours, eager):
        assert step.backward() > 1
        # far more than what is allowed, and no parameter's is near the eps of Adam
        for parameter in step.model.parameters():
            parameter.data.fill_(0.5)
        step.forward = lambda *_, step=step, **options: (None, sum(p.sum() for p in step.model.parameters()))
        step.step()
        norm = torch.stack([p.grad.norm() for p in step.model.parameters()]).norm()
        assert norm == pytest.approx(1.0, rel=1e-4)
    own = dict(ours.model.named_parameters())
    for name, parameter in eager.model.named_parameters():
        torch.testing.assert_close(own[name], parameter, rtol=0, atol=1e-12, msg=name)
    kinds = {round(p.flatten()[0].item(), 6) for p in own.values()}
    assert kinds == {0.494, 0.4937}


def test_memory_is_that_of_a_step(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def megabytes(step: Callable[[], None]) -> float:
        owner = step.__self__  # type: ignore[attr-defined]
        assert all(p.grad is None for p in owner.model.parameters())
        assert len(owner.optimizer.state) == len(list(owner.model.parameters()))
        asked.append(len(owner.batch[0]))
        return 3.5

    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(bench, "megabytes_of", megabytes)
    for name in (bench.OURS, training_steps.EAGER):
        bench.main("0", name)
    # ours packs the documents
    tokens = birthplaces.packed(documents(training_steps.FEW))[0].numel()
    assert asked == [tokens, training_steps.FEW]
    assert capsys.readouterr().out == "3.5\n" * 2
    monkeypatch.setattr(bench, "megabytes_in_a_process", lambda *words: words)
    found = [bench.memory(bench.CASES[0], name) for name in (bench.OURS, training_steps.EAGER, "sdpa")]
    assert found == [*(("benchmarks.bench_training", 0, name) for name in ("nlpfast", "eager float32")), None]
    assert bench.memory(bench.CASES[-1], bench.OURS) is None


def test_missing_compiler_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [bench.unavailable(name) for name in (bench.OURS, *bench.PEERS[:3])] == [None] * 4
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in (bench.unavailable("compile") or "")
