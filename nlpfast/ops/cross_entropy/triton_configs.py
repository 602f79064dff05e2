"""How the Triton kernels of cross entropy are compiled: the whole table, which the tests compile whole.

No kernel is tuned at run time: those that work in place must run once.
`python -m benchmarks.triton_resources cross_entropy` prints what each line takes of a GPU.

A multiprocessor has 65,536 registers, and hides the time that memory takes only if one program computes while
another waits. "whole" has a row in registers, as float32. The compiler needs 64 registers for 16 numbers a
thread, and spills with 32 of them: 64 registers are 1,024 threads and 16,384 numbers, two rows of 8,192
classes. A row is padded to the next line, which costs exponentials and no bytes. Rows that do not begin at
multiples of 16 bytes are read number by number, and have no limit here: each takes up to 107 registers.

"blocks" reads a row twice, and the second time is to be served by L1, of which the H200 has 228 KB or so. Two
programs of 16 warps, again with 64 registers a thread, share it up to rows of 112 KB (in 16 bits 32,000
classes have 64, and 50,257 have 100; in float32 32,000 have 128). Longer rows have one program of 32 warps,
and L2, where a row of 256 KB for each of 132 multiprocessors is 34 of 50 MB. A thread asks for 32 bytes at a
time and a multiprocessor for 32 KB: what 36 GB/s, its share of 4.8 TB/s, bring in the 0.8 us of an answer.

"backward" goes over a row once and has no sums.
"""

from typing import NamedTuple

# Columns are counted in 32 bits.
MAX_CLASSES = 2**30

# Kernel, bytes of a number, and the most classes of a row.
Line = tuple[str, int, int]


class Config(NamedTuple):
    """How a kernel is compiled.

    Attributes:
        BLOCK: classes that a program has in its registers.
        LANES: in how many parts they are summed until the end of the row.
        num_warps: warps of a program.
        maxnreg: registers of a thread at most, None for what the compiler likes; in "whole" for rows that are
            read 16 bytes at a time.
    """

    BLOCK: int
    LANES: int
    num_warps: int
    maxnreg: int | None = None


def _blocks(size: int, num_warps: int) -> Config:
    # 32 bytes a thread, 16 of them a lane
    threads = 32 * num_warps
    return Config(32 // size * threads, 2 * threads, num_warps, 64)


# A row goes to the first line of its size that has room for it.
CONFIGS: dict[Line, Config] = {
    **{
        ("whole", size, V): Config(V, V, max(1, V // 512), 64 if V > 512 else None)
        for size in (2, 4)
        for V in (128, 512, 1024, 2048, 4096, 8192)
    },
    ("blocks", 2, 56 * 1024): _blocks(2, 16),
    ("blocks", 2, MAX_CLASSES): _blocks(2, 32),
    ("blocks", 4, 28 * 1024): _blocks(4, 16),
    ("blocks", 4, MAX_CLASSES): _blocks(4, 32),
    ("backward", 2, 1024): Config(1024, 1024, 2),
    ("backward", 2, MAX_CLASSES): Config(4096, 4096, 8),
    ("backward", 4, 1024): Config(1024, 1024, 4),
    ("backward", 4, MAX_CLASSES): Config(4096, 4096, 16),
}


def line_of(size: int, V: int, backward: bool = False) -> Line:
    """Return the line of CONFIGS that serves rows of V classes.

    Args:
        size: bytes of a number.
        V: number of classes.
        backward: of the backward kernel instead of those that compute the loss.
    """
    return next(
        line for line in CONFIGS if (line[0] == "backward") == backward and line[1] == size and line[2] >= V
    )
