"""The comparison of losses in training: the figures, and each trainer for a few steps in this process."""

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import pytest
import torch

from benchmarks import convergence, sections, training_steps
from nlpfast import dispatch
from nlpfast.cli import main

STEPS = 4
# The others take as long as all of these; their trainers have tests of their own.
FEW = [
    "birthplaces pretrain, perceiver",
    "lm, GPT",
    "bert",
    "translation, Transformer",
    "translation, RNN",
    "dual",
]


def test_figures_of_a_row() -> None:
    eager = torch.tensor([[4.0, 2.0, 1.0], [6.0, 2.5, 1.0]], dtype=torch.float64)
    ours = eager.clone()
    ours[0, 1] += 0.2
    ours[1, 0] -= 0.3
    found = convergence.row("x", ours, eager, goal=1.0)
    assert found["difference"] == pytest.approx(0.1) and found["of_band"] == pytest.approx(0.4)
    assert (found["seeds"], found["steps"], found["goal"]) == (2, 3, 1.0)
    assert found["losses"][0] == 5.0
    # a single loss is no band
    assert convergence.row("x", eager[:1], eager[:1])["of_band"] is None


def test_what_drops_otherwise_is_compared_by_its_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convergence, "WINDOW", 2)
    eager = torch.tensor([[4.0, 2.0, 1.0], [6.0, 3.0, 2.0]], dtype=torch.float64)
    # windows: 3, 1.5 and 4.5, 2.5; what one seed gains the other loses
    ours = eager + torch.tensor([[0.5, 0.5, 0.5], [-0.5, -0.5, 0.1]])
    found = convergence.row("x", ours, eager, alike=False)
    assert found["difference"] is None and found["of_band"] == pytest.approx(0.15 / 1.0)


