"""What the Triton kernels of cross entropy share: where a row lies, and its loss from a few numbers of it.

A row is described relative to the largest of its *other* logits, those that are not the target's:
rest = sum over v != target of exp(x_v - largest), which lies between 1 and V. So nothing cancels and nothing
vanishes in a row whose target is far above all others: `others` of reference.py is rest * exp(largest - top).

Legend: V classes, x logits, top the largest of all of them.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Multiples of the first by numbers up to 2^9 are exact in float32; the sum of both is log 2.
LN2_HIGH = tl.constexpr(0.693359375)
LN2_LOW = tl.constexpr(-2.12194440054690582e-4)


@triton.jit
def begin_of(b, t, stride_b, stride_t, VEC: tl.constexpr):
    """Return where a row begins, in 64 bits; a multiple of VEC, which tells the compiler how to load."""
    at = b.to(tl.int64) * stride_b + t.to(tl.int64) * stride_t
    return at // VEC * VEC


@triton.jit
def place_of(v, stride, UNIT: tl.constexpr):
    """Return where in its row class ``v`` is; with UNIT the classes lie side by side, in 32 bits."""
    return v if UNIT else v.to(tl.int64) * stride


@triton.jit
def logit_of(x_ptr, v, stride, UNIT: tl.constexpr):
    """Return the logit of class ``v``, NaN for -1."""
    return tl.load(x_ptr + place_of(v, stride, UNIT), mask=v >= 0, other=float("nan")).to(tl.float32)


@triton.jit
def finite_of(maximum):
    """Return what to subtract before exp: -inf - -inf would be NaN, and -inf - 0 gives 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def exp_of(d):
    """Return exp(d) of a number that is not positive, to the last digit.

    The exponential of a GPU multiplies by log2 e and rounds first: at d = -100 that leaves five digits, which
    do for a term of a sum, but not for a factor of all of it.
    """
    # below -200 it is 0; not a maximum, which may drop NaN
    d = tl.where(d < -200.0, -200.0, d)
    n = tl.floor(d * LOG2E + 0.5)
    return tl.exp2(n) * tl.exp(d - n * LN2_HIGH - n * LN2_LOW)


@triton.jit
def log1p_of(y):
    """Return log(1 + y) of a number that is not negative: what 1 + y rounds off is a factor of the result."""
    u = 1.0 + y
    rounded = u - 1.0
    return tl.where(rounded == 0.0, y, tl.log(u) * (y / tl.where(rounded == 0.0, 1.0, rounded)))


@triton.jit
def beats(x, column, at_target, at, V):
    """Return which logits an argmax prefers to the target's: larger, or as large and earlier; first NaN."""
    earlier, own = column < at, at_target + tl.zeros_like(x)
    larger = (x > own) | ((x == own) & earlier) | ((x != x) & (earlier | (own == own)))
    return larger & (column < V) & (column != at)


@triton.jit
def normalizer_of(at_target, top, others):
    """Return total = others + exp(x_target - top)."""
    # not inf - inf, which others has seen
    return others + exp_of(tl.where(at_target == top, 0.0, at_target - top))


@triton.jit
def losses_of(
    at_target, at, largest, rest, below, origin, V, pad_index, on_target, on_other
):  # fmt: skip
    """Return loss, nll, top, others, and the factor that makes probabilities of exp(x - largest).

    `below` is the sum of origin - x over all classes that are given on_other.
    """
    # a maximum may drop NaN
    top = tl.where(at_target == at_target, tl.maximum(largest, at_target), at_target)
    drop = exp_of(tl.where(largest == top, 0.0, largest - top))
    # no sum of probabilities without a finite maximum, as in PyTorch
    others = rest * drop + (top - top)
    total = normalizer_of(at_target, top, others)
    log_total = tl.log(total)
    nll = tl.where(at_target == top, log1p_of(others), log_total + (top - at_target))
    loss = on_target * nll
    shared = (V - 1 - ((pad_index >= 0) & (pad_index != at)).to(tl.int32)).to(tl.float32)
    smooth = on_other * (shared * ((top - origin) + log_total) + below)
    # 0 times a logit of -inf is not to be felt
    loss = tl.where(on_other == 0.0, loss, loss + smooth)
    return loss, nll, top, others, drop / total


@triton.jit
def store_row(row, loss, nll, correct, top, others, loss_ptr, nll_ptr, correct_ptr, stats_ptr):
    """Store what there is of a row besides its gradient."""
    tl.store(loss_ptr + row, loss)
    tl.store(nll_ptr + row, nll)
    tl.store(correct_ptr + row, correct)
    tl.store(stats_ptr + 2 * row, top)
    tl.store(stats_ptr + 2 * row + 1, others)
