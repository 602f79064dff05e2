"""Pictures, by matplotlib (the extra `plot`), without its global state: no pyplot, no window, no settings.

Dimensions: H heads, T target words, S source words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nlpfast.files import replacing
from nlpfast.plot_run import RunCurves, panels_of, read_runs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

__all__ = ["alignment", "attention", "curves"]

# inches for a word of a single picture and of one of many, for a panel with curves, and pixels an inch
_CELL, _SMALL_CELL, _CURVES, _DPI = 0.3, 0.2, (5.0, 3.2), 120

# up to so many points of a curve are seen as such
_FEW_POINTS = 50


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
    canvas = _canvas(1.5 + _CELL * len(source_words), 1.5 + _CELL * len(target_words))
    _draw_words(canvas.figure.add_subplot(), table, source_words, target_words)
    return _written(canvas, path)


def attention(
    probabilities: Tensor | NDArray[np.floating],
    source_words: Sequence[str],
    target_words: Sequence[str],
    path: str | Path | None = None,
    *,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draw the attention of every head of a layer, and the mean of the heads, as heat maps side by side.

    Each is drawn as `alignment` does, with the same colours. The words are at the left and at the top of the
    picture.

    Args:
        probabilities: a floating-point tensor or array [H, T, S] of attention probabilities in 0..1, on any
            device; or [T, S] for one head.
        source_words: S words, or subwords.
        target_words: T words, or subwords; those of the source for self-attention.
        path: a PNG file to write, replaced if there is one; none is left behind if writing fails.
        titles: of the H heads; "head 0" and so on if None.

    Returns:
        The figure: the heads in their order, and after more than one of them their mean.

    Raises:
        ValueError: the probabilities have another shape or are outside 0..1, or there are not H titles.
        RuntimeError: matplotlib is not installed; the message says how to install it.
        OSError: the file cannot be written.
    """
    array = _array(probabilities)
    heads = array[None] if array.ndim == 2 else array
    shape = (len(target_words), len(source_words))
    expected = f"[heads, {shape[0]}, {shape[1]}], heads by target words by source words"
    tables = list(_probabilities(heads, (*heads.shape[:1], *shape), expected))
    if not tables:
        raise ValueError("probabilities have no heads; give those of one at least")
    names = [f"head {head}" for head in range(len(tables))] if titles is None else list(titles)
    if len(names) != len(tables):
        raise ValueError(f"titles has {len(names)} and there are {len(tables)} heads; give one for each")
    if len(tables) > 1:
        tables.append(np.mean(tables, axis=0))
        names.append("mean")
    columns = math.ceil(math.sqrt(len(tables)))
    rows = math.ceil(len(tables) / columns)
    width, height = (0.4 + _SMALL_CELL * len(words) for words in (source_words, target_words))
    canvas = _canvas(1.2 + width * columns, 1.2 + height * rows)
    for place, (table, name) in enumerate(zip(tables, names, strict=True)):
        axes = canvas.figure.add_subplot(rows, columns, place + 1)
        _draw_words(axes, table, source_words, target_words, top=place < columns, left=place % columns == 0)
        axes.set_title(name, parse_math=False)
    return _written(canvas, path)


def curves(
    runs: str | Path | Sequence[str | Path],
    path: str | Path | None = None,
    *,
    fields: Sequence[str] | None = None,
) -> Figure:
    """Draw the curves of runs over their steps: losses, scores, learning rate, norm of the gradient.

    Fields whose names end in the same word share a panel, as `loss` and `val_loss` do. The figures of the
    best evaluation have a star. Records that lack a field are passed over; what was not finite is a gap.

    Args:
        runs: the folder of a run or its log, or several, which get a colour each.
        path: a PNG file to write, replaced if there is one; none is left behind if writing fails.
        fields: which fields of the log to draw, in this order; None for all but counts and times.

    Returns:
        The figure, with a panel for each kind of field.

    Raises:
        DataError: there is no log or nothing to draw in it, or a line of it is damaged. The last line may be
            cut off, as a kill leaves it.
        ValueError: a field is in no log, or there are no runs or no fields.
        RuntimeError: matplotlib is not installed; the message says how to install it.
        OSError: the file cannot be written.
    """
    found = read_runs([runs] if isinstance(runs, (str, Path)) else runs)
    panels = panels_of(found, fields)
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    canvas = _canvas(_CURVES[0] * columns, _CURVES[1] * rows)
    for place, panel in enumerate(panels):
        # the steps are those of all panels
        first = canvas.figure.axes[0] if place else None
        _draw_curves(canvas.figure.add_subplot(rows, columns, place + 1, sharex=first), panel, found)
    return _written(canvas, path)


