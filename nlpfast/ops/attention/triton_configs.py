"""How the Triton kernels of attention are compiled: the whole table, which the tests compile whole.

No kernel is tuned at run time. `python -m benchmarks.triton_resources` prints what each line takes of a GPU.
The lines are the largest tiles that spill no register on sm_80 and sm_90 with all features that a line has to
serve, in at most 99 KB of shared memory, so that they run on sm_86 and sm_89 too. Two exceptions spill, up to
1 KB a thread: "dq", and "dkdv" with a mask, in float32 with 256 columns, whose products keep all columns in
registers.
"""

from typing import NamedTuple


class Config(NamedTuple):
    """How a kernel is compiled: queries and keys of a tile, warps of a program, loads in flight."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# By kernel, bytes of an element, head size (the larger of D and Dv, up to the next of these) and whether
# there is a mask, which takes registers. "fwd_dropout" goes before "fwd" where there is one; "whole" and
# "whole_64" are _bwd_kernel with all keys in one tile, "owned" is the same kernel with several.
CONFIGS: dict[tuple[str, int, int, bool], Config] = {
    ("fwd", 2, 32, False): Config(128, 64, 8, 2),
    ("fwd", 2, 32, True): Config(64, 32, 4, 2),
    ("fwd", 2, 64, False): Config(128, 64, 8, 2),
    ("fwd_dropout", 2, 64, False): Config(64, 32, 4, 2),
    ("fwd", 2, 64, True): Config(64, 32, 4, 1),
    ("fwd", 2, 128, False): Config(64, 32, 4, 2),
    ("fwd", 2, 128, True): Config(32, 32, 4, 1),
    ("fwd", 2, 256, False): Config(32, 32, 4, 1),
    ("fwd", 2, 256, True): Config(32, 32, 4, 2),
    ("whole_64", 2, 32, False): Config(32, 64, 4, 1),
    ("whole_64", 2, 32, True): Config(32, 64, 4, 1),
    ("whole_64", 2, 64, False): Config(32, 64, 4, 1),
    ("whole_64", 2, 64, True): Config(16, 64, 4, 1),
    ("whole", 2, 32, False): Config(64, 128, 8, 1),
    ("whole", 2, 32, True): Config(32, 128, 8, 1),
    ("whole", 2, 64, False): Config(32, 128, 8, 1),
    ("whole", 2, 64, True): Config(16, 128, 8, 1),
    ("owned", 2, 32, False): Config(64, 128, 8, 1),
    ("owned", 2, 32, True): Config(32, 128, 8, 2),
    ("owned", 2, 64, False): Config(16, 128, 8, 1),
    ("owned", 2, 64, True): Config(16, 128, 8, 1),
    ("dq", 2, 32, False): Config(64, 64, 4, 2),
    ("dq", 2, 32, True): Config(64, 32, 4, 1),
    ("dq", 2, 64, False): Config(64, 32, 4, 2),
    ("dq", 2, 64, True): Config(128, 32, 8, 1),
    ("dq", 2, 128, False): Config(64, 32, 4, 2),
    ("dq", 2, 128, True): Config(64, 16, 4, 1),
    ("dq", 2, 256, False): Config(32, 32, 4, 1),
    ("dq", 2, 256, True): Config(16, 16, 2, 1),
    ("dkdv", 2, 32, False): Config(32, 64, 4, 2),
    ("dkdv", 2, 32, True): Config(32, 64, 4, 2),
    ("dkdv", 2, 64, False): Config(32, 64, 4, 2),
    ("dkdv", 2, 64, True): Config(32, 64, 4, 2),
    ("dkdv", 2, 128, False): Config(16, 128, 8, 1),
    ("dkdv", 2, 128, True): Config(16, 128, 8, 1),
    ("dkdv", 2, 256, False): Config(16, 32, 4, 1),
    ("dkdv", 2, 256, True): Config(16, 32, 8, 1),
    ("dmask", 2, 32, True): Config(32, 32, 4, 1),
    ("dmask", 2, 64, True): Config(32, 32, 4, 1),
    ("dmask", 2, 128, True): Config(16, 32, 4, 1),
    ("dmask", 2, 256, True): Config(16, 32, 4, 1),
    ("fwd", 4, 32, False): Config(32, 32, 4, 1),
    ("fwd", 4, 32, True): Config(32, 32, 4, 1),
    ("fwd", 4, 64, False): Config(32, 32, 4, 1),
    ("fwd", 4, 64, True): Config(16, 32, 4, 1),
    ("fwd", 4, 128, False): Config(16, 16, 4, 1),
    ("fwd", 4, 128, True): Config(32, 32, 4, 1),
    ("fwd", 4, 256, False): Config(16, 32, 4, 1),
    ("fwd", 4, 256, True): Config(16, 32, 4, 1),
    ("whole_64", 4, 32, False): Config(32, 64, 8, 1),
    ("whole_64", 4, 32, True): Config(32, 64, 8, 1),
    ("whole_64", 4, 64, False): Config(16, 64, 4, 1),
    ("whole_64", 4, 64, True): Config(16, 64, 8, 1),
    ("whole", 4, 32, False): Config(32, 128, 8, 1),
    ("whole", 4, 64, False): Config(16, 128, 8, 1),
    ("owned", 4, 32, False): Config(32, 32, 4, 1),
    ("owned", 4, 32, True): Config(16, 64, 8, 1),
    ("owned", 4, 64, False): Config(16, 64, 8, 1),
    ("owned", 4, 64, True): Config(16, 32, 4, 1),
    ("dq", 4, 32, False): Config(128, 32, 8, 1),
    ("dq", 4, 32, True): Config(128, 32, 8, 1),
    ("dq", 4, 64, False): Config(16, 32, 4, 1),
    ("dq", 4, 64, True): Config(16, 32, 4, 1),
    ("dq", 4, 128, False): Config(16, 32, 8, 1),
    ("dq", 4, 128, True): Config(16, 16, 8, 1),
    ("dq", 4, 256, False): Config(16, 16, 8, 1),
    ("dq", 4, 256, True): Config(16, 16, 8, 1),
    ("dkdv", 4, 32, False): Config(16, 64, 4, 1),
    ("dkdv", 4, 32, True): Config(16, 128, 8, 1),
    ("dkdv", 4, 64, False): Config(32, 32, 4, 1),
    ("dkdv", 4, 64, True): Config(16, 32, 4, 1),
    ("dkdv", 4, 128, False): Config(16, 16, 4, 1),
    ("dkdv", 4, 128, True): Config(16, 16, 8, 1),
    ("dkdv", 4, 256, False): Config(16, 16, 4, 1),
    ("dkdv", 4, 256, True): Config(16, 16, 8, 1),
    ("dmask", 4, 32, True): Config(16, 16, 4, 1),
    ("dmask", 4, 64, True): Config(16, 16, 8, 1),
    ("dmask", 4, 128, True): Config(16, 32, 8, 1),
    ("dmask", 4, 256, True): Config(16, 16, 4, 1),
}
