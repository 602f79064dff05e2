"""Bias, GELU or ReLU, dropout in Triton: a program takes eight rows of some columns, in registers.

    v = x + bias     y = mask factor v Phi(v)     dx = mask factor dy (Phi(v) + v phi(v))

Eight rows share a call of Philox for each column. Each tensor is read once and written once. In the backward
pass a program goes through its groups of rows in order and leaves one sum for the gradient of bias, which
PyTorch adds up: the same bits every time.

Legend: N rows, C channels; Phi and phi are the normal law's distribution function and density.
"""

import triton
import triton.language as tl

from nlpfast.ops.attention.triton_tile import kept, survivors

# Rows that share a call of Philox.
GROUP = tl.constexpr(8)
SQRT_HALF = tl.constexpr(0.70710678118654752)
SQRT_2_OVER_PI = tl.constexpr(0.79788456080286536)
CUBIC = tl.constexpr(0.044715)
# The activations, as in reference.py; 0 is GELU by the error function.
TANH, RELU = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _share(v, ACTIVATION: tl.constexpr):
    """Return what GELU multiplies v by."""
    if ACTIVATION == TANH:
        return tl.sigmoid(v * (v * v * CUBIC + 1) * (2 * SQRT_2_OVER_PI))
    else:
        return 0.5 * (1 + tl.erf(v * SQRT_HALF))


@triton.jit
def _activated(v, ACTIVATION: tl.constexpr):
    """Return the activation of v."""
    if ACTIVATION == RELU:
        return tl.where(v <= 0, 0.0, v)
    return v * _share(v, ACTIVATION)


@triton.jit
def _slope(v, ACTIVATION: tl.constexpr):
    """Return the derivative."""
    if ACTIVATION == RELU:
        # 1 for a NaN
        return tl.where(v <= 0, 0.0, 1.0)
    share = _share(v, ACTIVATION)
    if ACTIVATION == TANH:
        # 1 - share without cancellation; where one of the two is 0 the rest may be infinite
        other = _share(-v, ACTIVATION)
        bend = v * (v * v * (3 * CUBIC) + 1) * (2 * SQRT_2_OVER_PI) * share * other
        return share + tl.where((share == 0) | (other == 0), 0.0, bend)
    else:
        return share + v * (0.5 * SQRT_2_OVER_PI) * tl.exp(v * v * -0.5)


@triton.jit
def _dropped(x, seed_ptr, group, first, threshold, factor, COLUMNS: tl.constexpr, DROPOUT: tl.constexpr):
    """Return the rows with what the mask drops set to 0, and the rest times the factor."""
    if DROPOUT:
        bits = survivors(seed_ptr, group * 0, group * GROUP, first, threshold, GROUP, COLUMNS, False)
        return tl.where(kept(bits, False), x * factor, 0.0)
    else:
        return x


@triton.jit
def _sum(x_ptr, bias_ptr, place, c, inside, C):
    """Return x + bias."""
    v = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        v += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return v


@triton.jit
def _fwd_kernel(
    x_ptr, bias_ptr, seed_ptr, out_ptr, N, C, threshold, factor,
    COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    group, first = tl.program_id(0), tl.program_id(1) * COLUMNS
    rows = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    c = first + tl.arange(0, COLUMNS)
    inside = (rows < N)[:, None] & (c < C)[None, :]
    place = rows[:, None] * C + c[None, :]
    v = _sum(x_ptr, bias_ptr, place, c, inside, C)
    out = _dropped(_activated(v, ACTIVATION), seed_ptr, group, first, threshold, factor, COLUMNS, DROPOUT)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bwd_kernel(
    grad_ptr, x_ptr, bias_ptr, seed_ptr, dx_ptr, sums_ptr, N, C, groups, programs, threshold, factor,
    COLUMNS: tl.constexpr, ACTIVATION: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    program, first = tl.program_id(0), tl.program_id(1) * COLUMNS
    c = first + tl.arange(0, COLUMNS)
    d_bias = tl.zeros([COLUMNS], tl.float32)
    for group in range(program, groups, programs):
        rows = tl.cast(group, tl.int64) * GROUP + tl.arange(0, GROUP)
        inside = (rows < N)[:, None] & (c < C)[None, :]
        place = rows[:, None] * C + c[None, :]
        v = _sum(x_ptr, bias_ptr, place, c, inside, C)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dx = grad * _slope(v, ACTIVATION)
        number = tl.cast(group, tl.int32)
        dx = _dropped(dx, seed_ptr, number, first, threshold, factor, COLUMNS, DROPOUT)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        d_bias += tl.sum(tl.where(inside, dx, 0.0), 0)
    tl.store(sums_ptr + program * C + c, d_bias, mask=c < C)
