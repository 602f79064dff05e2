"""The prediction for the compiled CUDA kernels, where the library is there."""

import math
from pathlib import Path

import pytest

from benchmarks import bench_attention, bench_cross_entropy, predict_cuda
from benchmarks.cuda_resources import executed
from nlpfast import native

needs_library = pytest.mark.skipif(
    not native.build_info().get("cuda"), reason="the native library was built without nvcc"
)


@needs_library
def test_every_case_is_predicted() -> None:
    found = predict_cuda.predictions()
    names = {launch.case for launch in found}
    assert {case.name for case in bench_cross_entropy.CUDA_CASES} <= names
    goals = {case.name for case in bench_attention.CUDA_CASES if case.shape[3] <= 128 and case.fill == 1.0}
    assert len(goals) > 5 and goals <= names
    for launch in found:
        terms = launch.terms()
        # what must be moved is a floor, and a launch comes on top
        assert 0 < terms["memory"] < launch.seconds() == max(terms.values()) + predict_cuda.LAUNCH_SECONDS
        assert launch.resident() >= 1 and math.isfinite(terms["instructions"])


@needs_library
def test_the_page_that_is_committed_has_all_cases(tmp_path: Path) -> None:
    assert predict_cuda.main([str(tmp_path / "page.md")]) == 0
    written = (tmp_path / "page.md").read_text(encoding="utf-8")
    committed = Path(predict_cuda.__file__).with_name("PREDICTED_CUDA.md").read_text(encoding="utf-8")
    cases = [
        [line.split("|")[1] for line in text.splitlines() if line.startswith("| (")]
        for text in (written, committed)
    ]
    assert len(cases[0]) > 20 and cases[0] == cases[1]


def test_without_the_library_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(native, "cuda_status", lambda: "no nvcc")
    assert predict_cuda.main([]) == 0
    assert capsys.readouterr() == ("", "no prediction of the CUDA kernels: no nvcc\n")


def test_instructions_are_counted_by_loops() -> None:
    """Two before the loop, three in it, four in the one within; the way of lanes that part is not counted."""
    code = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   MOV R1, R2 ;
        /*0020*/                   IADD3 R1, R1, R2, RZ ;
        /*0030*/                   FADD R1, R2, R3 ;
        /*0040*/                   FADD R1, R2, R3 ;
        /*0050*/                   FMUL R1, R2, R3 ;
        /*0060*/              @!P0 BRA 0x30 ;
        /*0070*/                   NOP ;
        /*0080*/               @P1 BRA 0x20 ;
        /*0090*/                   EXIT ;
        /*00a0*/                   WARPSYNC.COLLECTIVE R1 ;
        /*00b0*/                   BRA 0x30 ;
    """
    assert executed(code, dropout=False) == [3, 3, 4]


def test_of_exponentials_by_tile_and_all_at_once_one_is_counted() -> None:
    """Rows with a mask go by tile; for others all stand at once, and once more behind the end."""
    tile, all_at_once = ["FSEL"] * 4 + ["MUFU.EX2"] * 4, ["MUFU.EX2"] * 32
    names = [*tile, "BRA 0x500", *all_at_once, "EXIT", *all_at_once, "BRA 0x500"]
    code = "".join(f"/*{16 * i:04x}*/ {name} ;\n" for i, name in enumerate(names))
    assert executed(code, dropout=False, masked=True) == [len(tile) + 1]
    assert executed(code, dropout=False, masked=False) == [len(all_at_once) + 1]
