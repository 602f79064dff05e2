"""Several processes that train one model: who they are, what they agree on, and how they share the model.

`torchrun --nproc_per_node=2 -m nlpfast train lm` starts them. Gradients go through PyTorch's own
DistributedDataParallel or FSDP2; the few numbers that the loop must agree on go through CPU tensors.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# A process that waits longer than this for another, in a save or an evaluation for example, gives up.
PATIENCE = timedelta(minutes=30)


class Processes:
    """This process among those that train together; alone without `torch.distributed`.

    Attributes:
        rank: its number, from 0.
        world_size: how many there are.
    """

    def __init__(self) -> None:
        """Ask torch.distributed, if it is in use."""
        together = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world_size = dist.get_world_size() if together else 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes, in float64."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Return whether one of the processes has this flag up."""
        return self.sum([float(flag)])[0] > 0

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def share(self, model: nn.Module, strategy: str) -> nn.Module:
        """Return the model as it has to be called in training; its parameters are of all processes then.

        Args:
            model: on its device.
            strategy: "ddp", every process keeps all parameters, or "fsdp", each keeps a part, and the model
                itself is changed.
        """
        if self.world_size == 1:
            return model
        # every process starts from the weights of the first
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), 0)
        if strategy == "ddp":
            return DistributedDataParallel(model)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        device = next(model.parameters()).device
        mesh = init_device_mesh(device.type, (self.world_size,))
        for module in model.children():
            # the blocks of a stack one by one, so that not all of them are whole at once
            for block in module if isinstance(module, nn.ModuleList) else ():
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor of which each process may have a part; all of them have to ask."""
    full: Any = getattr(tensor, "full_tensor", None)
    return full() if full is not None else tensor


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return a whole tensor in parts as those of another, or as it is where that is whole."""
    if getattr(other, "full_tensor", None) is None:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(other, DTensor)
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements)


def own_device(name: str) -> str:
    """Return the device of this process: one of its own where torchrun started several and CUDA is asked for.

    Args:
        name: auto, cpu, cuda or cuda:N.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or name not in ("auto", "cuda"):
        return name
    return (
        f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" or torch.cuda.is_available() else "cpu"
    )


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[Processes]:
    """Join the processes that torchrun started, and leave them at the end; a process alone does nothing.

    Args:
        device: where the model will be; a CUDA device becomes the current one.

    Raises:
        RuntimeError: the others cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Processes()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield Processes()
        # nobody takes the connections down while another still uses them
        dist.barrier()
    finally:
        dist.destroy_process_group()
