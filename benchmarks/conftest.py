"""Give the bench functions their cases and implementations under `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run every bench function for each case of its module and each implementation that can run here."""
    bench = metafunc.module
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", bench.CASES, ids=lambda case: case.name)
        names = [name for name in (bench.OURS, *bench.PEERS) if bench.unavailable(name) is None]
        metafunc.parametrize("implementation", names)
