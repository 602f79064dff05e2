"""Counts of what became of the lines of a corpus: none is dropped without a number and a reason."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

__all__ = ["ReadReport", "Skips"]

# places that a report keeps for each reason
FIRST = 3


@dataclasses.dataclass
class Skips:
    """The lines that were skipped for one reason.

    Attributes:
        count: how many.
        first: the first of them, as ``file:line``.
    """

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)


class ReadReport:
    """What became of the lines of a file: ``used == read - skipped``.

    Attributes:
        path: the file; of several that belong together, the first.
        read: lines so far.
        skipped: reason to the lines that were skipped for it, in the order in which reasons first came up.
        byte_order_marks: 1 if one was taken off, the number of files with one if there are several.
    """

    def __init__(self, path: str | Path) -> None:
        """Begin with no lines.

        Args:
            path: the file, for messages.
        """
        self.path = str(path)
        self.read = 0
        self.skipped: dict[str, Skips] = {}
        self.byte_order_marks = 0
        self._last_skipped = 0

    @property
    def used(self) -> int:
        """Return the number of lines that were read and not skipped."""
        return self.read - sum(skips.count for skips in self.skipped.values())

    def skip(self, reason: str) -> None:
        """Count the line that was read last as skipped.

        Args:
            reason: a few words that complete "8 lines are ...", such as "empty".

        Raises:
            ValueError: no line was read since the last call, so that the counts would no longer add up.
        """
        if self._last_skipped == self.read:
            raise ValueError(f"line {self.read} of {self.path} cannot be skipped again; skip each line once")
        self._last_skipped = self.read
        skips = self.skipped.setdefault(reason, Skips())
        skips.count += 1
        if len(skips.first) < FIRST:
            skips.first.append(f"{self.path}:{self.read}")

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as plain values, for logs."""
        skipped = {reason: dataclasses.asdict(skips) for reason, skips in self.skipped.items()}
        return {
            "path": self.path,
            "read": self.read,
            "used": self.used,
            "skipped": skipped,
            "byte_order_marks": self.byte_order_marks,
        }

    def __str__(self) -> str:
        """Return the counts in one line."""
        text = f"{self.path}: {self.read:,} line{'s' * (self.read != 1)} read, {self.used:,} used"
        if self.skipped:
            reasons = ", ".join(f"{skips.count:,} {reason}" for reason, skips in self.skipped.items())
            first = next(iter(self.skipped.values())).first[0]
            text += f", {self.read - self.used:,} skipped ({reasons}; first: {first})"
        return text + "; byte order mark taken off" * (self.byte_order_marks > 0)
