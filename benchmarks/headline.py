"""Write the table of README.md from the results of one machine, so that no figure in it is typed.

`python -m benchmarks.headline FOLDER README` replaces what stands between `<!-- results: MACHINE -->` and
`<!-- end of results -->` in README by `ROWS` of MACHINE.json in FOLDER, and leaves it alone if there is no
such file: on another machine the table stays what it is.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nlpfast.files import replacing

from .report import markdown

__all__ = ["ROWS", "main", "table"]

Result = dict[str, Any]


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        what: as it stands in the table.
        op: of the results.
        case: name of a case; both dtypes stand in one row.
        peer: what it is compared with, as its results call it.
        words: the same in the table.
    """

    what: str
    op: str
    case: str
    peer: str
    words: str


_CAUSAL, _LONG = "(32,8,128,128,32) {} causal", "(1,12,1024,1024,64) {} causal"
_SDPA, _SMOOTHED = "`F.scaled_dot_product_attention`", "`F.linear`, `F.cross_entropy`"

ROWS = (
    Row("causal attention, 128 tokens", "attention", _CAUSAL, "sdpa", _SDPA),
    Row("the same with dropout 0.1", "attention", f"{_CAUSAL} dropout 0.1", "sdpa", _SDPA),
    Row("causal attention, 1,024 tokens", "attention", _LONG, "sdpa", _SDPA),
    Row(
        "packed attention, 75 % real",
        "varlen_attention",
        "(32,12,128,64) {} 75% real",
        "sdpa",
        f"{_SDPA}, a mask",
    ),
    Row(
        "cross entropy, smoothed, 32,000 words",
        "cross_entropy",
        "(2048,32000) {}",
        "F.cross_entropy",
        "`F.cross_entropy`",
    ),
    Row(
        "the same with its projection",
        "linear_cross_entropy",
        "(4096,32000,512) {}",
        "F.linear + F.cross_entropy",
        _SMOOTHED,
    ),
    Row("attention with alignment loss", "alignment_loss", "(128,8,64,64,64) {}", "eager", "eager code"),
    Row("dropout, sum and layer norm", "add_layer_norm", "(4096,768) {}", "eager", "eager code"),
    Row(
        "step of a GPT, CS224N's",
        "training",
        "vanilla pretraining step {}",
        "eager float32",
        "eager code in float32",
    ),
    Row(
        "step of a BERT, packed", "bert", "step on 32 sentences, {}", "transformers", "transformers with SDPA"
    ),
    Row("step of a Transformer, packed", "translation", "training step {}", "eager", "eager code, padded"),
)


def table(data: Result) -> str:
    """Return how many times faster ours are, of medians, and the share of the memory; threads 1 / 2.

    Args:
        data: what a results file holds.

    Raises:
        KeyError: a row of `ROWS` has no results.
    """
    rows = [("forward and backward of", "against", "float32", "bfloat16", "memory, bfloat16")]
    for what, op, case, peer, words in ROWS:
        cells, share = [], "-"
        for dtype in ("float32", "bfloat16"):
            name = case.format(dtype)
            found = {
                r["threads"]: r for r in data["ops"][op]["rows"] if (r["name"], r["peer"]) == (name, peer)
            }
            if not found:
                raise KeyError(f"{op} has no results of {name} against {peer}: nlpfast bench {op}")
            cells.append(" / ".join(f"{found[threads]['ratio_of_medians']:.1f}" for threads in sorted(found)))
            memory = found[min(found)].get("memory_mb", {})
            share = f"{memory['ours'] / memory['peer']:.0%}" if memory.get("peer") else "-"
        rows.append((what, words, *cells, share))
    return markdown(rows)


def main(arguments: Sequence[str]) -> int:
    """Write the table; 2 for a wrong call or a README without a place for it."""
    if len(arguments) != 2:
        print("usage: python -m benchmarks.headline FOLDER README", file=sys.stderr)
        return 2
    readme = Path(arguments[1])
    text = readme.read_text(encoding="utf-8")
    place = re.search(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", text, re.DOTALL)
    if place is None:
        print(f"{readme} has no line <!-- results: MACHINE -->", file=sys.stderr)
        return 2
    results = Path(arguments[0]) / f"{place[2]}.json"
    if results.is_file():
        found = table(json.loads(results.read_text(encoding="utf-8")))
        with replacing(readme) as file:
            file.write(
                f"{text[: place.start()]}{place[1]}\n{found}\n\n{place[3]}{text[place.end() :]}".encode()
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
