"""One server of trials for all tests of training."""

from collections.abc import Iterator

import pytest
from faults import TrialServer, reason_to_skip


@pytest.fixture(scope="session")
def trials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrialServer]:
    """Serve trials (faults.py); skip where that cannot be."""
    reason = reason_to_skip()
    if reason is not None:
        pytest.skip(reason)
    with TrialServer(tmp_path_factory.mktemp("trials")) as server:
        yield server
