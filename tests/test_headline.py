"""The table of README.md, which is made from results."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import headline

ROOT = Path(__file__).parents[1]


def results() -> dict[str, Any]:
    ops: dict[str, Any] = {}
    for number, (_, op, case, peer, _) in enumerate(headline.ROWS, start=1):
        for threads, part in ((2, 0.5), (1, 0.25)):
            for dtype in ("float32", "bfloat16"):
                row = {"name": case.format(dtype), "peer": peer, "threads": threads}
                row["ratio_of_medians"] = number + part
                other = {**row, "peer": "another", "ratio_of_medians": 99.0}
                ops.setdefault(op, {"rows": []})["rows"] += [other, row]
    last = ops[headline.ROWS[-1].op]["rows"]
    last[-1]["memory_mb"] = {"ours": 30.0, "peer": 120.0}
    return {"ops": ops}


def test_a_row_has_both_dtypes_and_threads() -> None:
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in headline.table(results()).splitlines()
    ]
    assert len(lines) == 2 + len(headline.ROWS)
    assert lines[2][2:] == ["1.2 / 1.5", "1.2 / 1.5", "-"]
    last = len(headline.ROWS)
    assert lines[-1][2:] == [f"{last}.2 / {last}.5"] * 2 + ["25%"]


def test_what_is_missing_is_named() -> None:
    data = results()
    data["ops"]["attention"]["rows"] = data["ops"]["attention"]["rows"][8:]
    with pytest.raises(
        KeyError, match=r"attention has no results of .* against sdpa: nlpfast bench attention"
    ):
        headline.table(data)


def test_the_table_is_put_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    text = "before\n<!-- results: a-machine -->\nold\n<!-- end of results -->\nafter\n"
    readme.write_text(text)
    arguments = [str(tmp_path), str(readme)]
    # results of another machine change nothing
    assert headline.main(arguments) == 0 and readme.read_text() == text
    (tmp_path / "a-machine.json").write_text(json.dumps(results()))
    for _ in range(2):
        assert headline.main(arguments) == 0
        assert readme.read_text() == text.replace("old", f"\n{headline.table(results())}\n")
    readme.write_text("nothing")
    assert (
        headline.main(arguments) == 2 and "has no line <!-- results: MACHINE -->" in capsys.readouterr().err
    )
    assert headline.main([]) == 2


def test_the_readme_is_of_the_results_that_are_kept(tmp_path: Path) -> None:
    copy = tmp_path / "README.md"
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    copy.write_text(text, encoding="utf-8")
    assert headline.main([str(ROOT / "benchmarks" / "results"), str(copy)]) == 0
    assert copy.read_text(encoding="utf-8") == text
