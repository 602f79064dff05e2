"""The backward kernel of attention in Triton for short rows: a program computes all gradients of a key head.

    dV = Pdᵀ dO,   dP = dropout(dO Vᵀ),   dS = P * (dP - rowsum(P * dP) + dlse),
    dQ = scale dS K,   dK = scale dSᵀ Q

Keys and values of a tile stay on the chip, their gradients in registers; the queries of every head of the
group come by. Nothing is added by atomics: the same bits every time. When one tile holds all keys (WHOLE) the
rows are complete: maximum, sum and rowsum(P * dP) are computed anew, neither the output nor anything else of
the forward pass is read, and a 16-bit number costs 14 bytes of traffic: q, k, v, dO in, dQ, dK, dV out.
Otherwise the forward's maximum and sum are read, rowsum(P * dP) = rowsum(O * dO), and dQ is summed over the
tiles of keys in ``sum_ptr``, float32, which only this program touches.

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
def _bwd_kernel(
    grad_ptr, grad_lse_ptr, q_ptr, k_ptr, v_ptr, out_ptr, stats_ptr,
    mask_ptr, lengths_ptr, prefix_ptr, cu_q_ptr, cu_k_ptr, seed_ptr,
    dq_ptr, dk_ptr, dv_ptr, sum_ptr,
    grad_strides, q_strides, k_strides, v_strides, out_strides, mask_strides, row_strides,
    dq_strides, dk_strides, dv_strides,
    H, GROUP, L, S, scale, threshold, keep_scale,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    key_heads = H // GROUP
    b, hk = (tl.program_id(0) // key_heads).to(tl.int64), (tl.program_id(0) % key_heads).to(tl.int64)
    q_first, queries = rows_of(b, cu_q_ptr, L)
    k_first, length = rows_of(b, cu_k_ptr, S)
    keys, prefix = keys_of(b, lengths_ptr, prefix_ptr, length)
    most = limit_of(queries - 1, queries, length, keys, prefix, CAUSAL)
    k_ptr += b * k_strides[0] + hk * k_strides[1] + k_first * k_strides[2]
    v_ptr += b * v_strides[0] + hk * v_strides[1] + k_first * v_strides[2]

    # Once also without keys, for the zeros of dQ.
    for j0 in range(0, tl.maximum(length, 1), BLOCK_N):
        j = j0 + tl.arange(0, BLOCK_N)
        seen = j < most
        if MASK != 0:
            seen = j < 0
            for g in range(0, GROUP):
                mask_at = mask_ptr + b * mask_strides[0] + (hk * GROUP + g) * mask_strides[1]
                for i0 in range(0, queries, BLOCK_M):
                    limit = limit_of(i0 + tl.arange(0, BLOCK_M), queries, length, keys, prefix, CAUSAL)
                    seen = seen | seen_in_tile(limit, j0, mask_at, mask_strides, i0, BLOCK_N, 1, MASK)
        k = load_rows(k_ptr, j0, k_strides[2], k_strides[3], seen, D, BLOCK_D)
        v = load_rows(v_ptr, j0, v_strides[2], v_strides[3], j < most, DV, BLOCK_DV)
        dk, dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
        # The first tile of keys visits all queries: those that see nothing get their zeros.
        first = first_tile_of(j0, queries, length, keys, prefix, CAUSAL, BLOCK_M)
        first = tl.where(j0 == 0, 0, first)
        for g in range(0, GROUP):
            h = hk * GROUP + g
            row0 = b * row_strides[0] + h * row_strides[1] + q_first
            q_at = q_ptr + b * q_strides[0] + h * q_strides[1] + q_first * q_strides[2]
            grad_at = grad_ptr + b * grad_strides[0] + h * grad_strides[1] + q_first * grad_strides[2]
            out_at = out_ptr + b * out_strides[0] + h * out_strides[1] + q_first * out_strides[2]
            dq_at = dq_ptr + b * dq_strides[0] + h * dq_strides[1] + q_first * dq_strides[2]
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
                shift = shift_of(
                    out_at, out_strides[2], grad, grad_lse_ptr, row0, i0, seeing, DV, BLOCK_DV, WHOLE
                )
                weights, d_scores, _ = score_gradients(
                    q, k, v, grad, shift, stats_ptr, row0, i0, j0, limit, scale,
                    mask_at, mask_strides, b, h, seed_ptr, H, threshold, keep_scale,
                    WHOLE, True, MASK, DROPOUT, PRECISION,
                )  # fmt: skip
                weights, d_scores = weights.to(grad.dtype), d_scores.to(q.dtype)
                dv = tl.dot(weights, grad, dv, input_precision=PRECISION)
                dk = tl.dot(d_scores, q, dk, input_precision=PRECISION)
                dq = tl.dot(tl.trans(d_scores), k, input_precision=PRECISION)
                if not WHOLE and j0 > 0:
                    dq += load_rows(sum_ptr + row0 * D, i0, D, 1, inside, D, BLOCK_D)
                if j0 + BLOCK_N >= tl.max(limit, 0):
                    store_rows(dq_at, i0, dq_strides[2], dq_strides[3], inside, dq * scale, D, BLOCK_D)
                elif not WHOLE:
                    store_rows(sum_ptr + row0 * D, i0, D, 1, inside, dq, D, BLOCK_D)
        dk_at = dk_ptr + b * dk_strides[0] + hk * dk_strides[1] + k_first * dk_strides[2]
        dv_at = dv_ptr + b * dv_strides[0] + hk * dv_strides[1] + k_first * dv_strides[2]
        store_rows(dk_at, j0, dk_strides[2], dk_strides[3], j < length, dk * scale, D, BLOCK_D)
        store_rows(dv_at, j0, dv_strides[2], dv_strides[3], j < length, dv, DV, BLOCK_DV)
        if not WHOLE:
            # The next tile of keys reads, with other threads, what this one wrote to sum_ptr.
            tl.debug_barrier()
