"""Cross entropy on CPUs: the compiled kernels of csrc/cross_entropy, one set per instruction set."""

import torch
from torch import Tensor

from nlpfast.ops import large_buffers
from nlpfast.ops.cross_entropy.reference import rescaled

SERVES = "float32, bfloat16 and float16, any number of classes, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(input: Tensor, target: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if input.device.type != "cpu":
        return f"it computes on the CPU, and the logits are on {input.device}"
    if input.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and the logits are {input.dtype}"
    return None


def forward(
    input: Tensor,
    target: Tensor,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    grad_scale: Tensor | None,
    inplace: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Return loss, nll and correct [B, T], statistics [B, T, 2] and the gradient, as the reference does."""
    options = (target.contiguous(), ignore_index, pad_index, on_target, on_other)
    rows = _rows(input)
    if grad_scale is None:
        return (*torch.ops.nlpfast.cross_entropy_forward(rows, *options), None)
    gradient = rows if inplace else large_buffers.empty(rows.shape, rows.dtype)
    results = torch.ops.nlpfast.cross_entropy_forward_out(rows, *options, grad_scale.item(), gradient)
    # logits whose classes do not lie together get their gradient by a copy
    return (*results, input.copy_(gradient) if inplace and rows is not input else gradient)


def backward(
    grad_loss: Tensor,
    input: Tensor,
    target: Tensor,
    statistics: Tensor,
    gradient: Tensor | None,
    grad_scale: Tensor | None,
    ignore_index: int,
    pad_index: int,
    on_target: float,
    on_other: float,
    inplace: bool,
) -> Tensor:
    """Return the gradient of the logits: the one that forward made, if it was made for this upstream one."""
    if gradient is not None and grad_scale is not None:
        if bool((grad_loss == grad_scale).all()):
            return gradient
        if inplace:
            return rescaled(gradient, grad_loss, grad_scale, target != ignore_index)
    rows = _rows(input)
    tensors = (grad_loss.contiguous(), rows, target.contiguous(), statistics)
    options = (ignore_index, pad_index, on_target, on_other)
    if torch.compiler.is_compiling():
        return torch.ops.nlpfast.cross_entropy_backward(*tensors, *options)
    out = gradient
    if out is None:
        out = rows if inplace else large_buffers.empty(rows.shape, rows.dtype)
    torch.ops.nlpfast.cross_entropy_backward_out(*tensors, *options, out)
    return input.copy_(out) if inplace and rows is not input else out


def _rows(input: Tensor) -> Tensor:
    """Return logits whose classes lie side by side."""
    return input if input.stride(-1) == 1 or input.shape[-1] == 1 else input.contiguous()


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::cross_entropy_forward")
    def _(input, target, *rest):  # type: ignore[no-untyped-def]
        B, T, _ = input.shape
        loss = input.new_empty((B, T), dtype=torch.float32)
        correct = input.new_empty((B, T), dtype=torch.bool)
        statistics = input.new_empty((B, T, 2), dtype=torch.float32)
        return loss, torch.empty_like(loss), correct, statistics

    @torch.library.register_fake("nlpfast::cross_entropy_backward")
    def _(grad_loss, input, target, statistics, *rest):  # type: ignore[no-untyped-def]
        return input.new_empty(input.shape)


_register_fakes()
