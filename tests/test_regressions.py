"""The comparison of two results files: what counts as slower, and what is not compared."""

import copy
import json
from pathlib import Path

import pytest

from benchmarks.regressions import fallen, main


def row(name: str, ratios: tuple[float, float], threads: int = 1, peer: str = "sdpa") -> dict:
    """Of a peer that takes 6 ms."""
    return {
        **{"name": name, "threads": threads, "peer": peer},
        "ours_ms": {"min": 6 / ratios[0], "median": 6 / ratios[1]},
        **{"ratio_of_minima": ratios[0], "ratio_of_medians": ratios[1]},
    }


def results(*rows: dict, op: str = "attention", quick: bool = False) -> dict:
    rates = {str(threads): {"gemm_gflops": 100.0} for threads in (1, 2)}
    return {"ops": {op: {"quick": quick, "rates": rates, "rows": list(rows)}}}


@pytest.mark.parametrize(
    ("now", "slower"),
    [
        ((1.49, 1.40), True),
        ((1.40, 1.49), True),
        # one of the two may be a slow phase
        ((1.51, 0.5), False),
        ((0.5, 1.51), False),
        ((3.0, 3.0), False),
    ],
)
def test_both_ratios_have_to_fall(now: tuple[float, float], slower: bool) -> None:
    lines, others, compared = fallen(results(row("a", (2.0, 2.2))), results(row("a", now)))
    assert compared == 1 and others == []
    text = f"attention: a, 1 thread(s), against sdpa: 2.00 / 2.20 before, {now[0]:.2f} / {now[1]:.2f} now"
    assert lines == ([text] if slower else [])


def test_only_rows_of_the_same_measurement_are_compared() -> None:
    before = results(row("a", (2.0, 2.0)), row("b", (2.0, 2.0), threads=2), row("c", (2.0, 2.0)))
    after = results(row("b", (1.0, 1.0)), row("c", (1.0, 1.0), peer="eager"), row("d", (1.0, 1.0)))
    assert fallen(before, after) == ([], [], 0)
    assert fallen(before, results(row("a", (1.0, 1.0)), op="dropout")) == ([], [], 0)
    slow = results(row("a", (1.0, 1.0)))
    for quick in (before, slow):
        changed = copy.deepcopy((before, slow))
        changed[quick is slow]["ops"]["attention"]["quick"] = True
        assert fallen(*changed) == ([], [], 0)
    assert len(fallen(before, slow)[0]) == 1


@pytest.mark.parametrize(
    ("times", "rate", "slower"),
    [
        ((3.34, 3.34), 100.0, True),
        # the machine was slower
        ((3.34, 3.34), 98.0, False),
        ((3.1, 3.1), 110.0, True),
        # one of the two may be a slow phase
        ((3.2, 9.0), 100.0, False),
        ((9.0, 3.2), 100.0, False),
    ],
)
def test_where_ours_takes_no_longer_a_peer_is_faster(
    times: tuple[float, float], rate: float, slower: bool
) -> None:
    after = results(row("a", (1.0, 1.0)))
    after["ops"]["attention"]["rows"][0]["ours_ms"] = dict(zip(("min", "median"), times, strict=True))
    after["ops"]["attention"]["rates"]["1"]["gemm_gflops"] = rate
    lines, others, _ = fallen(results(row("a", (2.0, 2.0))), after)
    assert (len(lines), len(others)) == ((1, 0) if slower else (0, 1))


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    for folder, ratio in ((before, 2.0), (after, 1.0)):
        folder.mkdir()
        (folder / "here.json").write_text(json.dumps(results(row("a", (ratio, ratio)))))
    (after / "there.json").write_text(json.dumps(results(row("a", (0.1, 0.1)))))
    assert main([str(before), str(after)]) == 1
    out = capsys.readouterr().out.splitlines()
    none = "0 of 1 ratios fell by more than 25% as {}"
    assert out[0] == none.format("peers are faster")
    assert out[1].startswith("here: attention: a, 1 thread(s), against sdpa: 2.00 / 2.00 before, 1.00")
    assert out[2:] == ["1 of 1 ratios fell by more than 25% as ours is slower"]
    assert main([str(after), str(before)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [none.format("peers are faster"), none.format("ours is slower")]
    assert main([str(before)]) == 2 and main([str(before), str(tmp_path / "none")]) == 2
    assert "usage: python -m benchmarks.regressions BEFORE AFTER" in capsys.readouterr().err
