"""The backward kernel of cross entropy in Triton: a program a row, for the upstream gradient that came.

    dx_v = g (exp(x_v - top) / total - q_v),  total = others + exp(x_target - top)

`top` and `others` are the statistics that forward kept. Where forward has already written the gradient, for
the upstream gradient `scale`, and the row's is that very number, the program returns at once: nobody on the
CPU has to know. Else it computes the row again, or, where the gradient has taken the place of the logits,
multiplies it by g / scale (RESCALE). Rows of ignored targets are written as zeros, or are zeros already.

Legend: B sequences, T rows of each, V classes, VEC numbers in 16 bytes, or 1 where rows begin anywhere.
"""

import triton
import triton.language as tl

from nlpfast.ops.cross_entropy.triton_row import begin_of, logit_of, normalizer_of, place_of

NUMBERS = (
    *("upstream_stride_b", "upstream_stride_t", "x_stride_b", "x_stride_t", "x_stride_v"),
    *("gradient_stride_b", "gradient_stride_t", "gradient_stride_v", "T", "V", "ignore_index", "pad_index"),
)


@triton.jit(do_not_specialize=NUMBERS)
def _bwd_kernel(
    upstream_ptr, x_ptr, target_ptr, stats_ptr, scale_ptr, gradient_ptr,
    upstream_stride_b, upstream_stride_t, x_stride_b, x_stride_t, x_stride_v,
    gradient_stride_b, gradient_stride_t, gradient_stride_v,
    T, V, ignore_index, pad_index, off_target, on_other,
    BLOCK: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr, RESCALE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row, b, t = program.to(tl.int64), program // T, program % T
    V = V // VEC * VEC
    upstream = tl.load(upstream_ptr + begin_of(b, t, upstream_stride_b, upstream_stride_t, 1)).to(tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr).to(tl.float32)
        # the bits: a NaN is itself, and 0 is not -0
        if upstream.to(tl.int32, bitcast=True) == scale.to(tl.int32, bitcast=True):
            return
    target = tl.load(target_ptr + row)
    column = tl.arange(0, BLOCK)
    kind = gradient_ptr.dtype.element_ty
    gradient_ptr += begin_of(b, t, gradient_stride_b, gradient_stride_t, VEC)
    if target == ignore_index:
        zeros = tl.zeros([BLOCK], kind)
        for first in range(0, V, BLOCK):
            v = first + column
            tl.store(gradient_ptr + place_of(v, gradient_stride_v, UNIT), zeros, mask=v < V)
        return
    if RESCALE:
        factor = upstream / scale
        for first in range(0, V, BLOCK):
            v = first + column
            place = gradient_ptr + place_of(v, gradient_stride_v, UNIT)
            slope = tl.load(place, mask=v < V, other=0.0).to(tl.float32) * factor
            tl.store(place, slope.to(kind), mask=v < V)
        return
    x_ptr += begin_of(b, t, x_stride_b, x_stride_t, VEC)
    at = tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)
    at_target, at_pad = logit_of(x_ptr, at, x_stride_v, UNIT), logit_of(x_ptr, pad_index, x_stride_v, UNIT)
    top, others = tl.load(stats_ptr + 2 * row), tl.load(stats_ptr + 2 * row + 1)
    total = normalizer_of(at_target, top, others)
    factor = upstream / total
    # all warps have read these logits before one of them writes the gradient over them
    tl.debug_barrier()
    for first in range(0, V, BLOCK):
        v = first + column
        x = tl.load(x_ptr + place_of(v, x_stride_v, UNIT), mask=v < V, other=0.0).to(tl.float32)
        slope = tl.exp(x - top) * factor - upstream * on_other
        tl.store(gradient_ptr + place_of(v, gradient_stride_v, UNIT), slope.to(kind), mask=v < V)
    tl.debug_barrier()
    on_target = (upstream * (off_target - others / total)).to(kind)
    tl.store(gradient_ptr + place_of(at, gradient_stride_v, UNIT), on_target, mask=at >= 0)
    on_pad, inside = (tl.exp(at_pad - top) * factor).to(kind), (pad_index >= 0) & (pad_index != at)
    tl.store(gradient_ptr + place_of(pad_index, gradient_stride_v, UNIT), on_pad, mask=inside)
