"""Heat maps and curves: what is in them, the file, and nothing global left behind."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from nlpfast import plot

SOURCE, TARGET = ["the", "$5", r"$\frac$"], ["die", "5", "$", "usw."]
# [T, S]
PROBABILITIES = torch.softmax(torch.arange(12.0).reshape(4, 3).cos() * 3, dim=1)
LINKS = {(0, 0), (1, 1), (1, 2), (2, 3)}


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib")


def shown(figure, panel=0):
    axes = figure.axes[panel]
    (image,) = axes.images
    labels = [[label.get_text() for label in side.get_ticklabels()] for side in (axes.xaxis, axes.yaxis)]
    return np.asarray(image.get_array()), labels, image.get_clim()


def test_probabilities_are_drawn_target_words_down_and_source_words_along(matplotlib, tmp_path):
    path = tmp_path / "a.png"
    table, labels, limits = shown(plot.alignment(PROBABILITIES, SOURCE, TARGET, path))
    assert np.array_equal(table, PROBABILITIES.double().numpy())
    assert labels == [SOURCE, TARGET] and limits == (0, 1)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]
    for same in (PROBABILITIES.numpy(), PROBABILITIES.bfloat16(), PROBABILITIES.requires_grad_()):
        table = shown(plot.alignment(same, SOURCE, TARGET))[0]
        assert np.abs(table - PROBABILITIES.detach().numpy()).max() < 4e-3


def test_links_are_drawn_as_ones(matplotlib):
    expected = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1]])
    for same in (LINKS, sorted(LINKS), np.array(sorted(LINKS)), torch.tensor(sorted(LINKS))):
        table, labels, _ = shown(plot.alignment(same, SOURCE, TARGET))
        assert np.array_equal(table, expected) and labels == [SOURCE, TARGET]
    assert not shown(plot.alignment(set(), SOURCE, TARGET))[0].any()


def test_the_pixels_of_a_file_are_the_probabilities(matplotlib, tmp_path):
    from matplotlib.image import imread

    for links, darker in (({(0, 0)}, "left"), ({(1, 0)}, "right")):
        path = tmp_path / "a.png"
        plot.alignment(links, ["a", "b"], ["x"], path)
        blue = (imread(path)[..., :3] @ [1, 0, -1]) < -0.3
        columns = np.flatnonzero(blue.any(axis=0))
        middle = imread(path).shape[1] / 2
        assert len(columns) > 20 and (columns.mean() < middle + 5) == (darker == "left")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PROBABILITIES.T, r"shape \[3, 4\], expected \[4, 3\], target words by source words"),
        (PROBABILITIES[0], r"shape \[3\], expected"),
        (PROBABILITIES * 2, "expected 0 to 1"),
        (PROBABILITIES.log(), "expected 0 to 1"),
        (PROBABILITIES * float("nan"), "expected 0 to 1"),
        ({(3, 0)}, "link 3-0 is outside 3 source and 4 target words"),
        ({(0, 4)}, "link 0-4 is outside"),
        ({(-1, 0)}, "link -1-0 is outside"),
    ],
)
def test_what_cannot_be_drawn(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.alignment(given, SOURCE, TARGET, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


# [H, T, S], one above the other
HEADS = torch.softmax(torch.arange(60.0).reshape(5, 4, 3).sin() * 2, dim=2)


def visible(axes):
    """Return whether the words along the top, and on the left, are to be seen."""
    return axes.xaxis.get_tick_params()["labeltop"], axes.yaxis.get_tick_params()["labelleft"]


def test_attention_of_all_heads_and_their_mean(matplotlib, tmp_path):
    path = tmp_path / "a.png"
    figure = plot.attention(HEADS, SOURCE, TARGET, path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    panels = [shown(figure, panel) for panel in range(6)]
    assert len(figure.axes) == 6
    shown_labels = []
    for (table, labels, limits), expected in zip(panels, [*HEADS, HEADS.double().mean(0)], strict=True):
        assert np.abs(table - expected.double().numpy()).max() < 1e-15
        assert limits == (0, 1)
        shown_labels += [labels]
    titles = ["head 0", "head 1", "head 2", "head 3", "head 4", "mean"]
    assert [axes.get_title() for axes in figure.axes] == titles
    places = [axes.get_subplotspec() for axes in figure.axes]
    assert [(place.rowspan[0], place.colspan[0]) for place in places] == [
        *((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    ]
    # words only at the edges of the picture
    assert [visible(axes) for axes in figure.axes] == [
        *((True, True), (True, False), (True, False), (False, True), (False, False), (False, False))
    ]
    assert not any(axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes)
    assert shown_labels == [*([SOURCE, TARGET], [SOURCE, []], [SOURCE, []], [[], TARGET], [[], []], [[], []])]


def test_attention_of_one_head_has_no_mean(matplotlib):
    for given in (HEADS[1], HEADS[1:2], HEADS[1].numpy(), HEADS[1].bfloat16(), HEADS[1].requires_grad_()):
        figure = plot.attention(given, SOURCE, TARGET)
        assert [axes.get_title() for axes in figure.axes] == ["head 0"]
        table, labels, _ = shown(figure)
        assert np.abs(table - HEADS[1].numpy()).max() < 4e-3 and labels == [SOURCE, TARGET]
        assert visible(figure.axes[0]) == (True, True)


def test_attention_has_room_for_the_longer_side(matplotlib):
    words = [str(number) for number in range(30)]
    for source, target in ((words, TARGET), (TARGET, words)):
        figure = plot.attention(np.zeros((5, len(target), len(source))), source, target)
        width, height = figure.get_size_inches()
        assert (width > 2 * height) == (source is words) and (height > 2 * width) == (target is words)


def test_attention_with_titles(matplotlib):
    figure = plot.attention(HEADS[:2], SOURCE, TARGET, titles=["$x$", "left"])
    assert [axes.get_title() for axes in figure.axes] == ["$x$", "left", "mean"]
    assert not figure.axes[0].title.get_parse_math()


@pytest.mark.parametrize(
    ("given", "titles", "message"),
    [
        (
            HEADS.mT,
            None,
            r"shape \[5, 3, 4\], expected \[heads, 4, 3\], heads by target words by source words",
        ),
        (HEADS[0, 0], None, r"shape \[3\], expected"),
        (HEADS[0, 0, 0], None, r"shape \[\], expected"),
        (HEADS[None], None, r"shape \[1, 5, 4, 3\], expected"),
        (HEADS * 3, None, "expected 0 to 1"),
        (HEADS[:0], None, "have no heads"),
        (HEADS, ["a", "b"], "titles has 2 and there are 5 heads"),
    ],
)
def test_attention_that_cannot_be_drawn(given, titles, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plot.attention(given, SOURCE, TARGET, tmp_path / "a.png", titles=titles)
    assert not list(tmp_path.iterdir())


def record(step, **figures):
    return {
        "step": step,
        "tokens": 10 * step,
        "loss": 4 / step,
        "lr": 0.1 * step,
        "grad_norm": None,
        **figures,
    }


def written(folder, evaluations):
    """Write a log with a record at each of 60 steps, and the figures of evaluations in some."""
    folder.mkdir()
    records = [{"step": 0, "data": {}}, *(record(step, **evaluations.get(step, {})) for step in range(1, 61))]
    (folder / "log.jsonl").write_text("".join(f"{json.dumps(entry)}\n" for entry in records))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two runs, of which the first is best at step 40."""
    first = {
        20: {"val_loss": 3.0, "bleu": 10.0, "best": True},
        40: {"val_loss": 2.0, "bleu": 20.0, "best": True},
        60: {"val_loss": 2.5, "bleu": 15.0, "best": False},
    }
    return written(tmp_path / "first", first), written(
        tmp_path / "$b$", {30: {"val_loss": 2.5, "best": True}}
    )


