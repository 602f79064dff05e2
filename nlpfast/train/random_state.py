"""All random number generators of a process, as tensors: of Python, NumPy, and PyTorch on CPU and CUDA."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

# A generator of Python or NumPy has 624 words and a place among them; a second number of a pair of normal
# ones may wait to be given out.
WORDS = 624


def random_state() -> dict[str, Tensor]:
    """Return the state of each generator: Python's, NumPy's global one, PyTorch's, the current CUDA device's.

    The state of CUDA is there where CUDA is in use.
    """
    _, internal, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    assert name == "MT19937"
    state = {
        "python": torch.tensor([*internal, gauss is not None], dtype=torch.int64),
        "python_gauss": torch.tensor(gauss or 0.0, dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), place, has_gauss], dtype=torch.int64),
        "numpy_gauss": torch.tensor(cached, dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put every generator into a state that `random_state` returned; CUDA's stays where it is not in it.

    Raises:
        ValueError: a generator's state is missing or of another size; nothing is changed then.
    """
    expected = {"python": (WORDS + 2,), "python_gauss": (), "numpy": (WORDS + 2,), "numpy_gauss": ()}
    expected["torch"] = tuple(torch.get_rng_state().shape)
    for name, shape in expected.items():
        if name not in state or tuple(state[name].shape) != shape:
            raise ValueError(f"the random state of {name} is missing or damaged")
    *internal, has_gauss = state["python"].tolist()
    random.setstate((3, tuple(internal), state["python_gauss"].item() if has_gauss else None))
    *keys, place, has_gauss = state["numpy"].tolist()
    cached = state["numpy_gauss"].item()
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def set_seed(seed: int) -> None:
    """Seed every generator.

    Args:
        seed: at least 0; NumPy takes its lower 32 bits.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave every generator as it was: what happens inside draws the same numbers but moves nobody's."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
