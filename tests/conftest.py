"""Fixtures of all tests: backends by name, a fixed seed, and how long hypothesis searches."""

import os
import signal
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

import nlpfast  # noqa: F401  (fills the registry)
from nlpfast import dispatch

settings.register_profile(
    "ci",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
# pytest --hypothesis-profile=soak
settings.register_profile("soak", settings.get_profile("ci"), derandomize=False, max_examples=100_000)
settings.load_profile("ci")

if os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import hasten

    hasten()

EMULATED = os.environ.get("EMULATED_CUDA")
if EMULATED:
    from emulated_cuda import emulate

    emulate(EMULATED)


# A shell that starts the tests in the background has them ignore SIGINT, and with them all that they start.
for _number, _default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _default)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes ``backend`` once for each backend of the module's ``OP`` that is there."""
    if "backend" in metafunc.fixturenames:
        backends = dispatch.registry[metafunc.module.OP].items()
        metafunc.parametrize("backend", [name for name, module in backends if not isinstance(module, str)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a CUDA device where there is none.

    With TRITON_INTERPRET=1 run what concerns the Triton backend alone, as far as the interpreter can bear it;
    with EMULATED_CUDA what concerns the CUDA backend.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"

    def wanted(item: pytest.Item) -> bool:
        if item.get_closest_marker("cuda") is not None and (interpreted or not torch.cuda.is_available()):
            return False
        values = getattr(getattr(item, "callspec", None), "params", {})
        if EMULATED:
            concerns = values.get("backend") == "cuda" or getattr(item.module, "EMULATED", False)
            return concerns and item.get_closest_marker("long") is None
        concerns = values.get("backend") == "triton" or getattr(item.module, "INTERPRETED", False)
        served = values.get("dtype", torch.float32) in (torch.float32, torch.float64)
        return not interpreted or (concerns and served and item.get_closest_marker("long") is None)

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = [item for item in items if wanted(item)]


@pytest.fixture(scope="module", autouse=True)
def _print_number_of_cases(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tell how many calls a module's searches have made, by the kinds that it counts in ``CASES``."""
    yield
    cases = getattr(request.module, "CASES", None)
    if isinstance(cases, Counter):
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print()
            for name, count in cases.items():
                print(f"searched calls of {request.module.OP}: {name}: {count}")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Leave the user's cache alone, also in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _globals_restored() -> Iterator[None]:
    """A test that changes a global setting of PyTorch puts it back, or fails."""
    before = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    yield
    after = torch.get_num_threads(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    assert after == before
