"""Attention's probabilities at single pairs in Triton: a program a pair and head; gradients without atomics.

    l_h = scale * q_ht . k_hs - lse_ht
    dq_ht += c_h scale k_hs      dk_hs += c_h scale q_ht      dlse_ht -= c_h

For the gradients the pairs come sorted by the row that is written. The first program of a row's pairs goes
through all of them, in the order in which they were given, and adds their sum to the row; the others have
nothing to do. So a row has one writer, and the sums the same bits every time.

A pair outside of batch, queries or keys reads and writes nothing; its l is NaN.

Legend: B batch, H query heads, Hk key heads, L queries, S keys, D head size, P pairs, n heads asked for.
"""

import triton
import triton.language as tl


@triton.jit
def _pair(pairs_ptr, p, B, L, S):
    """Return batch entry, query and key of a pair, and whether they are there."""
    b, t, s = tl.load(pairs_ptr + 3 * p), tl.load(pairs_ptr + 3 * p + 1), tl.load(pairs_ptr + 3 * p + 2)
    return b, t, s, (b >= 0) & (b < B) & (t >= 0) & (t < L) & (s >= 0) & (s < S)


@triton.jit
def _row(ptr, strides, b, h, i, d, mask):
    """Return a row of D elements, in float32."""
    place = ptr + b * strides[0] + h * strides[1] + i * strides[2] + d * strides[3]
    return tl.load(place, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _add_row(ptr, strides, b, h, i, d, mask, what):
    """Add to a row of D elements."""
    place = ptr + b * strides[0] + h * strides[1] + i * strides[2] + d * strides[3]
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32) + what
    tl.store(place, total.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _fwd_kernel(
    q_ptr, k_ptr, lse_ptr, pairs_ptr, heads_ptr, terms_ptr,
    q_strides, k_strides, lse_strides, B, GROUP, L, S, n, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    p, i = program // n, program % n
    h = tl.load(heads_ptr + i)
    b, t, s, there = _pair(pairs_ptr, p, B, L, S)
    d = tl.arange(0, BLOCK_D)
    mask = d < tl.where(there, D, 0)
    q, k = _row(q_ptr, q_strides, b, h, t, d, mask), _row(k_ptr, k_strides, b, h // GROUP, s, d, mask)
    lse = tl.load(
        lse_ptr + b * lse_strides[0] + h * lse_strides[1] + t * lse_strides[2], mask=there, other=0.0
    )
    score = scale * tl.sum(q * k, 0) - lse
    # a query that sees no key gives none a probability
    score = tl.where(lse == float("-inf"), float("-inf"), score)
    tl.store(terms_ptr + program, tl.where(there, score, float("nan")))


@triton.jit
def _bwd_query_kernel(
    c_ptr, k_ptr, pairs_ptr, order_ptr, heads_ptr, dq_ptr, dlse_ptr,
    k_strides, dq_strides, dlse_strides, B, GROUP, L, S, P, n, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at, i = program // n, program % n
    h = tl.load(heads_ptr + i)
    b, t, _, there = _pair(pairs_ptr, tl.load(order_ptr + at), B, L, S)
    if at > 0:
        b_before, t_before, _, before = _pair(pairs_ptr, tl.load(order_ptr + at - 1), B, L, S)
        there = there & ((b != b_before) | (t != t_before) | (before == 0))
    if not there:
        return
    d = tl.arange(0, BLOCK_D)
    total, rest = tl.zeros([BLOCK_D], tl.float32), tl.zeros([], tl.float32)
    going = at >= 0
    while going:
        pair = tl.load(order_ptr + at)
        b_here, t_here, s, inside = _pair(pairs_ptr, pair, B, L, S)
        same = (b_here == b) & (t_here == t)
        wanted = same & inside
        c = tl.load(c_ptr + pair * n + i, mask=wanted, other=0.0)
        if dq_ptr is not None:
            total += scale * c * _row(k_ptr, k_strides, b, h // GROUP, s, d, d < tl.where(wanted, D, 0))
        rest += c
        at += 1
        going = same & (at < P)
    if dq_ptr is not None:
        _add_row(dq_ptr, dq_strides, b, h, t, d, d < D, total)
    if dlse_ptr is not None:
        place = dlse_ptr + b * dlse_strides[0] + h * dlse_strides[1] + t * dlse_strides[2]
        tl.store(place, tl.load(place) - rest)


@triton.jit
def _bwd_key_kernel(
    c_ptr, q_ptr, pairs_ptr, order_ptr, heads_ptr, dk_ptr,
    q_strides, dk_strides, B, Hk, GROUP, L, S, P, n, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    at, hk = program // Hk, program % Hk
    b, _, s, there = _pair(pairs_ptr, tl.load(order_ptr + at), B, L, S)
    if at > 0:
        b_before, _, s_before, before = _pair(pairs_ptr, tl.load(order_ptr + at - 1), B, L, S)
        there = there & ((b != b_before) | (s != s_before) | (before == 0))
    if not there:
        return
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    read = tl.zeros([], tl.int32)
    going = at >= 0
    while going:
        pair = tl.load(order_ptr + at)
        b_here, t, s_here, inside = _pair(pairs_ptr, pair, B, L, S)
        same = (b_here == b) & (s_here == s)
        for i in range(0, n):
            h = tl.load(heads_ptr + i)
            wanted = same & inside & (h // GROUP == hk)
            c = tl.load(c_ptr + pair * n + i, mask=wanted, other=0.0)
            total += scale * c * _row(q_ptr, q_strides, b, h, t, d, d < tl.where(wanted, D, 0))
            read += wanted.to(tl.int32)
        at += 1
        going = same & (at < P)
    if read > 0:
        _add_row(dk_ptr, dk_strides, b, hk, s, d, d < D, total)
