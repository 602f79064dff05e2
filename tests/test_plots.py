"""The pictures of results: which rows are drawn, and where."""

import json
from pathlib import Path

import pytest

from benchmarks.plots import draw, main, memories, speeds


def row(shape: tuple[int, ...], peer: str = "sdpa", dtype: str = "float32", **others: object) -> dict:
    return {
        **{"shape": list(shape), "peer": peer, "dtype": dtype, "threads": 1},
        **{"gemm_share": 0.5, "ratio_of_minima": 2.0, **others},
    }


DATA = {
    "ops": {
        "attention": {
            "rates": {"1": {"gemm_gflops": 100.0, "gemm_16_gflops": 400.0}},
            "rows": [
                row((1, 2, 64, 64, 8), sweep=True),
                row((1, 2, 64, 64, 8), "eager", sweep=True, ratio_of_minima=4.0),
                row((1, 2, 16, 16, 8), sweep=True, gemm_share=0.2),
                row((1, 2, 16, 16, 8), sweep=True, dtype="bfloat16"),
                # none of these
                row((1, 2, 64, 64, 8)),
                row((1, 2, 64, 64, 8), sweep=True, threads=2),
            ],
        },
        "linear_cross_entropy": {
            "rates": {},
            "rows": [
                row((500, 1000, 8), "eager", memory_mb={"peer": 10.0, "ours": 1.0}),
                row((500, 1000, 8), "compile", memory_mb={"peer": None, "ours": 1.0}),
                row((1000, 2000, 8), "eager", memory_mb={"peer": 40.0, "ours": 2.0}),
                row((1000, 4000, 8), "eager"),
            ],
        },
    }
}


def test_speed_against_length() -> None:
    assert speeds(DATA, "float32") == {
        "nlpfast": [(16, 20.0), (64, 50.0)],
        "sdpa": [(16, 10.0), (64, 25.0)],
        "eager": [(64, 12.5)],
    }
    assert speeds(DATA, "bfloat16") == {"nlpfast": [(16, 200.0)], "sdpa": [(16, 100.0)]}
    assert speeds({"ops": {}}, "float32") == {}


def test_memory_against_vocabulary() -> None:
    assert memories(DATA) == {
        "nlpfast, float32": [(1000, 2.0), (2000, 2.0)],
        "eager, float32": [(1000, 20.0), (2000, 40.0)],
    }


def test_pictures_lie_beside_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "a.json").write_text(json.dumps(DATA))
    (tmp_path / "b.json").write_text(json.dumps({"ops": {}}))
    assert main([str(tmp_path)]) == 0
    pictures = [tmp_path / "a-speed.png", tmp_path / "a-memory.png"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in pictures]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    assert draw(tmp_path / "b.json") == []
    assert main([str(tmp_path / "none")]) == 2
    assert "usage: python -m benchmarks.plots FOLDER" in capsys.readouterr().err
