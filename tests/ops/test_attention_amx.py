"""Attention in bfloat16 at sizes that fill tiles in all ways; the kernels for AMX on a CPU without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nlpfast import attention, native
from nlpfast.ops.attention import reference
from nlpfast.testing import allowed_keys, assert_no_worse, eager_attention, make_inputs, rounding_sizes

OP = "attention"
ROOT = Path(__file__).parents[2]
NAMES = ("out", "lse", "dq", "dk", "dv")
SEED = 7
# L, S, D, Dv, H, Hk: rows that are read in place and rows that are packed, and the edges of tiles of 16, of
# pairs of tiles, of blocks of 64 queries and 128 keys.
SHAPES = [
    (64, 128, 64, 64, 2, 2),
    (200, 200, 64, 64, 4, 2),
    (144, 176, 32, 96, 2, 1),
    (129, 97, 80, 33, 2, 2),
    (47, 193, 128, 16, 2, 1),
    (193, 47, 40, 128, 2, 2),
    (17, 161, 256, 256, 1, 1),
    (160, 31, 7, 200, 2, 2),
]
MASKS = ("none", "top_left", "bottom_right", "lengths", "prefix", "bool", "float_bottom_right")


def masks(name: str, B: int, H: int, L: int, S: int) -> tuple[str, dict[str, Tensor]]:
    """Which triangle is visible, and the other masks by name."""
    generator = torch.Generator().manual_seed(L * S)
    lengths = torch.tensor([S, S // 2 + 1])[:B]
    if name == "lengths":
        return "top_left", {"key_lengths": lengths}
    if name == "prefix":
        return "bottom_right", {"prefix_lengths": torch.tensor([0, S // 3])[:B]}
    if name == "bool":
        bits = torch.rand(B, 1, L, S, generator=generator) < 0.7
        bits[0, 0, :, : S // 2] = False
        return "none", {"attn_mask": bits}
    if name == "float_bottom_right":
        return "bottom_right", {"attn_mask": torch.randn(H, L, S, generator=generator).bfloat16()}
    return name, {}


def with_gradients(
    outputs: tuple[Tensor, Tensor], inputs: list[Tensor], upstream: tuple[Tensor, Tensor]
) -> list[Tensor]:
    """Output, lse and gradients through both; lse of an empty row is a constant."""
    out, lse = outputs
    some = lse.isfinite()
    loss = (out * upstream[0].to(out.dtype)).sum() + (lse[some] * upstream[1].to(lse.dtype)[some]).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("L", "S", "D", "Dv", "H", "Hk"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_no_worse_than_eager(
    backend: str,
    dtype: torch.dtype,
    *,
    L: int,
    S: int,
    D: int,
    Dv: int,
    H: int,
    Hk: int,
    mask: str,
    dropout_p: float,
) -> None:
    B = 2
    tensors = make_inputs(B, H, L, S, D, Hk=Hk, Dv=Dv, dtype=dtype, requires_grad=True)
    causal, arguments = masks(mask, B, H, L, S)
    upstream = torch.randn(B, H, L, Dv).to(dtype), torch.randn(B, H, L)
    outputs = attention(
        *tensors,
        **arguments,
        dropout_p=dropout_p,
        is_causal=causal != "none",
        causal_align="top_left" if causal == "none" else causal,
        enable_gqa=True,
        seed=SEED,
        return_lse=True,
        backend=backend,
    )
    actual = with_gradients(outputs, list(tensors), upstream)
    allowed = allowed_keys((B, H, L, S), causal=causal, **arguments)
    keep = reference.dropout_keep(torch.tensor([SEED, 0]), dropout_p, (B, H, L, S)) if dropout_p else None
    added = arguments.get("attn_mask")
    added = added if added is not None and added.is_floating_point() else None
    options = {"allowed": allowed, "keep": keep, "dropout_p": dropout_p}
    sizes = rounding_sizes(*tensors, *upstream, added, **options)
    results = []
    for kind in (dtype, torch.float64):
        inputs = [x.detach().to(kind).requires_grad_() for x in tensors]
        wide = None if added is None else added.to(kind)
        results.append(with_gradients(eager_attention(*inputs, wide, **options), inputs, upstream))
    for name, a, e, r in zip(NAMES, actual, *results, strict=True):
        size = sizes[name]
        if name == "lse":
            a, e, r, size = (x.unsqueeze(-1) for x in (a, e, r, size))
        assert_no_worse(name, a, e, r, factor=1.5 if name.startswith("d") else 1.0, size=size)


def tool(name: str) -> str:
    """The program of this environment, or of the PATH."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=places)
    assert found, f"{name} is missing: pip install {name}"
    return found


def build_with_emulated_tiles(folder: Path) -> Path:
    """Build the library, sanitized if this one is, into a copy of the package; return the copy's parent."""
    site = folder / "site"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(Path(native.__file__).parent, site / "nlpfast", ignore=ignored)
    settings = {
        "NLPFAST_EMULATE_AMX": "ON",
        "NLPFAST_SANITIZE": "ON" if native.build_info()["sanitizers"] else "OFF",
        "NLPFAST_CUDA_SOURCES": "",
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "Python_EXECUTABLE": sys.executable,
    }
    build = str(folder / "build")
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    for command in (
        [
            "-S",
            str(ROOT),
            "-B",
            build,
            "-G",
            "Ninja",
            *(f"-D{name}={value}" for name, value in settings.items()),
        ],
        ["--build", build],
        ["--install", build, "--prefix", str(site / "nlpfast")],
    ):
        done = subprocess.run([tool("cmake"), *command], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return site


@pytest.mark.slow
def test_kernels_on_emulated_tiles(tmp_path: Path) -> None:
    """Run the tests of the compiled kernels again, on a library that has AMX's tiles in software."""
    level = native.cpu_capability()
    if level == "AVX512_AMX":
        pytest.skip("the other tests run on the tiles of this CPU")
    if level != "AVX512_BF16":
        pytest.skip(f"the library for AMX needs the instructions of AVX512_BF16, and this CPU has {level}")
    site = build_with_emulated_tiles(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    code = "from nlpfast import native; print(native.cpu_capability(), native.__file__)"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=site, env=environment, capture_output=True, text=True
    )
    assert said.stdout.split() == ["AVX512_AMX", str(site / "nlpfast" / "native.py")], said.stderr
    tests = [str(ROOT / "tests" / "ops" / f"test_attention{part}.py") for part in ("", "_amx")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cpu and bfloat16", *tests],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
    )
    summary = (result.stdout.strip() or result.stderr).splitlines()[-1]
    print(f"emulated AMX: {summary}")
    assert result.returncode == 0 and "passed" in summary, (result.stdout + result.stderr)[-3000:]
