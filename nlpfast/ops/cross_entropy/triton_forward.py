"""The forward kernels of cross entropy in Triton: a program a row, which may also write its gradient.

    total = sum_v exp(x_v - top),  nll = log total + top - x_target,  loss = sum_v q_v (log total + top - x_v)
    dx_v = g (exp(x_v - top) / total - q_v)

_fwd_whole_kernel holds the row in registers: one read, one exponential a class, one write. Rows that are too
long for that are left to _fwd_blocks_kernel, which goes over them twice. In its first pass each lane keeps a
maximum of its own and a sum relative to it (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018), which the lanes join once, at the end; no lane waits for another meanwhile. The second pass,
for the gradient, finds the row in the caches.

The target's logit is left out of maximum and sum and added at the end: see triton_row.py. A target that is no
class reads nothing and has the logit NaN, and so have its loss and gradient. Questions that concern one class
are not asked of each: the gradients of the target and of the class without mass are put right at the end.

Legend: B sequences, T rows of each, V classes, VEC numbers in 16 bytes, or 1 where rows begin anywhere.
"""

import triton
import triton.language as tl

from nlpfast.ops.cross_entropy.triton_row import (
    beats,
    begin_of,
    finite_of,
    logit_of,
    losses_of,
    store_row,
)

# What a kernel is compiled for must not depend on them: a row's sums are added in the same order wherever it
# lies, and whatever comes before it.
NUMBERS = (
    *("x_stride_b", "x_stride_t", "gradient_stride_b", "gradient_stride_t", "T", "V"),
    *("ignore_index", "pad_index"),
)