def lines(axes):
    """Return the lines of a panel: steps, values, colour, style and marker."""
    return [
        (
            list(line.get_xdata()),
            list(line.get_ydata()),
            *(line.get_color(), line.get_linestyle(), line.get_marker()),
        )
        for line in axes.lines
    ]


def legend(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_curves_of_a_run(matplotlib, runs, tmp_path):
    path = tmp_path / "a.png"
    for run in (runs[0], str(runs[0]), [runs[0] / "log.jsonl"]):
        figure = plot.curves(run, path)
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        losses, bleu, rate = figure.axes
        steps = list(range(1, 61))
        assert lines(losses) == [
            (steps, [4 / step for step in steps], "C0", "-", ""),
            ([20, 40, 60], [3.0, 2.0, 2.5], "C1", "-", "."),
            ([40], [2.0], "C1", "None", "*"),
        ]
        assert lines(bleu) == [
            ([20, 40, 60], [10.0, 20.0, 15.0], "C0", "-", "."),
            ([40], [20.0], "C0", "None", "*"),
        ]
        assert lines(rate) == [(steps, [0.1 * step for step in steps], "C0", "-", "")]
        assert legend(losses) == ["loss", "val_loss, 2 at the best, step 40"]
        assert legend(bleu) == ["bleu, 20 at the best, step 40"] and legend(rate) == ["lr"]
        assert {axes.get_xlabel() for axes in figure.axes} == {"step"}
        # all panels have the same steps, and the third is below the first
        assert len({axes.get_xlim() for axes in figure.axes}) == 1
        places = [axes.get_subplotspec() for axes in figure.axes]
        assert [(place.rowspan[0], place.colspan[0]) for place in places] == [(0, 0), (0, 1), (1, 0)]


def test_curves_of_several_runs_have_a_colour_each(matplotlib, runs):
    losses, bleu, rate = plot.curves(runs).axes
    assert [line[2:] for line in lines(losses)] == [
        *(("C0", "-", ""), ("C0", "--", "."), ("C0", "None", "*")),
        *(("C1", "-", ""), ("C1", "--", "."), ("C1", "None", "*")),
    ]
    assert legend(losses) == [
        *("loss, first", "val_loss, first, 2 at the best, step 40"),
        *("loss, $b$", "val_loss, $b$, 2.5 at the best, step 30"),
    ]
    # the second has no BLEU
    assert legend(bleu) == ["bleu, first, 20 at the best, step 40"] and legend(rate) == [
        "lr, first",
        "lr, $b$",
    ]
    assert not any(text.get_parse_math() for text in losses.get_legend().get_texts())


def test_the_fields_that_are_asked_for(matplotlib, runs):
    figure = plot.curves(runs[0], fields=["tokens", "val_loss"])
    assert [legend(axes) for axes in figure.axes] == [["tokens"], ["val_loss, 2 at the best, step 40"]]
    assert [axes.get_subplotspec().colspan[0] for axes in figure.axes] == [0, 1]
    (axes,) = plot.curves(runs[0], fields=["bleu"]).axes
    assert axes.get_subplotspec().get_gridspec().ncols == 1
    with pytest.raises(ValueError, match="fields with 'ter', which no log has"):
        plot.curves(runs[0], fields=["ter"])


def test_steps_are_whole_numbers(matplotlib, tmp_path):
    (tmp_path / "log.jsonl").write_text(f"{json.dumps(record(1))}\n{json.dumps(record(2))}\n")
    figure = plot.curves(tmp_path)
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_a_file_that_cannot_be_written(matplotlib, tmp_path, monkeypatch):
    with pytest.raises(OSError, match="missing"):
        plot.alignment(LINKS, SOURCE, TARGET, tmp_path / "missing" / "a.png")
    path = tmp_path / "a.png"
    path.write_text("before")

    def fill_the_disk(canvas, file):
        file.write(b"\x89PNG")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.backends.backend_agg.FigureCanvasAgg.print_png", fill_the_disk)
    with pytest.raises(OSError, match="No space"):
        plot.alignment(LINKS, SOURCE, TARGET, path)
    assert path.read_text() == "before" and [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_without_matplotlib_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(RuntimeError, match=r"plots need matplotlib .*pip install 'nlpfast\[plot\]'"):
        plot.alignment(LINKS, SOURCE, TARGET)
    with pytest.raises(RuntimeError, match="pip install"):
        plot.attention(HEADS, SOURCE, TARGET)


def test_nothing_global_changes(matplotlib, tmp_path):
    # rcParams["backend"], read as an item, would choose one
    written(tmp_path / "run", {})
    program = (
        "import sys, matplotlib\n"
        "state = lambda: (dict(dict.items(matplotlib.rcParams)), matplotlib.get_backend(auto_select=False))\n"
        "before = state()\n"
        "import numpy\n"
        "from nlpfast import plot; plot.alignment({(0, 0)}, ['a'], ['b'])\n"
        "plot.attention(numpy.ones((2, 1, 1)), ['a'], ['b'])\n"
        f"plot.curves({str(tmp_path / 'run')!r}, {str(tmp_path / 'a.png')!r})\n"
        "assert before == state()\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