def _canvas(width: float, height: float) -> FigureCanvasAgg:
    """Return an empty figure of so many inches, on its canvas."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise RuntimeError(f"plots need matplotlib ({error}): pip install 'nlpfast[plot]'") from error
    return FigureCanvasAgg(Figure(figsize=(width, height), dpi=_DPI, layout="constrained"))


def _written(canvas: FigureCanvasAgg, path: str | Path | None) -> Figure:
    if path is not None:
        with replacing(path) as file:
            canvas.print_png(file)
    return canvas.figure


def _draw_words(
    axes: Axes,
    table: NDArray[np.float64],
    source_words: Sequence[str],
    target_words: Sequence[str],
    *,
    top: bool = True,
    left: bool = True,
) -> None:
    """Draw a table [T, S], with the words along the top and on the left if asked for."""
    axes.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="equal", interpolation="nearest")
    # a word such as "$" is no formula
    axes.set_xticks(range(len(source_words)), source_words, rotation=90, parse_math=False)
    axes.set_yticks(range(len(target_words)), target_words, parse_math=False)
    axes.tick_params(length=0, top=True, labeltop=top, bottom=False, labelbottom=False, labelleft=left)
    # lines between the words
    axes.set_xticks(np.arange(0.5, len(source_words) - 1), minor=True)
    axes.set_yticks(np.arange(0.5, len(target_words) - 1), minor=True)
    axes.tick_params(which="minor", length=0)
    axes.grid(which="minor", color="0.85", linewidth=0.5)


def _array(given: Any) -> Any:
    """Return a tensor as an array, and all else as it is."""
    if isinstance(given, Tensor):
        # NumPy has no bfloat16
        return given.detach().cpu().double().numpy() if given.is_floating_point() else given.cpu().numpy()
    return given


def _probabilities(array: NDArray[np.floating], shape: tuple[int, ...], expected: str) -> NDArray[np.float64]:
    """Return probabilities, checked; `expected` describes the shape."""
    if array.shape != shape:
        raise ValueError(f"probabilities have shape {list(array.shape)}, expected {expected}")
    # rounding may take a probability beyond 1
    if not (np.all(array >= 0) and np.all(array <= 1 + 1e-3)):
        raise ValueError(f"probabilities are {array.min()} to {array.max()}, expected 0 to 1")
    return array.astype(np.float64)


def _table(
    given: Tensor | NDArray[np.floating] | Iterable[tuple[int, int]], sources: int, targets: int
) -> NDArray[np.float64]:
    """Return [T, S], checked."""
    array = _array(given)
    if isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating):
        expected = f"[{targets}, {sources}], target words by source words"
        return _probabilities(array, (targets, sources), expected)
    table = np.zeros((targets, sources))
    for s, t in array.tolist() if isinstance(array, np.ndarray) else array:
        if not (0 <= s < sources and 0 <= t < targets):
            raise ValueError(f"link {s}-{t} is outside {sources} source and {targets} target words")
        table[t, s] = 1
    return table


def _draw_curves(axes: Axes, fields: list[str], runs: list[RunCurves]) -> None:
    """Draw fields of all runs, with a colour for each field of one run, or for each of several runs."""
    from matplotlib.ticker import MaxNLocator

    several = len(runs) > 1
    for number, run in enumerate(runs):
        for place, field in enumerate(fields):
            if field not in run.curves:
                continue
            steps, values = run.curves[field]
            color = f"C{number if several else place}"
            # a name that began with an underscore would be left out of the legend
            label = f"{field}, {run.name}" if several else field
            if field in run.best:
                label += f", {run.best[field]:.4g} at the best, step {run.best_step}"
            style = ("-", "--", ":", "-.")[place % 4] if several else "-"
            marker = "." if len(steps) <= _FEW_POINTS else ""
            axes.plot(steps, values, style, marker=marker, color=color, linewidth=1.2, label=label)
            if field in run.best:
                axes.plot([run.best_step], [run.best[field]], "*", color=color, markersize=11)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="0.9")
    for text in axes.legend(fontsize="small").get_texts():
        text.set_parse_math(False)
