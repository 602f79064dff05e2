"""CUDA kernels on the CPU: the library that csrc/cuda_emulator.h makes of them, in the place of a device."""

import importlib

import torch
from torch import Tensor

from nlpfast import dispatch
from nlpfast.ops import projected_on_gpu

OPS = (
    *("add_layer_norm", "alignment_loss", "attention", "cross_entropy", "linear_cross_entropy"),
    "varlen_attention",
)


def emulate(library: str) -> None:
    """Have the backend "cuda" serve tensors on the CPU.

    Args:
        library: path of libnlpfast_cuda_emulated.so.
    """
    torch.ops.load_library(library)
    for op in OPS:
        module = importlib.import_module(f"nlpfast.ops.{op}.cuda")
        module.DEVICE = "cpu"
        dispatch.registry[op]["cuda"] = module
    projected_on_gpu._multiply = _multiply


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """Multiply as a GPU does: on CPUs PyTorch has no product of 16 bits with a result in 32."""
    torch.addmm(out, a.float(), b.float(), beta=1 if add else 0, out=out)
