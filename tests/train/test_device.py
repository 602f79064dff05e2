"""Devices by name, and batches of any structure moved to them."""

import pytest
import torch

from nlpfast.train.config import ConfigError
from nlpfast.train.device import resolve_device, to_device


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "", "mps", "cuda:x", "meta"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ConfigError, match="device="):
        resolve_device(name)


@pytest.mark.parametrize("found", [False, True])
def test_auto_is_cuda_where_there_is_one(found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert resolve_device("auto").type == ("cuda" if found else "cpu")
    assert resolve_device("cpu").type == "cpu"


def test_batches_of_any_shape_move_to_the_device():
    moved = to_device({"a": [torch.ones(1), "text"], "b": (torch.zeros(1), 3)}, torch.device("meta"))
    assert moved["a"][0].device.type == moved["b"][0].device.type == "meta"
    assert moved["a"][1] == "text"
    assert moved["b"][1] == 3
