"""Say which ratios fell since the results before: of two runs ratios can be compared, times cannot.

`python -m benchmarks.regressions BEFORE AFTER` compares the results files of two folders by name, and returns
1 when a ratio fell and ours takes longer. Where ours does not, a peer has become faster: a copy by what the
memory is at, or one of another version; that is only said. Times of two runs are compared as multiples of
what a large matrix product took then.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]

# A busy machine moves a ratio by so much of it.
ALLOWED = 0.25
# Ours takes longer by more than so much where it has a part in that.
LONGER = 0.1


def fallen(before: Result, after: Result) -> tuple[list[str], list[str], int]:
    """Return a line for each ratio that fell by more than `ALLOWED`, and how many were compared.

    The lines are of those where ours takes longer, then of the others.

    Each row has two ratios, of minima and of medians: the larger of those after must be below the smaller of
    those before, less what is allowed. Rows are compared that have op, case, threads and peer in common, and
    neither of which is of a quick run.

    Args:
        before: what a results file holds.
        after: of the same machine.
    """
    slower: list[str] = []
    others: list[str] = []
    compared = 0
    for op, result in after["ops"].items():
        old = before["ops"].get(op)
        if old is None or old["quick"] or result["quick"]:
            continue
        rows = {_key(row): row for row in old["rows"]}
        for row in result["rows"]:
            if _key(row) not in rows:
                continue
            compared += 1
            was, now = _ratios(rows[_key(row)]), _ratios(row)
            products = _products(rows[_key(row)], old), _products(row, result)
            longer = all(y > (1 + LONGER) * x for x, y in zip(*products, strict=True))
            if max(now) < (1 - ALLOWED) * min(was):
                name, threads, peer = _key(row)
                texts = (" / ".join(f"{ratio:.2f}" for ratio in pair) for pair in (was, now))
                (slower if longer else others).append(
                    f"{op}: {name}, {threads} thread(s), against {peer}: {' before, '.join(texts)} now"
                )
    return slower, others, compared


def main(arguments: Sequence[str]) -> int:
    """Print what fell; 1 if anything did by ours, 2 for a wrong call."""
    if len(arguments) != 2 or not all(Path(folder).is_dir() for folder in arguments):
        print("usage: python -m benchmarks.regressions BEFORE AFTER (folders of results)", file=sys.stderr)
        return 2
    before, after = map(Path, arguments)
    slower: list[str] = []
    others: list[str] = []
    compared = 0
    for path in sorted(after.glob("*.json")):
        if (before / path.name).is_file():
            pair = (json.loads((f / path.name).read_text(encoding="utf-8")) for f in (before, after))
            *found, count = fallen(*pair)
            for lines, kind in zip((slower, others), found, strict=True):
                lines += [f"{path.stem}: {line}" for line in kind]
            compared += count
    fell = f"of {compared} ratios fell by more than {ALLOWED:.0%}"
    said = [f"{len(others)} {fell} as peers are faster", *slower, f"{len(slower)} {fell} as ours is slower"]
    print("\n".join([*others, *said]))
    return 1 if slower else 0


def _key(row: Result) -> tuple[str, int, str]:
    return row["name"], row["threads"], row["peer"]


def _ratios(row: Result) -> tuple[float, float]:
    return row["ratio_of_minima"], row["ratio_of_medians"]


def _products(row: Result, result: Result) -> list[float]:
    """Return how many large products take as long as ours, by minimum and median, up to a factor."""
    rate = result["rates"][str(row["threads"])]["gemm_gflops"]
    return [row["ours_ms"][which] * rate for which in ("min", "median")]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
