"""Dropout in Triton: a program takes some rows of the matrix that the elements count as.

Eight rows share a call of Philox for each column.
"""

import triton
import triton.language as tl

from nlpfast.ops.attention.triton_tile import kept, survivors


@triton.jit
def _kernel(
    x_ptr, seed_ptr, out_ptr, n, threshold, factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    bits = survivors(seed_ptr, program * 0, program * ROWS, 0, threshold, ROWS, COLUMNS, False)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    x = tl.load(x_ptr + place, mask=place < n, other=0.0).to(tl.float32)
    out = tl.where(kept(bits, False), x * factor, 0.0)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=place < n)
