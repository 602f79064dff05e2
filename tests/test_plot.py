"""Heat maps: what is in them, the file, and nothing global left behind."""

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


def shown(figure):
    axes = figure.axes[0]
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


def test_nothing_global_changes(matplotlib):
    # rcParams["backend"], read as an item, would choose one
    program = (
        "import sys, matplotlib\n"
        "state = lambda: (dict(dict.items(matplotlib.rcParams)), matplotlib.get_backend(auto_select=False))\n"
        "before = state()\n"
        "from nlpfast import plot; plot.alignment({(0, 0)}, ['a'], ['b'])\n"
        "assert before == state()\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
