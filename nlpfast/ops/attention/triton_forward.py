"""The forward kernel of attention in Triton: one program computes a tile of queries of one head.

    O = dropout(softmax(scale * Q Kᵀ + mask)) V,   lse = log sum exp(scale * Q Kᵀ + mask)

Keys come by in tiles under a running maximum (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018; Dao et al., "FlashAttention", 2022); short rows take a single tile. The output stays in
registers until its row's sum is known. A row's maximum and the inverse of its sum are kept for backward,
which recomputes the weights from them: from lse alone, whose rounding is a relative error of every weight, it
could not. Tiles that nobody sees are not read.

Legend: B batch, H query heads, L queries, S keys, D head size, DV of value; i queries, j keys.
"""

import triton
import triton.language as tl

from nlpfast.ops.attention.triton_tile import (
    LOG2E,
    kept,
    keys_of,
    limit_of,
    load_rows,
    rows_of,
    scores_of,
    seen_in_tile,
    store_rows,
    survivors,
)


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, lengths_ptr, prefix_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,
    out_ptr, lse_ptr, stats_ptr,
    q_strides, k_strides, v_strides, mask_strides, out_strides, row_strides,
    H, GROUP, L, S, scale, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(L, BLOCK_M)
    head = tl.program_id(0) // tiles
    # The last queries see most keys: they go first.
    i0 = (tiles - 1 - tl.program_id(0) % tiles) * BLOCK_M
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    q_first, queries = rows_of(b, cu_q_ptr, L)
    k_first, length = rows_of(b, cu_k_ptr, S)
    if i0 >= queries:
        return
    keys, prefix = keys_of(b, lengths_ptr, prefix_ptr, length)
    i = i0 + tl.arange(0, BLOCK_M)
    limit = limit_of(i, queries, length, keys, prefix, CAUSAL)
    most = tl.max(limit, 0)

    q_ptr += b * q_strides[0] + h * q_strides[1] + q_first * q_strides[2]
    k_ptr += b * k_strides[0] + (h // GROUP) * k_strides[1] + k_first * k_strides[2]
    v_ptr += b * v_strides[0] + (h // GROUP) * v_strides[1] + k_first * v_strides[2]
    if MASK != 0:
        mask_ptr += b * mask_strides[0] + h * mask_strides[1]
    q = load_rows(q_ptr, i0, q_strides[2], q_strides[3], limit > 0, D, BLOCK_D)

    maximum = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    out = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for j0 in range(0, most, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        k = load_rows(k_ptr, j0, k_strides[2], k_strides[3], j < most, D, BLOCK_D)
        seen = j < most
        if MASK != 0:
            seen = seen_in_tile(limit, j0, mask_ptr, mask_strides, i0, BLOCK_N, 1, MASK)
        v = load_rows(v_ptr, j0, v_strides[2], v_strides[3], seen, DV, BLOCK_DV)
        if DROPOUT:
            bits = survivors(seed_ptr, head, i0, j0, threshold, BLOCK_M, BLOCK_N, False)
        scores = scores_of(q, k, i0, j0, limit, scale, mask_ptr, mask_strides, False, MASK, PRECISION)
        larger = tl.maximum(maximum, tl.max(scores, 1))
        # A row that has seen nothing yet: exp(-inf - 0) is 0, where -inf - -inf would be NaN.
        finite = tl.where(larger == float("-inf"), 0.0, larger)
        probs = tl.exp2((scores - finite[:, None]) * LOG2E)
        shrink = tl.exp2((maximum - finite) * LOG2E)
        total = total * shrink + tl.sum(probs, 1)
        if DROPOUT:
            probs = tl.where(kept(bits, False), probs, 0.0)
        out = tl.dot(probs.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
        maximum = larger

    # Not `> 0`: NaN in a query is to stay NaN.
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    inverse, maximum = tl.where(empty, 0.0, 1.0 / total), tl.where(empty, 0.0, maximum)
    inside = i < queries
    out_ptr += b * out_strides[0] + h * out_strides[1] + q_first * out_strides[2]
    weight = inverse * keep_scale
    store_rows(out_ptr, i0, out_strides[2], 1, inside, out * weight[:, None], DV, BLOCK_DV)
    row = b * row_strides[0] + h * row_strides[1] + q_first + i
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), maximum + tl.log(total)), mask=inside)
    if stats_ptr is not None:
        tl.store(stats_ptr + 2 * row, maximum, mask=inside)
        tl.store(stats_ptr + 2 * row + 1, inverse, mask=inside)
