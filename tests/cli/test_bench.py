"""`nlpfast bench`: tables on stdout, progress on stderr, results in a file, and errors in one line."""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from nlpfast.cli import bench, main
from nlpfast.cli.options import UsageError

OPS = ["add_layer_norm", "alignment_loss", "attention", "bias_gelu", "cross_entropy", "dropout"]
OPS += ["linear_cross_entropy", "varlen_attention"]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    measure, attention = bench.benchmark_module("measure"), bench.benchmark_module("bench_attention")
    monkeypatch.setattr(measure, "SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    monkeypatch.setattr(attention, "CASES", (attention.Case((1, 2, 9, 9, 4), goal=1e9, quick=True),))
    monkeypatch.setattr(attention, "PEERS", ("sdpa",))
    varlen = bench.benchmark_module("bench_varlen_attention")
    monkeypatch.setattr(varlen, "CASES", (varlen.Case((2, 2, 9, 4), goal=1e9),))
    losses = bench.benchmark_module("bench_cross_entropy")
    monkeypatch.setattr(losses, "CASES", (losses.Case((9, 20), goals=(("copy", 1e9),)),))
    monkeypatch.setattr(losses, "PEERS", ("F.cross_entropy", "fairseq", "copy"))
    linear = bench.benchmark_module("bench_linear_cross_entropy")
    monkeypatch.setattr(linear, "CASES", (linear.Case((9, 20, 4), best_goal=1e9),))
    monkeypatch.setattr(linear, "PEERS", (linear.EAGER,))
    alignment = bench.benchmark_module("bench_alignment_loss")
    monkeypatch.setattr(alignment, "CASES", (alignment.Case((1, 2, 5, 6, 4), goals=(("eager", 1e9),)),))
    norms, drops = (bench.benchmark_module(f"bench_{op}") for op in ("add_layer_norm", "dropout"))
    monkeypatch.setattr(norms, "CASES", (norms.Case((9, 20), goal=1e9),))
    monkeypatch.setattr(drops, "CASES", (drops.Case((9, 20), goal=1e9),))
    gelus = bench.benchmark_module("bench_bias_gelu")
    monkeypatch.setattr(gelus, "CASES", (gelus.Case((9, 20), goal=1e9),))
    modules = bench.benchmark_module("bench_modules")
    for name, size in {"B": 2, "T": 9, "C": 16, "H": 2, "M": 4}.items():
        monkeypatch.setattr(modules, name, size)
    monkeypatch.setattr(modules, "CASES", (modules.Case("CS224N bottleneck", True, quick=True),))
    training, steps = (bench.benchmark_module(name) for name in ("bench_training", "training_steps"))
    for name, size in {"C": 16, "H": 2, "LATENTS": 8, "DOCUMENTS": 3, "COMPARED": 2, "B": 2}.items():
        monkeypatch.setattr(steps, name, size)
    step = training.Pretraining("perceiver", torch.bfloat16, goal=1e9)
    monkeypatch.setattr(training, "CASES", (step, training.Block(9, 4, goal=1e9, quick=True)))
    bert = bench.benchmark_module("bench_bert")
    for name, size in {"C": 64, "LAYERS": 1, "V": 50, "LENGTHS": (3, 7)}.items():
        monkeypatch.setattr(bert, name, size)
    monkeypatch.setattr(bert, "CASES", (bert.Case(torch.float32, goal=1e9),))
    translation = bench.benchmark_module("bench_translation")
    for name, size in {
        "C": 16,
        "H": 2,
        "D_FF": 16,
        "LAYERS": 1,
        "V": 50,
        "LENGTHS": ((3, 7), (5, 2)),
    }.items():
        monkeypatch.setattr(translation, name, size)
    monkeypatch.setattr(translation, "CASES", (translation.Training(torch.float32, goal=1e9),))
    dual = bench.benchmark_module("bench_dual")
    monkeypatch.setattr(dual, "CASES", (dual.Case(torch.float32, goal=1e9),))
    # memory is measured in processes of their own, which would train at full size
    for models in (dual, translation, bert, training):
        monkeypatch.setattr(models, "megabytes_in_a_process", lambda *words: None)


@pytest.mark.parametrize("argv", [["bench"], ["bench", "attention", "--quick"], ["bench", "--threads", "1"]])
def test_table_on_stdout(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out, err = capsys.readouterr()
    assert "| (1,2,9,9,4) float32 " in out
    assert ">= 1e+09 MISSED" in out
    assert "attention: (1,2,9,9,4) float32, 1 thread" in err.splitlines()


def test_named_backend_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--backend", "reference", "--threads", "1"]) == 0
    assert "attention by reference: backend reference, device cpu" in capsys.readouterr().out


def test_models_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "modules", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    assert "| CS224N bottleneck training float32 | 1       | before |" in out
    assert err == "modules: CS224N bottleneck training float32, 1 thread\n"


def test_whole_steps_against_eager_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "training", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    for peer in ("eager float32", "eager", "sdpa"):
        assert f"| perceiver pretraining step bfloat16 | 1       | {peer} " in out
    assert out.count(">= 1e+09 MISSED") == 2
    assert out.count("compile") == 0
    assert len(err.splitlines()) == 2


def test_packed_sentences_against_padding(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "bert", "--threads", "1"]) == 0
    out, err = capsys.readouterr()
    for peer in ("padded", "transformers"):
        assert f"| step on 32 sentences, float32 | 1       | {peer} " in out
    assert out.count(">= 1e+09 MISSED") == 1
    assert err == "bert: step on 32 sentences, float32, 1 thread\n"


def test_output_file_and_folder(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    assert main(["bench", "--threads", "1", "--output", str(file)]) == 0
    data = json.loads(file.read_text(encoding="utf-8"))
    assert set(data) == {"machine", "versions", "native", "ops"}
    assert data["ops"]["attention"]["rows"][0]["peer"] == "sdpa"
    assert main(["bench", "--threads", "1", "--output", str(tmp_path)]) == 0
    named = [entry.name for entry in tmp_path.iterdir() if entry != file]
    assert named == [f"{bench.benchmark_module('report').slug(data['machine'])}.json"]


def test_output_keeps_what_is_not_measured_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "results.json"
    arguments = ["bench", "attention", "--threads", "1", "--output", str(file)]
    assert main(arguments) == 0
    data = json.loads(file.read_text(encoding="utf-8"))
    [*_, date] = (data["ops"]["attention"].pop(key) for key in ("rows", "date"))
    file.write_text(json.dumps({**data, "ops": {"other": {}, **data["ops"]}, "convergence": 1}))
    assert main(arguments) == 0
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert (kept["ops"]["other"], kept["convergence"]) == ({}, 1)
    assert kept["ops"]["attention"]["date"] >= date and kept["ops"]["attention"]["rows"]
    assert "replaced" not in capsys.readouterr().err
    for other in (json.dumps({**kept, "versions": {}}), "no results", "[]", "{}"):
        file.write_text(other)
        assert main(arguments) == 0
        assert (
            "results.json is of other versions or another machine, and is replaced" in capsys.readouterr().err
        )
        assert [*json.loads(file.read_text(encoding="utf-8"))["ops"]] == ["attention"]


def test_what_was_measured_before_a_failure_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure = bench.benchmark_module("measure")
    right = measure.run

    def run(module: ModuleType, *rest: object) -> object:
        if module.OP == "attention":
            raise RuntimeError("wrong")
        return right(module, *rest)

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(bench, "ops", lambda: ["cross_entropy", "attention"])
    file = tmp_path / "results.json"
    assert main(["bench", "--threads", "1", "--output", str(file)]) == 1
    assert [*json.loads(file.read_text(encoding="utf-8"))["ops"]] == ["cross_entropy"]


@pytest.mark.parametrize(
    "argv",
    [
        ["bench", "no_such_op"],
        ["bench", "--threads", "0"],
        ["bench", "--threads", "1,,2"],
        ["bench", "--threads", "two"],
        ["bench", "--backend", "abacus"],
        ["bench", "modules", "--backend", "reference"],
        ["bench", "training", "--backend", "reference"],
        ["bench", "--device", "abacus"],
        ["bench", "--device", "cuda:99"],
        ["bench", "--output", "no/such/folder/results.json"],
    ],
)
def test_usage_errors(
    argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.benchmark_module("measure"), "run", lambda *_: pytest.fail("it measured"))
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nlpfast: error: ")
    assert len(err.splitlines()) == 1


def test_wrong_result_is_one_line_and_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("attention: out has error 1: fix the kernel")

    monkeypatch.setattr(bench.benchmark_module("bench_attention"), "errors", fail)
    assert main(["bench", "attention", "--threads", "1", "--output", str(tmp_path / "results.json")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == "nlpfast: error: attention: out has error 1: fix the kernel"
    assert list(tmp_path.iterdir()) == []


def test_installation_without_benchmarks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> ModuleType:
        package = name.rpartition(".")[0]
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(bench.importlib, "import_module", absent)
    with pytest.raises(RuntimeError, match=r"no benchmarks/measure\.py in this installation"):
        bench.benchmark_module("measure")


def test_every_op_can_be_measured() -> None:
    assert bench.ops() == OPS
    assert [bench.benchmark_module(f"bench_{op}").OP for op in bench.ops()] == bench.ops()


def test_a_gpu_is_given_what_has_cases_for_one() -> None:
    assert bench._names(None, "cuda:0", None) == [*OPS, "training"]
    assert bench._names(None, "cuda:0", "triton") == OPS
    # that has no kernels of these two, which is no reason to measure none
    compiled = [op for op in OPS if op not in ("bias_gelu", "dropout")]
    assert bench._names(None, "cuda:0", "cuda") == compiled
    with pytest.raises(UsageError, match=r"--backend cuda: dropout has cpu, triton, reference, give one"):
        bench._names("dropout", "cuda:0", "cuda")
    assert bench._names(None, "cpu", None) == [
        *bench.ops(),
        "modules",
        "training",
        "bert",
        "translation",
        "dual",
    ]
    assert bench._names(None, "cpu", "reference") == bench.ops()
    for name in ("modules", "bert", "translation", "dual"):
        with pytest.raises(UsageError, match=f"{name} is not measured with this --device or --backend"):
            bench._names(name, "cuda:0", None)
    with pytest.raises(UsageError, match="training is not measured with this --device or --backend"):
        bench._names("training", "cuda:0", "cuda")
