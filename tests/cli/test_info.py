"""`nlpfast info`: what it says of this installation, also when parts of it are missing."""

import re
from pathlib import Path

import pytest
import torch

import nlpfast
from nlpfast import dispatch, native
from nlpfast.cli import info, main


def rows(text: str) -> dict[str, str]:
    """Return the first word or words of each line, up to two spaces, and the rest."""
    return dict(re.split(r" {2,}", line, maxsplit=1) for line in text.splitlines() if line)


def test_everything_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = rows(out)
    assert found["nlpfast"] == nlpfast.__version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert found["native library"] == native.status()
    assert found["capability"] == native.cpu_capability()
    assert {"python", "triton", "numpy", "cpu", "cores", "flags", "memory", "system"} <= found.keys()
    for op, backend, status in dispatch.explain():
        assert re.search(rf"^{op} +{backend} +{re.escape(status)}$", out, re.MULTILINE)


def test_columns_are_aligned() -> None:
    text = info.aligned([("op", "backend", "status"), ("attention", "cpu", "ok"), ("x", "reference", "ok")])
    assert text.splitlines() == [
        "op         backend    status",
        "attention  cpu        ok",
        "x          reference  ok",
    ]


def test_environment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in info.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NLPFAST_LOG", "debug")
    main(["info"])
    found = rows(capsys.readouterr().out)
    assert found["NLPFAST_LOG"] == "debug"
    assert found["NLPFAST_BACKEND"] == found["NLPFAST_NATIVE"] == "not set"


def test_missing_library_says_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "status", lambda: "it was not built")
    monkeypatch.setattr(native, "build_info", dict)
    monkeypatch.setitem(dispatch.registry["attention"], "cpu", "it was not built")
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert rows(out)["native library"] == "it was not built"
    assert re.search(r"^attention +cpu +it was not built$", out, re.MULTILINE)
    assert "build compiler" not in out


def test_build_facts_without_a_value_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "build_info", lambda: {"compiler": "GNU 12", "instruction_sets": ""})
    facts = info.native_library()
    assert facts["build compiler"] == "GNU 12"
    assert facts["build instruction sets"] == "none"


def test_missing_package_and_unknown_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(info, "CPUINFO", tmp_path / "absent")
    assert info.machine()["flags"] == "unknown"
    assert info.cpu_model() != ""
    monkeypatch.setattr(info.importlib.metadata, "version", missing)
    assert info.versions()["triton"] == "not installed"


def missing(name: str) -> str:
    raise info.importlib.metadata.PackageNotFoundError(name)


def test_processor_from_the_system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Fast Chip 9\nflags : fpu avx2 amx_tile\n", encoding="utf-8")
    monkeypatch.setattr(info, "CPUINFO", file)
    assert info.machine()["cpu"] == "Fast Chip 9"
    assert info.machine()["flags"] == "avx2 amx_tile"


@pytest.mark.parametrize("argv", [["info", "now"], ["info", "--json"]])
def test_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
