"""Sections of a machine's results file that other programs than the benchmark of an op write."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nlpfast.files import replacing

from .measure import machine_facts
from .report import slug

__all__ = ["Rows", "change"]

Rows = list[dict[str, Any]]


def change(folder: Path, device: str, name: str, rows: Callable[[Rows], Rows]) -> None:
    """Write a section to the results file of this machine, with what else is there.

    Args:
        folder: of the results files.
        device: whose machine it is, as PyTorch names it.
        name: of the section.
        rows: of those that are there, those that will be.
    """
    machine = machine_facts(device)
    path = folder / f"{slug(machine['machine'])}.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {**machine, "ops": {}}
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    data[name] = {"date": date, "rows": rows(data.get(name, {}).get("rows", []))}
    with replacing(path) as file:
        file.write((json.dumps(data, indent=2) + "\n").encode())