def in_this_process(words: str, folder: Path, changes: Mapping[str, str] = MappingProxyType({})) -> None:
    backend = changes.get("NLPFAST_BACKEND")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(dispatch, "ENV_BACKEND", backend)
        chosen = set()
        choose = dispatch.choose

        def watched(*request: Any) -> ModuleType:
            chosen.add(choose(*request))
            return choose(*request)

        patch.setattr(dispatch, "choose", watched)
        assert main(shlex.split(words)) == 0, words
    kinds = {module.__name__.rpartition(".")[2] for module in chosen}
    assert backend is None or kinds == {backend}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("convergence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convergence, "_call", in_this_process)
        convergence.prepare(folder, steps=2)
    return folder


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", FEW)
def test_losses_are_those_of_the_definitions(
    name: str, dropout: bool, inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convergence, "_call", in_this_process)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    kinds = (convergence.OURS, convergence.DEFINITION)
    found = convergence.curves(convergence.TRAINERS[name], [3], STEPS, dropout, inputs, kinds)
    ours, definition = (found[kind] for kind in kinds)
    assert ours.shape == definition.shape == (1, STEPS)
    difference = ((ours - definition) / definition).abs().max()
    # two ways of rounding
    assert difference < 1e-5
    assert ours.unique().numel() == STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_eager_code_learns_alike(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    for size, value in {"C": 16, "H": 2, "LAYERS": 1, "DOCUMENTS": 4, "FEW": 2}.items():
        monkeypatch.setattr(training_steps, size, value)
    for size, value in {"DOCUMENTS": 4, "FEW": 2}.items():
        monkeypatch.setattr(convergence, size, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    names = (convergence.OURS, convergence.EAGER)
    runs = {name: convergence._losses("vanilla", dtype, name, 5, STEPS, 0) for name in names}
    assert [len(losses) for losses in runs.values()] == [STEPS, STEPS]
    for ours, eager in zip(*runs.values(), strict=True):
        assert ours != eager and ours == pytest.approx(eager, rel=0.02)
    # each seed has weights and batches of its own
    assert convergence._losses("vanilla", dtype, convergence.OURS, 6, 1, 0)[0] != runs[convergence.OURS][0]


def test_eager_code_trains_again_with_other_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and batches are those of the seed, and the losses differ by dropout alone."""
    for size, value in {"C": 16, "H": 2, "LAYERS": 1, "DOCUMENTS": 4, "FEW": 2}.items():
        monkeypatch.setattr(training_steps, size, value)
    for size, value in {"DOCUMENTS": 4, "FEW": 2}.items():
        monkeypatch.setattr(convergence, size, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)

    def losses(turn: int) -> list[float]:
        return convergence._losses("vanilla", torch.float32, convergence.EAGER, 5, STEPS, turn)

    first, again = losses(0), losses(1)
    assert losses(1) == again != first and again == pytest.approx(first, rel=0.02)
    monkeypatch.setattr(convergence, "DROPOUT", 0.0)
    monkeypatch.setattr(training_steps, "COMPARED", 2)
    assert losses(0) == losses(1)


def test_runs_have_their_environments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Those of the caller do not get through."""
    environments = [*convergence.ENVIRONMENTS.values()]
    found: list[Mapping[str, str]] = []

    def run(command: list[str], env: Mapping[str, str], **options: Any) -> Any:
        found.append({name: env[name] for name in environments[-1] if name in env})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("NLPFAST_BACKEND", "triton")
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    for changes in environments:
        convergence._call("ops", tmp_path, changes)
    assert found == environments and found[:2] == [{}, {"NLPFAST_BACKEND": "reference"}]


def test_rows_are_added_to_the_results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[tuple[Any, ...]] = []

    def curves(
        trainer: Any, seeds: range, steps: int, dropout: bool, inputs: Path, kinds: Sequence[str]
    ) -> dict[str, torch.Tensor]:
        asked.append((trainer, seeds, steps, dropout))
        return {kind: torch.ones(2, steps) for kind in kinds}

    monkeypatch.setattr(convergence, "prepare", lambda folder: None)
    monkeypatch.setattr(convergence, "curves", curves)
    facts = {"machine": {"cpu": "a", "cores": "2"}, "versions": {}, "native": {}}
    monkeypatch.setattr(sections, "machine_facts", lambda device: facts)
    (tmp_path / "a-2-cores.json").write_text(json.dumps({**facts, "ops": {"x": 1}}))
    words = ["--seeds", "2", "--steps", "8", "--only"]
    for name in ("mrt", "dual"):
        convergence.main([str(tmp_path), *words, name])
    data = json.loads((tmp_path / "a-2-cores.json").read_text())
    assert data["ops"] == {"x": 1}
    mrt, dual = (convergence.TRAINERS[name] for name in ("mrt", "dual"))
    seeds = range(2)
    assert asked == [(mrt, seeds, 2, False), (dual, seeds, 2, False), (dual, seeds, 8, True)]
    rows = [(row["name"], row["by"], row["dropout"], row["goal"]) for row in data["convergence"]["rows"]]
    ours, again = convergence.OURS, convergence.ROUNDED
    plain = [(x, by, False, goal) for x in ("mrt", "dual") for by, goal in ((ours, 1e-5), (again, None))]
    assert rows == [*plain, ("dual", ours, True, None)]
    convergence.main([str(tmp_path), *words, "mrt"])
    data = json.loads((tmp_path / "a-2-cores.json").read_text())
    assert [row["name"] for row in data["convergence"]["rows"]] == ["dual"] * 3 + ["mrt"] * 2

    def beside_eager(model: str, seeds: range, steps: int) -> Any:
        assert (model, seeds, steps) == ("perceiver", range(2), 8)
        for name in (convergence.OURS, convergence.EAGER):
            yield name, torch.bfloat16, torch.ones(2, 40), torch.rand(2, 40)

    monkeypatch.setattr(convergence, "beside_eager", beside_eager)
    convergence.main([str(tmp_path), *words, "GPT, perceiver"])
    data = json.loads((tmp_path / "a-2-cores.json").read_text())
    rows = [(row["name"], row["by"], row["dtype"], row["difference"]) for row in data["convergence"]["rows"]]
    beside = ("GPT, perceiver", "bfloat16", None)
    assert rows[5:] == [(beside[0], by, *beside[1:]) for by in (convergence.OURS, convergence.EAGER)]
