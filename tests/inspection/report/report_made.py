"""A report of a made-up run on drawn images: what a whole one holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import ImageSet, load_test, load_train
from fastmaf.inspection.calibration import Calibration
from fastmaf.inspection.evaluate import TableRow
from fastmaf.inspection.report.content import Exhibit, Gallery, Report, TestResults, Training
from fastmaf.inspection.report.findings import worst_cases
from fastmaf.metrics.auroc import PairedDifference, auroc

DEFECTS = {"crack": 5, "faulty_imprint": 4, "poke": 4, "scratch": 5, "squeeze": 4}
FOLDS = (-57214.2, -57388.0, -56911.7, -57102.4, -57377.6)


def row(
    name: str,
    kind: str,
    area: float,
    interval: tuple[float, float] = (0.5, 1.0),
    difference: tuple[float, float] | None = None,
    pixel_auroc: float | None = None,
    pixel_difference: tuple[float, float] | None = None,
    au_pro: float | None = None,
    default: bool = False,
) -> TableRow:
    """A row of the score table, with the ends of its intervals."""

    def between(ends: tuple[float, float] | None) -> PairedDifference | None:
        return None if ends is None else PairedDifference(sum(ends) / 2, *ends, 0.5, 2000)

    return TableRow(
        name, kind, area, interval, between(difference), pixel_auroc, au_pro, between(pixel_difference), default
    )


def pixels(images: ImageSet) -> np.ndarray:
    return images.pixels.permute(0, 2, 3, 1).contiguous().numpy()


def overlay(image: np.ndarray, x: float, y: float, much: float) -> np.ndarray:
    """A warm spot at (x, y), like an overlay of an anomaly map."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    warmth = much * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 5.0**2))[..., None]
    warm = np.array([235.0, 60.0, 20.0])
    return np.rint((1 - warmth) * (0.75 * image + 30) + warmth * warm).clip(0, 255).astype(np.uint8)


def example_report(folder: Path) -> Report:
    """Draws the images into `folder`."""
    root = draw_dataset(folder / "drawn", train=8, good=6, defects=DEFECTS, size=64, progress=False)
    train, test = load_train(root, size=64), load_test(root, size=64)
    images, good = pixels(test), pixels(train)
    rng = np.random.default_rng(5)
    calibration = Calibration(rng.gumbel(8.3, 1.05, 219), 0.05, None, "k-fold", 5, "2025-11-25", "line 3")
    defect = np.array([label != "good" for label in test.labels])
    scores = np.where(defect, 10.2 + rng.lognormal(1.1, 0.9, len(test)), rng.gumbel(8.5, 1.0, len(test)))
    scores[test.labels.index("good")] = 12.4
    scores[test.labels.index("squeeze")] = 4100.7
    area = auroc(scores, defect)
    cases = worst_cases(scores, test.labels, calibration.threshold, 6)

    def exhibits(where: np.ndarray) -> tuple[Exhibit, ...]:
        out = []
        for i in where.tolist():
            x, y = rng.uniform(12, 52, 2)
            rows, columns = np.mgrid[:64, :64]
            spot = np.hypot(columns - x, rows - y) < 6
            out.append(
                Exhibit(
                    file="/".join(test.paths[i].parts[-2:]),
                    label=test.labels[i],
                    score=float(scores[i]),
                    p_value=float(calibration.p_values(scores[i : i + 1])[0]),
                    image=images[i],
                    overlay=overlay(images[i], x, y, 0.9 if defect[i] else 0.5),
                    mask=spot if defect[i] else None,
                )
            )
        return tuple(out)

    def sample(name: str) -> tuple[str, np.ndarray]:
        return name, images[[i for i, label in enumerate(test.labels) if label == name][:4]]

    at = np.arange(1, 61)
    decay = 800 * np.exp(-at / 14.0)
    log = [
        {"step": int(step), "nll": float(-57480 + d), "held_out_nll": float(-57230 + 0.9 * d)}
        for step, d in zip(at, decay, strict=True)
    ]
    log[20]["nll"] = 3.1e6
    table = (
        row("map maximum", "score", area, (0.851, 0.988), None, 0.952, au_pro=0.871, default=True),
        row("map top-k mean", "score", 0.935, (0.849, 0.985), (-0.019, 0.006), 0.952, (-0.002, 0.003), 0.871),
        row("plain NLL", "score", 0.904, (0.842, 0.952), (-0.104, -0.018)),
        row("typicality", "score", 0.871, (0.803, 0.928), (-0.151, -0.035)),
        row("per-pixel Gaussian", "baseline", 0.742, (0.640, 0.835), (-0.318, -0.126), 0.907, (-0.06, -0.03)),
        row("PCA residual", "baseline", 0.882, (0.817, 0.936), (-0.133, -0.031), 0.947, (-0.011, 0.002), 0.853),
        row("PNG size", "baseline", 0.655, (0.541, 0.764), (-0.421, -0.195)),
    )
    return Report(
        model="capsule.fastmaf.safetensors",
        date="2025-11-25 14:02 UTC",
        counts=(
            ("train", "good", 219),
            ("calibration", "good (held out, 5 folds)", 219),
            *(("test", name, test.labels.count(name)) for name in ("good", *DEFECTS)),
        ),
        notes=("3 16-bit grey images scaled to 8 bits (value / 257)", "1 image turned by its EXIF orientation"),
        skipped=(("train/good/031.png", "truncated: the file ends after 1,204 of 48,113 bytes"),),
        samples=(("good (train)", good[:4]), *(sample(name) for name in ("good", *DEFECTS))),
        training=Training(
            settings=(
                ("recipe", "inspection"),
                ("image size", "64 \u00d7 64"),
                ("whitening", "rank 400, 25 shifted copies of each image"),
                ("learning rate", "2e-5"),
            ),
            log=tuple(log),
            folds=tuple((44 if i < 4 else 43, nll) for i, nll in enumerate(FOLDS)),
        ),
        calibration=calibration,
        test=TestResults(scores, tuple(test.labels), table, Gallery(*(exhibits(where) for where in cases))),
        unusual=exhibits(np.flatnonzero(~defect)[:2]),
        map_levels=(1.25, 6.5),
        timings=(
            ("decode a PNG", 18.4, 21.97, 200),
            ("decode to verdict", 27.02, 31.4, 200),
        ),
        environment=(("processor", "an x86-64 processor with AVX2"), ("threads", "2"), ("torch", "2.7.1+cpu")),
    )


def untested(report: Report) -> Report:
    """The same run before there are test images, of a model file that does not record its training."""
    return replace(report, training=None, test=None)


def named_badly(report: Report) -> Report:
    """The same run with file and class names that are long, without a blank, and not Unicode."""
    name = "</td>\u5b57\udcff" + 60 * "abc"
    test = report.test
    assert test is not None
    exhibits = tuple(exhibit._replace(file=name, label=name) for exhibit in test.gallery.detections)
    labels = tuple(name if label == "crack" else label for label in test.labels)
    return replace(
        report,
        model=name,
        counts=(("test", name, 5),),
        skipped=((name, name),),
        notes=(name,),
        test=replace(test, labels=labels, gallery=Gallery(exhibits, (), exhibits)),
        environment=((name, name),),
    )
