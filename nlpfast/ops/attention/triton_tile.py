"""What the Triton kernels of attention share: which keys a query sees, tiles of scores, and dropout.

Visibility is one number a query: without a mask a query sees its first ``limit`` keys, whatever mixture of
causal alignment, prefix and lengths made that number; a mask takes more away. Scores are kept in natural
units, because their difference from the row's maximum is then exact where it matters, and exponentials are
taken in base 2, which is what the hardware has.

A tile is [M queries, N keys], or with KEYS_FIRST [N, M]: warps share out the first dimension of a matrix
product, and a product that sums over queries takes its left factor from registers when keys are there.

Legend: i queries, j keys, M queries and N keys of a tile, D head size.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def rows_of(b, cu_ptr, length):
    """Return the first row and the number of rows of sequence ``b``: packed, or one of a batch."""
    if cu_ptr is None:
        first = tl.zeros([], tl.int64)
        count = tl.zeros([], tl.int32) + length
    else:
        first = tl.load(cu_ptr + b).to(tl.int64)
        count = (tl.load(cu_ptr + b + 1) - first).to(tl.int32)
    return first, count


@triton.jit
def keys_of(b, lengths_ptr, prefix_ptr, S):
    """Return how many keys are no padding, and how many every query sees in spite of ``CAUSAL``."""
    keys = tl.zeros([], tl.int32) + S
    prefix = tl.zeros([], tl.int32)
    if lengths_ptr is not None:
        keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), S).to(tl.int32)
    if prefix_ptr is not None:
        prefix = tl.minimum(tl.load(prefix_ptr + b), S).to(tl.int32)
    return keys, prefix


@triton.jit
def limit_of(i, L, S, keys, prefix, CAUSAL: tl.constexpr):
    """Return how many keys query ``i`` sees; CAUSAL is 0 none, 1 top_left, 2 bottom_right."""
    limit = i * 0 + keys
    if CAUSAL == 1:
        limit = tl.minimum(tl.maximum(i + 1, prefix), keys)
    if CAUSAL == 2:
        limit = tl.minimum(tl.maximum(i + 1 + S - L, prefix), keys)
    return tl.where(i < L, limit, 0)


@triton.jit
def first_tile_of(j, L, S, keys, prefix, CAUSAL: tl.constexpr, M: tl.constexpr):
    """Return where the first tile of queries begins that sees key ``j``, L if none does."""
    first = tl.zeros([], tl.int32)
    if CAUSAL == 1:
        first = tl.where(j < prefix, 0, j)
    if CAUSAL == 2:
        first = tl.where(j < prefix, 0, tl.maximum(j - S + L, 0))
    return tl.where((j < keys) & (first < L), first // M * M, L)


@triton.jit
def load_rows(ptr, first, row_stride, column_stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Load rows of WIDTH columns from ``first`` on; zeros outside, and where ``inside`` is false."""
    rows, columns = tl.arange(0, inside.shape[0]), tl.arange(0, BLOCK)
    # 64 bits find the tile; inside of it 32 are enough, and take half of the registers.
    ptr += tl.cast(first, tl.int64) * row_stride
    at = rows[:, None] * row_stride + columns[None, :] * column_stride
    return tl.load(ptr + at, mask=inside[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def store_rows(ptr, first, row_stride, column_stride, inside, x, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store what ``load_rows`` would load."""
    rows, columns = tl.arange(0, inside.shape[0]), tl.arange(0, BLOCK)
    ptr += tl.cast(first, tl.int64) * row_stride
    at = rows[:, None] * row_stride + columns[None, :] * column_stride
    tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=inside[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def by_query(x, KEYS_FIRST: tl.constexpr):
    """Return a vector of queries in the shape that broadcasts over a tile."""
    return x[None, :] if KEYS_FIRST else x[:, None]


@triton.jit
def by_key(x, KEYS_FIRST: tl.constexpr):
    """Return a vector of keys in the shape that broadcasts over a tile."""
    return x[:, None] if KEYS_FIRST else x[None, :]


@triton.jit
def mask_tile(
    mask_ptr, mask_strides, i0, j0, inside, M: tl.constexpr, N: tl.constexpr, KEYS_FIRST: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Return a tile of a mask as what is added to the scores; -inf outside. MASK is 1 bool, 2 floating."""
    mask_ptr += tl.cast(i0, tl.int64) * mask_strides[2] + tl.cast(j0, tl.int64) * mask_strides[3]
    at = by_query(tl.arange(0, M) * mask_strides[2], KEYS_FIRST)
    at += by_key(tl.arange(0, N) * mask_strides[3], KEYS_FIRST)
    if MASK == 1:
        return tl.where(tl.load(mask_ptr + at, mask=inside, other=False), 0.0, float("-inf"))
    else:
        return tl.load(mask_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)


@triton.jit
def seen_in_tile(
    limit, j0, mask_ptr, mask_strides, i0, N: tl.constexpr, AXIS: tl.constexpr, MASK: tl.constexpr
):  # fmt: skip
    """Return which queries see a key of the tile (AXIS 0), or which keys a query of it sees (AXIS 1).

    What nobody sees may be NaN, and is loaded as 0: the 0 of a weight times NaN is NaN.
    """
    M: tl.constexpr = limit.shape[0]
    visible = by_key(j0 + tl.arange(0, N), True) < by_query(limit, True)
    if MASK != 0:
        visible = mask_tile(mask_ptr, mask_strides, i0, j0, visible, M, N, True, MASK) != float("-inf")
    return tl.max(visible.to(tl.int32), AXIS) > 0


@triton.jit
def scores_of(
    q, k, i0, j0, limit, scale, mask_ptr, mask_strides,
    KEYS_FIRST: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a tile of scores, -inf where hidden; MASK is 0 none, 1 bool, 2 floating."""
    M: tl.constexpr = q.shape[0]
    N: tl.constexpr = k.shape[0]
    if KEYS_FIRST:
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
    else:
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    visible = by_key(j0 + tl.arange(0, N), KEYS_FIRST) < by_query(limit, KEYS_FIRST)
    if MASK != 0:
        added = mask_tile(mask_ptr, mask_strides, i0, j0, visible, M, N, KEYS_FIRST, MASK)
        # NaN of a hidden key is not to be felt.
        return tl.where(added == float("-inf"), added, scores + added)
    else:
        return tl.where(visible, scores, float("-inf"))


@triton.jit
def survivors(
    seed_ptr, head, i0, j0, threshold, M: tl.constexpr, N: tl.constexpr, KEYS_FIRST: tl.constexpr
):  # fmt: skip
    """Return a bit for each of eight queries that says whether its weight of key j is kept: [M / 8, N].

    One call of Philox4x32-10 for key j and eight queries: nlpfast/ops/attention/reference.py, dropout_keep.
    ``i0`` and M are multiples of 8. With KEYS_FIRST [N, M / 8].
    """
    eights = by_query(i0 // 8 + tl.arange(0, M // 8), KEYS_FIRST)
    columns = by_key(j0 + tl.arange(0, N), KEYS_FIRST)
    eights, columns = tl.broadcast(eights.to(tl.uint32), columns.to(tl.uint32))
    offset = tl.load(seed_ptr + 1).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), columns, eights, head.to(tl.uint32), offset)
    bits = ((w0 & 0xFFFF) >= threshold).to(tl.int32) | ((w0 >> 16) >= threshold).to(tl.int32) << 1
    bits |= ((w1 & 0xFFFF) >= threshold).to(tl.int32) << 2 | ((w1 >> 16) >= threshold).to(tl.int32) << 3
    bits |= ((w2 & 0xFFFF) >= threshold).to(tl.int32) << 4 | ((w2 >> 16) >= threshold).to(tl.int32) << 5
    bits |= ((w3 & 0xFFFF) >= threshold).to(tl.int32) << 6 | ((w3 >> 16) >= threshold).to(tl.int32) << 7
    return bits


@triton.jit
def kept(bits, KEYS_FIRST: tl.constexpr):
    """Return which weights of a tile are kept: of the eight bits of a key every query takes its own."""
    if KEYS_FIRST:
        each = bits[:, :, None] >> tl.arange(0, 8)[None, None, :]
        each = tl.reshape(each, [bits.shape[0], bits.shape[1] * 8])
    else:
        each = bits[:, None, :] >> tl.arange(0, 8)[None, :, None]
        each = tl.reshape(each, [bits.shape[0] * 8, bits.shape[1]])
    return (each & 1) != 0


@triton.jit
def shift_of(
    out_ptr, out_stride, grad, grad_lse_ptr, row0, i0, inside, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Return rowsum(O * dO) - dlse from query ``i0`` on; with WHOLE only -dlse, the rest is summed later."""
    shift = tl.zeros([grad.shape[0]], tl.float32)
    if not WHOLE:
        out = load_rows(out_ptr, i0, out_stride, 1, inside, DV, BLOCK_DV)
        shift += tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
    if grad_lse_ptr is not None:
        shift -= tl.load(grad_lse_ptr + row0 + i0 + tl.arange(0, grad.shape[0]), mask=inside, other=0.0)
    return shift


@triton.jit
def score_gradients(
    q, k, v, grad, shift, stats_ptr, row0, i0, j0, limit, scale,
    mask_ptr, mask_strides, b, h, seed_ptr, H, threshold, keep_scale,
    WHOLE: tl.constexpr, KEYS_FIRST: tl.constexpr, MASK: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return of a tile P after dropout, dS, both float32, and the whole shift.

    ``shift`` is rowsum(P * dP) - dlse, with WHOLE only -dlse, and the sum is taken here.
    """
    M: tl.constexpr = q.shape[0]
    KEYS: tl.constexpr = 0 if KEYS_FIRST else 1
    if DROPOUT:
        head = (b * H + h).to(tl.int32)
        bits = survivors(seed_ptr, head, i0, j0, threshold, M, k.shape[0], KEYS_FIRST)
    scores = scores_of(q, k, i0, j0, limit, scale, mask_ptr, mask_strides, KEYS_FIRST, MASK, PRECISION)
    if WHOLE:
        maximum = tl.max(scores, KEYS)
        maximum = tl.where(maximum == float("-inf"), 0.0, maximum)
    else:
        at = 2 * (row0 + i0 + tl.arange(0, M))
        maximum = tl.load(stats_ptr + at, mask=limit > 0, other=0.0)
    probs = tl.exp2((scores - by_query(maximum, KEYS_FIRST)) * LOG2E)
    if WHOLE:
        total = tl.sum(probs, KEYS)
        # 0 in a row that sees nothing.
        inverse = tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
    else:
        inverse = tl.load(stats_ptr + at + 1, mask=limit > 0, other=0.0)
    probs *= by_query(inverse, KEYS_FIRST)
    if KEYS_FIRST:
        d_probs = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
    else:
        d_probs = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
    weights = probs
    if DROPOUT:
        keep = kept(bits, KEYS_FIRST)
        d_probs = tl.where(keep, d_probs * keep_scale, 0.0)
        weights = tl.where(keep, probs * keep_scale, 0.0)
    # A weight of 0 stands for a hidden key too: what it would be multiplied by may be infinite.
    if WHOLE:
        shift += tl.sum(tl.where(probs == 0.0, 0.0, probs * d_probs), KEYS)
    d_scores = tl.where(probs == 0.0, 0.0, probs * (d_probs - by_query(shift, KEYS_FIRST)))
    return weights, d_scores, shift
