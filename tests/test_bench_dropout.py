"""The benchmarks of dropout, add_layer_norm and bias_gelu, at small sizes; on a GPU that is none."""

from types import ModuleType

import pytest
import torch
from test_benchmarks import FakeGpu

import nlpfast
from benchmarks import bench_add_layer_norm as norms
from benchmarks import bench_bias_gelu as gelus
from benchmarks import bench_dropout as bench
from benchmarks import measure
from benchmarks.measure import Settings

BOTH = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", BOTH, ids=str)
def test_dropout_has_small_errors(dtype: torch.dtype) -> None:
    case = bench.Case((60, 40), dtype)
    found = bench.errors(case, [bench.OURS, *bench.PEERS], Settings())
    for name, errors in found.items():
        assert errors.keys() == {"out", "dx"}
        assert max(errors.values()) < (0.05 if dtype == torch.bfloat16 else 1e-6), name
        (work,) = bench.passes(case, name, Settings(), 1)
        assert [x.shape for x in work.step()] == [(60, 40)]


@pytest.mark.parametrize("wrong", [lambda x, p, **k: x * 1.12, lambda x, p, **k: x * 0])
def test_wrong_dropout_is_not_timed(wrong, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(bench, "dropout", wrong)
    with pytest.raises(RuntimeError, match=r"dropped: fix the kernel"):
        bench.errors(bench.Case((60, 40)), [bench.OURS], Settings())


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_norms_have_small_errors(dtype: torch.dtype, dropout_p: float) -> None:
    case = norms.Case((30, 40), dtype, dropout_p)
    found = norms.errors(case, [norms.OURS, *norms.PEERS], Settings())
    for name, errors in found.items():
        assert errors.keys() == {"norm", "sum", "d_part", "d_residual", "d_weight", "d_bias"}
        assert max(errors.values()) < (0.1 if dtype == torch.bfloat16 else 1e-5), name
        (work,) = norms.passes(case, name, Settings(), 1)
        if name != norms.COPY:
            assert [list(x.shape) for x in work.step()] == [[30, 40], [30, 40], [40], [40]]
    (copied,) = norms.passes(case, norms.COPY, Settings(), 1)
    # part, residual, norm and sum, read or written once in each direction
    assert 2 * copied.step()[0].numel() == 2 * 30 * 40 * (2 * dtype.itemsize + 8)


def test_wrong_norms_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.add_layer_norm
    monkeypatch.setattr(nlpfast, "add_layer_norm", lambda *a, **k: tuple(1.01 * x for x in right(*a, **k)))
    with pytest.raises(RuntimeError, match=r"float32: norm has error .* fix the kernel"):
        norms.errors(norms.Case((30, 40)), [norms.OURS], Settings())


@pytest.mark.parametrize("dtype", BOTH, ids=str)
@pytest.mark.parametrize(("approximate", "dropout_p"), [("none", 0.0), ("tanh", 0.1)])
def test_gelus_have_small_errors(dtype: torch.dtype, approximate: str, dropout_p: float) -> None:
    case = gelus.Case((30, 40), dtype, approximate, dropout_p)
    found = gelus.errors(case, [gelus.OURS, *gelus.PEERS], Settings())
    for name, errors in found.items():
        assert errors.keys() == {"out", "dx", "d_bias"}
        assert max(errors.values()) < (0.1 if dtype == torch.bfloat16 else 1e-5), name
        (work,) = gelus.passes(case, name, Settings(), 1)
        if name != gelus.COPY:
            assert [list(x.shape) for x in work.step()] == [[30, 40], [40]]
    (copied,) = gelus.passes(case, gelus.COPY, Settings(), 1)
    # read or written once: x and the output there, x and two gradients back
    assert 2 * copied.step()[0].numel() == 5 * 30 * 40 * dtype.itemsize


def test_wrong_gelus_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = nlpfast.bias_gelu
    monkeypatch.setattr(nlpfast, "bias_gelu", lambda *a, **k: 1.01 * right(*a, **k))
    with pytest.raises(RuntimeError, match=r"float32: out has error .* fix the kernel"):
        gelus.errors(gelus.Case((30, 40)), [gelus.OURS], Settings())


@pytest.mark.parametrize(
    ("module", "traffic"), [(bench, (2 * 9 * 24 * 2,) * 2), (gelus, (2 * 9 * 24 * 2, 3 * 9 * 24 * 2))]
)
def test_run_on_a_gpu(module: ModuleType, traffic: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "CUDA_SECONDS_PER_STEP", {"quick": 0.0, "full": 0.0})
    rates = {"gemm_gflops": 100.0, "gemm_16_gflops": 200.0, "copy_gbytes": 10.0}
    monkeypatch.setattr(measure, "machine_rates", lambda device: rates)
    # compiling takes seconds
    peers = (module.EAGER, module.COPY)
    monkeypatch.setattr(module, "CUDA_PEERS", peers)
    case = module.Case((9, 24), torch.bfloat16)
    monkeypatch.setattr(module, "CUDA_CASES", (case,))
    result = measure.run(module, Settings(), gpu=FakeGpu())
    assert [row["peer"] for row in result["rows"]] == [*peers] and result["notes"] == []
    assert module.traffic(case) == traffic
    assert result["rows"][0]["backward_gbytes"] == round(traffic[1] / 2e-3 / 1e9, 1)
