"""The figures: files, labels, and axes that stay readable with outliers."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from fastmaf.metrics import plots
from fastmaf.metrics.evaluate import evaluate_scores

PUBLISHED = {1: 8002.67, 2: -10732.63, 3: -17777.71, 5: -24368.98, 10: -29276.77, 20: -34421.31, 50: -39320.27}
PUBLISHED[100] = -42192.40


def scores() -> tuple[np.ndarray, list[str]]:
    """Scores distributed as those of the published run."""
    rng = np.random.default_rng(3)
    classes = {
        "good": rng.normal(-41545, 1602, 23),
        "crack": np.append(rng.normal(-39300, 2500, 22), 1.9e6),
        "faulty_imprint": rng.normal(-40550, 1534, 22),
        "poke": rng.normal(-39992, 2397, 21),
        "scratch": rng.normal(-39694, 2507, 23),
        "squeeze": rng.lognormal(11, 1.1, 20) - 30000,
    }
    return np.concatenate(list(classes.values())), [name for name, values in classes.items() for _ in values]


def training_log(epochs: int) -> list[dict[str, float]]:
    at = np.arange(1, epochs + 1)
    nll = np.interp(np.log(at), np.log(list(PUBLISHED)), list(PUBLISHED.values()))
    factor = 1 / (12288 * np.log(2))
    return [
        {"epoch": int(e), "nll": float(v), "val_nll": float(v) + 900, "bits_per_dim": float(v) * factor}
        for e, v in zip(at, nll, strict=True)
    ]


def texts(axes: Axes) -> str:
    legend = axes.get_legend()
    return "\n".join(t.get_text() for t in legend.get_texts()) if legend else ""


def is_png(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        corner = image.convert("RGB").getpixel((0, 0))
        assert corner == (255, 255, 255)
        assert [p.name for p in path.parent.iterdir() if p.name.endswith(".tmp")] == []
        return image.size


def test_histogram_axis_covers_the_bulk(tmp_path: Path) -> None:
    nll, labels = scores()
    figure = plots.nll_hist(tmp_path / "h.png", nll, labels, {"Youden": -40563.0, "held-out": -37500.0})
    width, height = is_png(tmp_path / "h.png")
    assert width > 900 and height > 600
    bars, points = figure.axes
    low, high = bars.get_xlim()
    assert points.get_xlim() == (low, high)
    assert -60000 < low < nll.min() < -37500 < high < 0
    good = nll[np.array(labels) == "good"]
    assert (good.max() - good.min()) / (high - low) > 0.4
    # the last tick describes the edge bin: number of images, limit, maximum
    last = points.get_xticklabels(which="both")[-1].get_text()
    edge = float(last.split("above ")[1].split("\n")[0].replace("\u2212", "-").replace(",", ""))
    assert last.startswith(f"{(nll > edge).sum()} images") and last.endswith("1,900,000")
    assert "good (n = 23)" in texts(bars) and "defective (n = 109)" in texts(bars)
    assert "Youden: \u221240,563 nats" in texts(bars) and "held-out: \u221237,500 nats" in texts(bars)
    assert points.get_yticklabels()[0].get_text() == "good (23)" and len(points.get_yticks()) == 6
    assert "nats" in points.get_xlabel() and "%" in bars.get_ylabel()


def test_histogram_without_outliers_has_no_bin_at_the_edge(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    nll = np.concatenate([rng.uniform(0, 1, 30), rng.uniform(0.5, 1.5, 30)])
    figure = plots.nll_hist(tmp_path / "h.png", nll, ["good"] * 30 + ["x"] * 30, {})
    bars, points = figure.axes
    assert bars.get_xlim()[0] < nll.min() and nll.max() < bars.get_xlim()[1] < 1.7
    assert not any("image" in t.get_text() for t in points.get_xticklabels(which="both"))


def test_histogram_of_one_outlier(tmp_path: Path) -> None:
    nll = np.append(np.random.default_rng(0).normal(-41545, 1602, 60), 4e5)
    figure = plots.nll_hist(tmp_path / "h.png", nll, ["good"] * 23 + ["x"] * 38, {"t": -41000.0})
    low, high = figure.axes[0].get_xlim()
    assert high - low < 2 * (nll[:60].max() - nll[:60].min())
    assert figure.axes[1].get_xticklabels(which="both")[-1].get_text().startswith("1 image\n")


@pytest.mark.parametrize(
    ("nll", "labels", "thresholds"),
    [
        ([1.0, np.inf, np.inf, 2.0], ["good", "x", "x", "good"], {"t": np.inf}),
        ([np.inf, np.inf], ["good", "x"], {"t": 3.0}),
        ([5.0, 5.0, 5.0], ["good", "good", "x"], {"t": 5.0}),
        ([-4e4, -3e4], ["good", "x_$^{"], {"$_{": -3.5e4, "far": 4e5, "c": -4e4, "d": 0.0}),
        ([1.0, 2.0, -1e6], ["good", "good", "good"], {}),
        ([1.0, 1e30], ["x", "y"], {"t": 1e30}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_histogram_of_odd_input(
    tmp_path: Path, nll: list[float], labels: list[str], thresholds: dict[str, float]
) -> None:
    figure = plots.nll_hist(tmp_path / "h.png", np.array(nll), labels, thresholds)
    assert np.isfinite(figure.axes[0].get_xlim()).all()
    is_png(tmp_path / "h.png")


@pytest.mark.parametrize(("nll", "labels"), [([], []), ([1.0], ["good", "x"]), ([np.nan, 1.0], ["good", "x"])])
def test_histogram_refuses(tmp_path: Path, nll: list[float], labels: list[str]) -> None:
    with pytest.raises(ValueError, match="one NLL and one label per image"):
        plots.nll_hist(tmp_path / "h.png", np.array(nll), labels, {})
    assert not list(tmp_path.iterdir())


def test_curve_of_a_long_run_shows_its_end(tmp_path: Path) -> None:
    figure = plots.nll_curve(tmp_path / "c.png", training_log(100), PUBLISHED)
    is_png(tmp_path / "c.png")
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert -45000 < low < -42192 and -30000 < high < 8000
    assert "published run" in texts(axes) and "8,003 at epoch 1" in texts(axes)
    assert "epoch" in axes.get_xlabel() and "nats" in axes.get_ylabel()
    (bits,) = axes.child_axes
    assert "bits" in bits.get_ylabel()
    figure.canvas.draw()
    assert bits.get_ylim()[0] == pytest.approx(low / 12288 / np.log(2))


def test_curve_survives_blown_up_epochs(tmp_path: Path) -> None:
    log = training_log(60)
    log[1]["nll"], log[29]["nll"], log[40]["nll"], log[50]["nll"] = 1.27e7, -980.0, np.nan, np.inf
    for row in log:
        row["val_nll"] = 3e6  # a validation curve far off must not flatten the training curve
    figure = plots.nll_curve(tmp_path / "c.png", log)
    low, high = figure.axes[0].get_ylim()
    assert high < 10000 and low < -40000
    legend = texts(figure.axes[0])
    assert "above the axis" in legend and "epoch 51" in legend and "in 60 epochs" in legend
    assert "not a number) at epoch 41" in legend
    is_png(tmp_path / "c.png")


def test_curve_of_a_short_run_keeps_every_point(tmp_path: Path) -> None:
    figure = plots.nll_curve(tmp_path / "c.png", training_log(3), PUBLISHED)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low < -17777.71 and high > 8902.67 and "above the axis" not in texts(axes)
    assert axes.get_xlim()[1] < 5  # later epochs of the published run are left out


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"epoch": 1, "nll": 5.0}],
        [{"epoch": 1, "nll": 5.0, "val_nll": None, "bits_per_dim": None}, {"epoch": 2, "nll": 5.0, "val_nll": None}],
        [{"epoch": 1, "nll": np.nan, "val_nll": np.nan, "bits_per_dim": np.nan}],
        [{"epoch": 7, "nll": np.inf, "val_nll": 3.0, "bits_per_dim": np.inf}],
    ],
)
@pytest.mark.filterwarnings("error")
def test_curve_of_odd_logs(tmp_path: Path, log: list[dict]) -> None:
    plots.nll_curve(tmp_path / "c.png", log, {1: 8002.67})
    is_png(tmp_path / "c.png")


def test_roc_shows_interval_and_both_points(tmp_path: Path) -> None:
    nll, labels = scores()
    e = evaluate_scores(nll, labels, held_out_nll=nll[:23] - 50, bootstrap=200)
    figure = plots.roc_curve(tmp_path / "r.png", e)
    is_png(tmp_path / "r.png")
    legend = texts(figure.axes[0])
    assert f"AUROC {e.auroc:.3f} (95% interval" in legend and "chance" in legend
    assert "Youden" in legend and "held-out" in legend
    lines = [np.asarray(line.get_xydata()) for line in figure.axes[0].lines]
    points = {tuple(line[0].tolist()) for line in lines if len(line) == 1}
    assert e.held_out is not None
    assert points == {(r.false_alarm_rate, r.anomaly.recall) for r in (e.youden, e.held_out)}
    alone = evaluate_scores(nll, labels, bootstrap=0)
    assert "held-out" not in texts(plots.roc_curve(tmp_path / "r.png", alone).axes[0])


def test_failed_figure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "c.png"
    plots.nll_curve(target, training_log(2))
    before = target.read_bytes()

    def fail(_self: object, file: object, **_options: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError("no space left")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fail)
    with pytest.raises(OSError, match="no space"):
        plots.nll_curve(target, training_log(3))
    assert target.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_the_users_style_is_neither_used_nor_changed(tmp_path: Path) -> None:
    with matplotlib.rc_context({"axes.facecolor": "black", "text.color": "white", "axes.labelcolor": "white"}):
        figure = plots.nll_curve(tmp_path / "c.png", training_log(2))
        assert matplotlib.rcParams["axes.facecolor"] == "black"
    assert figure.axes[0].get_facecolor() == (1, 1, 1, 1) and figure.axes[0].xaxis.label.get_color() == "black"


def test_pyplot_is_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    importlib.reload(plots).nll_curve(tmp_path / "c.png", training_log(2))
