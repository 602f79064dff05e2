"""Say which ratios fell since the results before: of two runs ratios can be compared, times cannot.

`python -m benchmarks.regressions BEFORE AFTER` compares the results files of two folders by name, and returns
1 when a ratio fell. A peer that became faster looks the same: the versions are in the files.
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


def fallen(before: Result, after: Result) -> tuple[list[str], int]:
    """Return a line for each ratio that fell by more than `ALLOWED`, and how many were compared.

    Each row has two ratios, of minima and of medians: the larger of those after must be below the smaller of
    those before, less what is allowed. Rows are compared that have op, case, threads and peer in common, and
    neither of which is of a quick run.

    Args:
        before: what a results file holds.
        after: of the same machine.
    """
    lines, compared = [], 0
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
            if max(now) < (1 - ALLOWED) * min(was):
                name, threads, peer = _key(row)
                texts = (" / ".join(f"{ratio:.2f}" for ratio in pair) for pair in (was, now))
                lines.append(
                    f"{op}: {name}, {threads} thread(s), against {peer}: {' before, '.join(texts)} now"
                )
    return lines, compared


def main(arguments: Sequence[str]) -> int:
    """Print what fell; 1 if anything did, 2 for a wrong call."""
    if len(arguments) != 2 or not all(Path(folder).is_dir() for folder in arguments):
        print("usage: python -m benchmarks.regressions BEFORE AFTER (folders of results)", file=sys.stderr)
        return 2
    before, after = map(Path, arguments)
    lines, compared = [], 0
    for path in sorted(after.glob("*.json")):
        if (before / path.name).is_file():
            pair = (json.loads((f / path.name).read_text(encoding="utf-8")) for f in (before, after))
            found, count = fallen(*pair)
            lines += [f"{path.stem}: {line}" for line in found]
            compared += count
    print("\n".join([*lines, f"{len(lines)} of {compared} ratios fell by more than {ALLOWED:.0%}"]))
    return 1 if lines else 0


def _key(row: Result) -> tuple[str, int, str]:
    return row["name"], row["threads"], row["peer"]


def _ratios(row: Result) -> tuple[float, float]:
    return row["ratio_of_minima"], row["ratio_of_medians"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
