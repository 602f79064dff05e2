"""Cross entropy on CUDA devices: the compiled kernels of csrc/cross_entropy/cross_entropy_cuda.cu.

Nothing here waits for the device, and what a launch does depends on no value there: a CUDA graph can hold it.
"""

import torch
from torch import Tensor

SERVES = "CUDA devices; float32, bfloat16 and float16, up to 2^30 classes, any strides"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_CLASSES = 1 << 30
# The tests have kernels that run on the CPU.
DEVICE = "cuda"


def refusal(input: Tensor, target: Tensor) -> str | None:
    """Return why the kernels do not serve this call, in one line, or None."""
    if input.device.type != DEVICE:
        return f"it computes on CUDA devices, and the logits are on {input.device}"
    if input.dtype not in DTYPES:
        return f"it computes in float32, bfloat16 and float16, and the logits are {input.dtype}"
    if input.shape[-1] > MAX_CLASSES:
        return f"it takes up to {MAX_CLASSES} classes, and got {input.shape[-1]}"
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
    """Return loss, nll and correct [B, T], statistics [B, T, 2] and the gradient, as the reference does.

    A target that is neither a class nor ``ignore_index`` makes NaN of the row's loss, nll and gradient.
    """
    options = (ignore_index, pad_index, on_target, on_other)
    rows, gradient = _rows(input), None
    if grad_scale is not None:
        gradient = rows if inplace else rows.new_empty(rows.shape)
        grad_scale = grad_scale.float()
    results = torch.ops.nlpfast.cuda_cross_entropy_forward(
        rows, target.contiguous(), *options, grad_scale, gradient
    )
    # logits that had to be copied get their gradient by a copy
    return (*results, input.copy_(rows) if gradient is rows and rows is not input else gradient)


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
    """Return the gradient of the logits: the one that forward made, in rows that it was made for."""
    options = (ignore_index, pad_index, on_target, on_other)
    target, statistics = target.contiguous(), statistics.contiguous()
    scale = None if gradient is None or grad_scale is None else grad_scale.float()
    if gradient is not None and inplace:
        # the logits are no more
        made = gradient if _side_by_side(gradient) else gradient.contiguous()
        torch.ops.nlpfast.cuda_cross_entropy_backward(
            grad_loss, made, target, statistics, scale, *options, True, made
        )
        return made if made is gradient else gradient.copy_(made)
    rows, out = _rows(input), gradient
    if out is None:
        out = rows if inplace else rows.new_empty(rows.shape)
    torch.ops.nlpfast.cuda_cross_entropy_backward(
        grad_loss, rows, target, statistics, scale, *options, False, out
    )
    return input.copy_(out) if inplace and rows is not input else out


def _side_by_side(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] == 1


def _rows(input: Tensor) -> Tensor:
    """Return the logits, or a copy where the classes of a row do not lie side by side."""
    return input if _side_by_side(input) else input.contiguous()


def _register_fakes() -> None:
    """Tell torch.compile the shapes of what the operations return."""

    @torch.library.register_fake("nlpfast::cuda_cross_entropy_forward")
    def _(input, *rest):  # type: ignore[no-untyped-def]
        B, T, _ = input.shape
        loss = input.new_empty((B, T), dtype=torch.float32)
        correct = input.new_empty((B, T), dtype=torch.bool)
        return loss, torch.empty_like(loss), correct, input.new_empty((B, T, 2), dtype=torch.float32)

    @torch.library.register_fake("nlpfast::cuda_cross_entropy_backward")
    def _(*arguments):  # type: ignore[no-untyped-def]
        return None


_register_fakes()
