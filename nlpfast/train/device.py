"""Devices by name, and moving batches to them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nlpfast.train.config import ConfigError


def resolve_device(name: str) -> torch.device:
    """Return the device that `name` stands for; "auto" is CUDA where there is one, else the CPU.

    Args:
        name: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: an unknown device, or one that this machine or this PyTorch does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise ConfigError("device", name, "give one of auto, cpu, cuda, cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError("device", name, "give one of auto, cpu, cuda, cuda:N")
    if device.type == "cpu" and device.index:
        raise ConfigError("device", name, "there is one CPU device, give cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError("device", name, f"PyTorch sees {count} CUDA devices here, give cpu or auto")
    return device


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch with all its tensors on `device`.

    Args:
        batch: a tensor, or tensors in lists, tuples and dictionaries; anything else stays as it is.
        device: where to.
    """
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return [to_device(value, device) for value in batch]
    return batch


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager[None]:
    """Return what computes in a precision: autocast, or nothing for float32.

    Args:
        device: where.
        dtype: float32, bfloat16 or float16.
    """
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype))
