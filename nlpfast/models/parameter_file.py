"""A state dict in one file: safetensors, or as far as reading goes PyTorch's pickle, of tensors alone."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from nlpfast.data.lines import DataError
from nlpfast.files import replacing

__all__ = ["read_parameters", "write_parameters"]

# the entry of safetensors' metadata that holds ours, as JSON
FACTS = "nlpfast"
# how files of torch.save begin: a zip archive, and a bare pickle of versions before 1.6
PICKLES = (b"PK", b"\x80\x02")


def write_parameters(path: str | Path, state: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write a state dict; a write that fails leaves what was there.

    Args:
        path: the file, replaced when it is there.
        state: no two tensors may share memory.
        facts: plain values about the model, kept in the file.

    Raises:
        OSError: it cannot be written; names it.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    content = save(tensors, {FACTS: json.dumps(facts)})
    with replacing(path) as file:
        file.write(content)


def read_parameters(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state dict, on the CPU, and the facts that were written with it; none of those in a pickle.

    Args:
        path: what `write_parameters` or ``torch.save(model.state_dict(), path)`` wrote.

    Raises:
        DataError: it is missing, damaged, or no state dict; names it.
    """
    fix = "give a file that pretrain or finetune wrote"
    try:
        with open(path, "rb") as file:
            pickled = file.read(2) in PICKLES
        if pickled:
            state = torch.load(path, map_location="cpu", weights_only=True)
            facts: Any = {}
        else:
            with safe_open(path, framework="pt") as file:
                # in memory of their own: the file may be replaced while they are in use
                state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
                facts = json.loads((file.metadata() or {}).get(FACTS, "{}"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); {fix}") from error
    except pickle.UnpicklingError as error:
        reason = "is damaged, or holds more than tensors, which could run code"
        raise DataError(f"{path}: {reason}; save model.state_dict() alone") from error
    except (SafetensorError, RuntimeError, ValueError, EOFError) as error:
        raise DataError(f"{path}: not a readable file of parameters ({error}); {fix}") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise DataError(f"{path}: holds a {type(state).__name__} that is no state dict; {fix}")
    if not isinstance(facts, dict):
        raise DataError(f"{path}: its facts about the model are damaged; {fix}")
    return state, facts