@triton.jit(do_not_specialize=NUMBERS)
def _fwd_whole_kernel(
    x_ptr, target_ptr, scale_ptr, loss_ptr, nll_ptr, correct_ptr, stats_ptr, gradient_ptr,
    x_stride_b, x_stride_t, gradient_stride_b, gradient_stride_t, T, V, ignore_index, pad_index,
    on_target, off_target, on_other,
    BLOCK: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, b, t = program.to(tl.int64), program // T, program % T
    V = V // VEC * VEC
    v = tl.arange(0, BLOCK)
    x_ptr += begin_of(b, t, x_stride_b, x_stride_t, VEC)
    if gradient_ptr is not None:
        gradient_ptr += begin_of(b, t, gradient_stride_b, gradient_stride_t, VEC)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        store_row(row, 0.0, 0.0, False, 0.0, 0.0, loss_ptr, nll_ptr, correct_ptr, stats_ptr)
        if gradient_ptr is not None:
            tl.store(gradient_ptr + v, tl.zeros([BLOCK], gradient_ptr.dtype.element_ty), mask=v < V)
        return
    at = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    at_target = logit_of(x_ptr, at, 1, True)
    origin = tl.where(tl.abs(at_target) < float("inf"), at_target, 0.0)

    x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
    below = tl.sum(tl.where((v < V) & (v != at) & (v != pad_index), origin - x, 0.0), 0)
    x = tl.where(v == at, float("-inf"), x)
    largest = tl.max(x, 0)
    probs = tl.exp(x - finite_of(largest))
    rest = tl.sum(probs, 0)
    loss, nll, top, others, weight = losses_of(
        at_target, at, largest, rest, below, origin, V, pad_index, on_target, on_other
    )
    correct = at_target > largest
    # Ties, infinities and NaN: rare enough to read the row again rather than to keep it in registers.
    if (at_target == largest) | (weight != weight):
        x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        correct = (tl.max(beats(x, v, at_target, at, V).to(tl.int32), 0) == 0) & (at >= 0)
    store_row(row, loss, nll, correct, top, others, loss_ptr, nll_ptr, correct_ptr, stats_ptr)

    if gradient_ptr is not None:
        kind = gradient_ptr.dtype.element_ty
        scale = tl.load(scale_ptr).to(tl.float32)
        factor = scale * weight
        at_pad = logit_of(x_ptr, pad_index, 1, True)
        # all warps have read it before one of them writes the gradient over it
        tl.debug_barrier()
        tl.store(gradient_ptr + v, (probs * factor - scale * on_other).to(kind), mask=v < V)
        tl.debug_barrier()
        # rest * drop / total is others / total, with the digits that softmax - 1 would lose
        tl.store(gradient_ptr + at, (scale * (off_target - rest * weight)).to(kind), mask=at >= 0)
        on_pad = tl.exp(at_pad - finite_of(largest)) * factor
        tl.store(gradient_ptr + pad_index, on_pad.to(kind), mask=(pad_index >= 0) & (pad_index != at))


@triton.jit(do_not_specialize=NUMBERS)
def _fwd_blocks_kernel(
    x_ptr, target_ptr, scale_ptr, loss_ptr, nll_ptr, correct_ptr, stats_ptr, gradient_ptr,
    x_stride_b, x_stride_t, gradient_stride_b, gradient_stride_t, T, V, ignore_index, pad_index,
    on_target, off_target, on_other,
    BLOCK: tl.constexpr, LANES: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, b, t = program.to(tl.int64), program // T, program % T
    V = V // VEC * VEC
    # A lane is of one thread. Its classes of a block lie side by side where a thread can load them as one,
    # and LANES apart elsewhere, so that it is the threads of a warp that read side by side.
    EACH: tl.constexpr = BLOCK // LANES
    lane, each = tl.arange(0, LANES)[:, None], tl.arange(0, EACH)[None, :]
    column = lane * EACH + each if VEC > 1 else lane + each * LANES
    x_ptr += begin_of(b, t, x_stride_b, x_stride_t, VEC)
    if gradient_ptr is not None:
        gradient_ptr += begin_of(b, t, gradient_stride_b, gradient_stride_t, VEC)
    target = tl.load(target_ptr + row)
    if target == ignore_index:
        store_row(row, 0.0, 0.0, False, 0.0, 0.0, loss_ptr, nll_ptr, correct_ptr, stats_ptr)
        if gradient_ptr is not None:
            zeros = tl.zeros([LANES, EACH], gradient_ptr.dtype.element_ty)
            for first in range(0, V, BLOCK):
                tl.store(gradient_ptr + first + column, zeros, mask=first + column < V)
        return
    at = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    at_target = logit_of(x_ptr, at, 1, True)
    origin = tl.where(tl.abs(at_target) < float("inf"), at_target, 0.0)

    maxima = tl.full([LANES], float("-inf"), tl.float32)
    sums = tl.zeros([LANES], tl.float32)
    belows = tl.zeros([LANES], tl.float32)
    for first in range(0, V, BLOCK):
        v = first + column
        x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
        belows += tl.sum(tl.where((v < V) & (v != at) & (v != pad_index), origin - x, 0.0), 1)
        x = tl.where(v == at, float("-inf"), x)
        larger = tl.maximum(maxima, tl.max(x, 1))
        base = finite_of(larger)
        sums = sums * tl.exp(maxima - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        maxima = larger
    largest = tl.max(maxima, 0)
    base = finite_of(largest)
    rest = tl.sum(sums * tl.exp(maxima - base), 0)
    loss, nll, top, others, weight = losses_of(
        at_target, at, largest, rest, tl.sum(belows, 0), origin, V, pad_index, on_target, on_other
    )
    correct = at_target > largest
    # ties, infinities and NaN
    if (at_target == largest) | (weight != weight):
        beaten = tl.zeros([], tl.int32)
        for first in range(0, V, BLOCK):
            v = first + column
            x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            beaten += tl.sum(tl.sum(beats(x, v, at_target, at, V).to(tl.int32), 1), 0)
        correct = (beaten == 0) & (at >= 0)
    store_row(row, loss, nll, correct, top, others, loss_ptr, nll_ptr, correct_ptr, stats_ptr)

    if gradient_ptr is not None:
        kind = gradient_ptr.dtype.element_ty
        scale = tl.load(scale_ptr).to(tl.float32)
        factor = scale * weight
        at_pad = logit_of(x_ptr, pad_index, 1, True)
        # all warps have read it before one of them writes the gradient over it
        tl.debug_barrier()
        for first in range(0, V, BLOCK):
            v = first + column
            x = tl.load(x_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32)
            slope = tl.exp(x - base) * factor - scale * on_other
            tl.store(gradient_ptr + v, slope.to(kind), mask=v < V)
        tl.debug_barrier()
        tl.store(gradient_ptr + at, (scale * (off_target - rest * weight)).to(kind), mask=at >= 0)
        on_pad = tl.exp(at_pad - base) * factor
        tl.store(gradient_ptr + pad_index, on_pad.to(kind), mask=(pad_index >= 0) & (pad_index != at))
