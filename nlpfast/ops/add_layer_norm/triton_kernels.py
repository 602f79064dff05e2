"""Residual sum, dropout and layer norm in Triton: a program takes eight rows at a time, in registers.

    s = residual + mask factor part     y = (s - mean) rstd weight + bias
    g = weight dy     x = (s - mean) rstd
    ds += rstd (g - mean(g) - x mean(g x))     d_part = mask factor ds

Eight rows share a call of Philox for each column. Each tensor is read once and written once. In the backward
pass a program goes through its groups of rows in order and leaves one sum of each for the gradients of weight
and bias, which PyTorch adds up: the same bits every time.

Legend: N rows, C channels; statistics are mean and rstd of each row.
"""

import triton
import triton.language as tl

from nlpfast.ops.attention.triton_tile import kept, survivors

# Rows that share a call of Philox.
GROUP = tl.constexpr(8)


@triton.jit
def _dropped(x, seed_ptr, group, threshold, factor, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr):
    """Return the rows with what the mask drops set to 0, and the rest times the factor."""
    if DROPOUT:
        bits = survivors(seed_ptr, group * 0, group * GROUP, 0, threshold, GROUP, BLOCK_C, False)
        return tl.where(kept(bits, False), x * factor, 0.0)
    else:
        return x


@triton.jit
def _fwd_kernel(
    part_ptr, residual_ptr, weight_ptr, bias_ptr, seed_ptr, sum_ptr, out_ptr, stats_ptr,
    N, threshold, factor, eps, C: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0)
    rows = group.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    c = tl.arange(0, BLOCK_C)
    inside = (rows < N)[:, None] & (c < C)[None, :]
    place = rows[:, None] * C + c[None, :]
    part = tl.load(part_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    total += _dropped(part, seed_ptr, group, threshold, factor, BLOCK_C, DROPOUT)
    rounded = total.to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, rounded, mask=inside)
    total = tl.where(inside, rounded.to(tl.float32), 0.0)
    mean = tl.sum(total, 1) / C
    centred = tl.where((c < C)[None, :], total - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    tl.store(stats_ptr + 2 * rows, mean, mask=rows < N)
    tl.store(stats_ptr + 2 * rows + 1, rstd, mask=rows < N)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    out = centred * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        out += tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _bwd_kernel(
    grad_ptr, grad_sum_ptr, sum_ptr, stats_ptr, weight_ptr, seed_ptr, d_part_ptr, d_residual_ptr, sums_ptr,
    N, groups, programs, threshold, factor, C: tl.constexpr, BLOCK_C: tl.constexpr, DROPOUT: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    c = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    d_weight, d_bias = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    for group in range(program, groups, programs):
        rows = tl.cast(group, tl.int64) * GROUP + tl.arange(0, GROUP)
        inside = (rows < N)[:, None] & (c < C)[None, :]
        place = rows[:, None] * C + c[None, :]
        slope = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + 2 * rows, mask=rows < N, other=0.0)
        rstd = tl.load(stats_ptr + 2 * rows + 1, mask=rows < N, other=0.0)
        x = tl.where(inside, (total - mean[:, None]) * rstd[:, None], 0.0)
        d_weight += tl.sum(slope * x, 0)
        d_bias += tl.sum(slope, 0)
        g = slope * weight[None, :]
        mean_g, mean_gx = tl.sum(g, 1) / C, tl.sum(g * x, 1) / C
        d = rstd[:, None] * (g - mean_g[:, None] - x * mean_gx[:, None])
        if grad_sum_ptr is not None:
            d += tl.load(grad_sum_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_residual_ptr + place, d.to(d_residual_ptr.dtype.element_ty), mask=inside)
        if d_part_ptr is not None:
            d = _dropped(d, seed_ptr, tl.cast(group, tl.int32), threshold, factor, BLOCK_C, DROPOUT)
            tl.store(d_part_ptr + place, d.to(d_part_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + program * 2 * C + c, d_weight, mask=c < C)
    tl.store(sums_ptr + program * 2 * C + C + c, d_bias, mask=c < C)
