"""The backward kernels of attention in Triton for long rows, few heads, and the gradient of a mask.

The formulas are those of triton_backward.py. There one program owns all gradients of a head; here one owns a
tile of dQ, of dK and dV, or of the mask's gradient, and recomputes the scores that it needs: nothing is added
by atomics, and there is work for every multiprocessor. The kernel of dQ goes first and leaves
rowsum(P * dP) - dlse in ``shift_ptr`` for the others; with WHOLE, one tile of keys, it sums that itself,
otherwise it takes rowsum(O * dO).

Legend: B batch, H query heads, L queries, S keys, D head size, DV of value; i queries, j keys.
"""

import triton
import triton.language as tl

from nlpfast.ops.attention.triton_tile import (
    first_tile_of,
    keys_of,
    limit_of,
    load_rows,
    rows_of,
    score_gradients,
    seen_in_tile,
    shift_of,
    store_rows,
)


@triton.jit
def _bwd_dq_kernel(
    grad_ptr, grad_lse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr,
    mask_ptr, lengths_ptr, prefix_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,
    dq_ptr, shift_ptr,
    grad_strides, q_strides, k_strides, v_strides, out_strides, mask_strides, row_strides, dq_strides,
    H, GROUP, L, S, scale, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
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
    inside = i < queries
    limit = limit_of(i, queries, length, keys, prefix, CAUSAL)
    most = tl.max(limit, 0)
    q_ptr += b * q_strides[0] + h * q_strides[1] + q_first * q_strides[2]
    k_ptr += b * k_strides[0] + (h // GROUP) * k_strides[1] + k_first * k_strides[2]
    v_ptr += b * v_strides[0] + (h // GROUP) * v_strides[1] + k_first * v_strides[2]
    grad_ptr += b * grad_strides[0] + h * grad_strides[1] + q_first * grad_strides[2]
    out_ptr += b * out_strides[0] + h * out_strides[1] + q_first * out_strides[2]
    row0 = b * row_strides[0] + h * row_strides[1] + q_first
    if MASK != 0:
        mask_ptr += b * mask_strides[0] + h * mask_strides[1]

    q = load_rows(q_ptr, i0, q_strides[2], q_strides[3], limit > 0, D, BLOCK_D)
    grad = load_rows(grad_ptr, i0, grad_strides[2], grad_strides[3], limit > 0, DV, BLOCK_DV)
    shift = shift_of(out_ptr, out_strides[2], grad, grad_lse_ptr, row0, i0, limit > 0, DV, BLOCK_DV, WHOLE)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    whole_shift = shift
    for j0 in range(0, most, BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        seen = j < most
        if MASK != 0:
            seen = seen_in_tile(limit, j0, mask_ptr, mask_strides, i0, BLOCK_N, 1, MASK)
        k = load_rows(k_ptr, j0, k_strides[2], k_strides[3], seen, D, BLOCK_D)
        v = load_rows(v_ptr, j0, v_strides[2], v_strides[3], j < most, DV, BLOCK_DV)
        _, d_scores, whole_shift = score_gradients(
            q, k, v, grad, shift, stats_ptr, row0, i0, j0, limit, scale,
            mask_ptr, mask_strides, b, h, seed_ptr, H, threshold, keep_scale,
            WHOLE, False, MASK, DROPOUT, PRECISION,
        )  # fmt: skip
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision=PRECISION)
    dq_ptr += b * dq_strides[0] + h * dq_strides[1] + q_first * dq_strides[2]
    store_rows(dq_ptr, i0, dq_strides[2], dq_strides[3], inside, dq * scale, D, BLOCK_D)
    tl.store(shift_ptr + row0 + i, whole_shift, mask=inside)


@triton.jit
def _bwd_dkdv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, shift_ptr,
    mask_ptr, lengths_ptr, prefix_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,
    dk_ptr, dv_ptr,
    grad_strides, q_strides, k_strides, v_strides, mask_strides, row_strides, dk_strides, dv_strides,
    H, GROUP, L, S, scale, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tiles, key_heads = tl.cdiv(S, BLOCK_N), H // GROUP
    # The first keys are seen by most queries: they go first.
    j0 = tl.program_id(0) % tiles * BLOCK_N
    head = tl.program_id(0) // tiles
    b, hk = (head // key_heads).to(tl.int64), (head % key_heads).to(tl.int64)
    q_first, queries = rows_of(b, cu_q_ptr, L)
    k_first, length = rows_of(b, cu_k_ptr, S)
    if j0 >= length:
        return
    keys, prefix = keys_of(b, lengths_ptr, prefix_ptr, length)
    most = limit_of(queries - 1, queries, length, keys, prefix, CAUSAL)
    j = j0 + tl.arange(0, BLOCK_N)
    k_ptr += b * k_strides[0] + hk * k_strides[1] + k_first * k_strides[2]
    v_ptr += b * v_strides[0] + hk * v_strides[1] + k_first * v_strides[2]
    k = load_rows(k_ptr, j0, k_strides[2], k_strides[3], j < most, D, BLOCK_D)
    v = load_rows(v_ptr, j0, v_strides[2], v_strides[3], j < most, DV, BLOCK_DV)
    dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    first = first_tile_of(j0, queries, length, keys, prefix, CAUSAL, BLOCK_M)
    for g in range(0, GROUP):
        h = hk * GROUP + g
        row0 = b * row_strides[0] + h * row_strides[1] + q_first
        q_at = q_ptr + b * q_strides[0] + h * q_strides[1] + q_first * q_strides[2]
        grad_at = grad_ptr + b * grad_strides[0] + h * grad_strides[1] + q_first * grad_strides[2]
        mask_at = mask_ptr
        if MASK != 0:
            mask_at = mask_ptr + b * mask_strides[0] + h * mask_strides[1]
        for i0 in range(first, queries, BLOCK_M):
            i = i0 + tl.arange(0, BLOCK_M)
            inside = i < queries
            limit = limit_of(i, queries, length, keys, prefix, CAUSAL)
            seeing = limit > 0
            if MASK != 0:
                seeing = seen_in_tile(limit, j0, mask_at, mask_strides, i0, BLOCK_N, 0, MASK)
            q = load_rows(q_at, i0, q_strides[2], q_strides[3], seeing, D, BLOCK_D)
            grad = load_rows(grad_at, i0, grad_strides[2], grad_strides[3], seeing, DV, BLOCK_DV)
            shift = tl.load(shift_ptr + row0 + i, mask=inside, other=0.0)
            weights, d_scores, _ = score_gradients(
                q, k, v, grad, shift, stats_ptr, row0, i0, j0, limit, scale,
                mask_at, mask_strides, b, h, seed_ptr, H, threshold, keep_scale,
                False, True, MASK, DROPOUT, PRECISION,
            )  # fmt: skip
            weights, d_scores = weights.to(grad.dtype), d_scores.to(q.dtype)
            dv = tl.dot(weights, grad, dv, input_precision=PRECISION)
            dk = tl.dot(d_scores, q, dk, input_precision=PRECISION)
    dk_ptr += b * dk_strides[0] + hk * dk_strides[1] + k_first * dk_strides[2]
    dv_ptr += b * dv_strides[0] + hk * dv_strides[1] + k_first * dv_strides[2]
    store_rows(dk_ptr, j0, dk_strides[2], dk_strides[3], j < length, dk * scale, D, BLOCK_D)
    store_rows(dv_ptr, j0, dv_strides[2], dv_strides[3], j < length, dv, DV, BLOCK_DV)


@triton.jit
def _bwd_dmask_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, stats_ptr, shift_ptr,
    mask_ptr, lengths_ptr, prefix_ptr, seed_ptr, dmask_ptr,
    grad_strides, q_strides, k_strides, v_strides, mask_strides, row_strides, mask_shape, B,
    H, GROUP, L, S, scale, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # A dimension that the mask does not have (without ROWS that of the queries, without COLUMNS that of the
    # keys) is summed over by the program, a tile in the others is its own.
    i_tiles = tl.cdiv(mask_shape[2], BLOCK_M)
    j_tiles = tl.cdiv(mask_shape[3], BLOCK_N)
    tile = tl.program_id(0)
    i_first, j_first = tile // j_tiles % i_tiles * BLOCK_M, tile % j_tiles * BLOCK_N
    head = tile // j_tiles // i_tiles
    b_first, h_first = head // mask_shape[1], head % mask_shape[1]
    b_end = tl.where(mask_shape[0] == 1, B, b_first + 1)
    h_end = tl.where(mask_shape[1] == 1, H, h_first + 1)
    i_end, j_end = L, S
    if ROWS:
        i_end = tl.minimum(i_first + BLOCK_M, L)
    if COLUMNS:
        j_end = tl.minimum(j_first + BLOCK_N, S)
    dmask = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b32 in range(b_first, b_end):
        b = b32 + tl.zeros([], tl.int64)
        keys, prefix = keys_of(b, lengths_ptr, prefix_ptr, S)
        for h32 in range(h_first, h_end):
            h = h32 + tl.zeros([], tl.int64)
            row0 = b * row_strides[0] + h * row_strides[1]
            q_at = q_ptr + b * q_strides[0] + h * q_strides[1]
            grad_at = grad_ptr + b * grad_strides[0] + h * grad_strides[1]
            k_at = k_ptr + b * k_strides[0] + h // GROUP * k_strides[1]
            v_at = v_ptr + b * v_strides[0] + h // GROUP * v_strides[1]
            for i0 in range(i_first, i_end, BLOCK_M):
                i = i0 + tl.arange(0, BLOCK_M)
                limit = limit_of(i, L, S, keys, prefix, CAUSAL)
                most = tl.minimum(tl.max(limit, 0), j_end)
                q = load_rows(q_at, i0, q_strides[2], q_strides[3], limit > 0, D, BLOCK_D)
                grad = load_rows(grad_at, i0, grad_strides[2], grad_strides[3], limit > 0, DV, BLOCK_DV)
                shift = tl.load(shift_ptr + row0 + i, mask=i < L, other=0.0)
                for j0 in range(j_first, most, BLOCK_N):
                    j = j0 + tl.arange(0, BLOCK_N)
                    k = load_rows(k_at, j0, k_strides[2], k_strides[3], j < most, D, BLOCK_D)
                    v = load_rows(v_at, j0, v_strides[2], v_strides[3], j < most, DV, BLOCK_DV)
                    mask_at = mask_ptr + b * mask_strides[0] + h * mask_strides[1]
                    _, d_scores, _ = score_gradients(
                        q, k, v, grad, shift, stats_ptr, row0, i0, j0, limit, scale,
                        mask_at, mask_strides, b, h, seed_ptr, H, threshold, keep_scale,
                        False, False, MASK, DROPOUT, PRECISION,
                    )  # fmt: skip
                    dmask += d_scores
    dmask_ptr += head.to(tl.int64) * mask_shape[2] * mask_shape[3]
    i, j = i_first + tl.arange(0, BLOCK_M), j_first + tl.arange(0, BLOCK_N)
    if ROWS and COLUMNS:
        at = i.to(tl.int64)[:, None] * S + j[None, :]
        tl.store(dmask_ptr + at, dmask, mask=(i < L)[:, None] & (j < S)[None, :])
    elif ROWS:
        tl.store(dmask_ptr + i, tl.sum(dmask, 1), mask=i < L)
    elif COLUMNS:
        tl.store(dmask_ptr + j, tl.sum(dmask, 0), mask=j < S)
    else:
        tl.store(dmask_ptr, tl.sum(tl.sum(dmask, 1), 0))
