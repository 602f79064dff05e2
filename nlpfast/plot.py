"""Pictures, by matplotlib (the extra `plot`), without its global state: no pyplot, no window, no settings."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nlpfast.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["alignment"]

# inches for a word, and pixels an inch
_CELL, _DPI = 0.3, 120


def alignment(
    probabilities_or_links: Tensor | NDArray[np.floating] | Iterable[tuple[int, int]],
    source_words: Sequence[str],
    target_words: Sequence[str],
    path: str | Path | None = None,
) -> Figure:
    """Draw which source words each target word attends to, or is linked to, as a heat map.

    Target words go down the left side, source words along the top. White is 0 and the darkest blue is 1, for
    every picture, so that two can be compared.

    Args:
        probabilities_or_links: a floating-point tensor or array [T, S] of attention probabilities in 0..1, on
            any device; or links, pairs of source and target position from 0, which are drawn as 1.
        source_words: S words, or subwords.
        target_words: T words, or subwords.
        path: a PNG file to write, replaced if there is one; none is left behind if writing fails.

    Returns:
        The figure, which notebooks show.

    Raises:
        ValueError: the probabilities have another shape or are outside 0..1, or a link is to no word.
        RuntimeError: matplotlib is not installed; the message says how to install it.
        OSError: the file cannot be written.
    """
    table = _table(probabilities_or_links, len(source_words), len(target_words))
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'nlpfast[plot]'") from error
    size = (1.5 + _CELL * len(source_words), 1.5 + _CELL * len(target_words))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    # a word such as "$" is no formula
    axes.set_xticks(range(len(source_words)), source_words, rotation=90, parse_math=False)
    axes.set_yticks(range(len(target_words)), target_words, parse_math=False)
    axes.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    # lines between the words
    axes.set_xticks(np.arange(0.5, len(source_words) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(target_words) - 1), minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="0.85", linewidth=0.5)
    if path is not None:
        with replacing(path) as file:
            canvas.print_png(file)
    return figure


def _table(
    given: Tensor | NDArray[np.floating] | Iterable[tuple[int, int]], sources: int, targets: int
) -> NDArray[np.float64]:
    """Return [T, S], checked."""
    array = given
    if isinstance(given, Tensor):
        array = given.detach().cpu().double().numpy() if given.is_floating_point() else given.cpu().numpy()
    if isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating):
        if array.shape != (targets, sources):
            expected = f"[{targets}, {sources}], target words by source words"
            raise ValueError(f"probabilities have shape {list(array.shape)}, expected {expected}")
        # rounding may take a probability beyond 1
        if not (np.all(array >= 0) and np.all(array <= 1 + 1e-3)):
            raise ValueError(f"probabilities are {array.min()} to {array.max()}, expected 0 to 1")
        return array.astype(np.float64)
    table = np.zeros((targets, sources))
    for s, t in array.tolist() if isinstance(array, np.ndarray) else array:
        if not (0 <= s < sources and 0 <= t < targets):
            raise ValueError(f"link {s}-{t} is outside {sources} source and {targets} target words")
        table[t, s] = 1
    return table
