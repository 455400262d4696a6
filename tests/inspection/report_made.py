"""A report of a made-up run on drawn images: what a whole one holds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import ImageSet, load_test, load_train
from fastmaf.inspection.report import (
    Absent,
    Count,
    Data,
    Exhibit,
    Fold,
    Gallery,
    Outcome,
    Report,
    Samples,
    ScoreRow,
    Threshold,
    Timing,
    Training,
    TrainingPoint,
    worst_cases,
)
from fastmaf.metrics.auroc import auroc

DEFECTS = {"crack": 5, "faulty_imprint": 4, "poke": 4, "scratch": 5, "squeeze": 4}
THRESHOLD = 11.62
FOLDS = (-57214.2, -57388.0, -56911.7, -57102.4, -57377.6)
DESCRIPTION = """K-fold conformal calibration on 219 normals, asked for at most 5.0% false alarms
threshold 11.62: the 209th smallest of their 219 held-out scores
expected rate of false alarms: 5.0%; with 95% confidence at most 7.8% for this calibration set
promise (at most 5.0% with 95% confidence): not met; it would be with 234 normals, none of them above the threshold"""


def pixels(images: ImageSet) -> np.ndarray:
    return images.pixels.permute(0, 2, 3, 1).contiguous().numpy()


def overlay(image: np.ndarray, x: float, y: float, much: float) -> np.ndarray:
    """A warm spot at (x, y), as a heat map would be laid over the image."""
    rows, columns = np.mgrid[: image.shape[0], : image.shape[1]]
    heat = much * np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * 5.0**2))[..., None]
    warm = np.array([235.0, 60.0, 20.0])
    return np.rint((1 - heat) * (0.75 * image + 30) + heat * warm).clip(0, 255).astype(np.uint8)


def made(folder: Path) -> Report:
    """Draws the images into `folder`."""
    root = draw_dataset(folder / "drawn", train=8, good=6, defects=DEFECTS, size=64, progress=False)
    train, test = load_train(root, size=64), load_test(root, size=64)
    images, good = pixels(test), pixels(train)
    rng = np.random.default_rng(5)
    calibration = rng.gumbel(8.3, 1.05, 219)
    defect = np.array([label != "good" for label in test.labels])
    scores = np.where(defect, 10.2 + rng.lognormal(1.1, 0.9, len(test)), rng.gumbel(8.5, 1.0, len(test)))
    scores[test.labels.index("good")] = 12.4
    scores[test.labels.index("squeeze")] = 4100.7
    area = auroc(scores, defect)
    cases = worst_cases(scores, test.labels, THRESHOLD, 6)

    def exhibits(where: np.ndarray) -> tuple[Exhibit, ...]:
        out = []
        for i in where.tolist():
            x, y = rng.uniform(12, 52, 2)
            rows, columns = np.mgrid[:64, :64]
            spot = np.hypot(columns - x, rows - y) < 6
            p = float((1 + (calibration >= scores[i]).sum()) / 220)
            out.append(
                Exhibit(
                    file="/".join(test.paths[i].parts[-2:]),
                    label=test.labels[i],
                    score=float(scores[i]),
                    p_value=p,
                    image=images[i],
                    overlay=overlay(images[i], x, y, 0.9 if defect[i] else 0.5),
                    mask=spot if defect[i] else None,
                )
            )
        return tuple(out)

    def sample(name: str) -> Samples:
        return Samples(name, images[[i for i, label in enumerate(test.labels) if label == name][:4]])

    at = np.arange(1, 61)
    decay = 800 * np.exp(-at / 14.0)
    curve = [TrainingPoint(int(e), float(-57480 + d), float(-57230 + 0.9 * d)) for e, d in zip(at, decay, strict=True)]
    curve[20] = replace(curve[20], nll=3.1e6)
    return Report(
        title="Capsule inspection",
        model="capsule.fastmaf.safetensors",
        date="2025-11-25 14:02 UTC",
        version="0.6.0",
        data=Data(
            counts=(
                Count("train", "good", 219),
                Count("calibration", "good (held out, 5 folds)", 219),
                *(Count("test", name, test.labels.count(name)) for name in ("good", *DEFECTS)),
            ),
            notes=("3 16-bit grey images scaled to 8 bits (value / 257)", "1 image turned by its EXIF orientation"),
            skipped=(("train/good/031.png", "truncated: the file ends after 1,204 of 48,113 bytes"),),
            samples=(Samples("good (train)", good[:4]), *(sample(name) for name in ("good", *DEFECTS))),
        ),
        training=Training(
            settings=(
                ("recipe", "inspection"),
                ("image size", "64 \u00d7 64"),
                ("whitening", "rank 400, 25 shifted copies of each image"),
                ("MAF blocks", "7, hidden (512, 512)"),
                ("learning rate", "2e-5"),
                ("seed", "0"),
            ),
            curve=tuple(curve),
            folds=tuple(Fold(44 if i < 4 else 43, nll) for i, nll in enumerate(FOLDS)),
        ),
        scores=(
            ScoreRow("map maximum", "score", area, (0.851, 0.988), None, 0.952, au_pro=0.871, default=True),
            ScoreRow("map top-k mean", "score", 0.935, (0.849, 0.985), (-0.019, 0.006), 0.952, (-0.002, 0.003), 0.871),
            ScoreRow("plain NLL", "score", 0.904, (0.842, 0.952), (-0.104, -0.018)),
            ScoreRow("typicality", "score", 0.871, (0.803, 0.928), (-0.151, -0.035)),
            ScoreRow("per-pixel Gaussian", "control", 0.742, (0.640, 0.835), (-0.318, -0.126), 0.907, (-0.06, -0.03)),
            ScoreRow("PCA residual", "control", 0.882, (0.817, 0.936), (-0.133, -0.031), 0.947, (-0.011, 0.002), 0.853),
            ScoreRow("PNG size", "control", 0.655, (0.541, 0.764), (-0.421, -0.195)),
        ),
        threshold=Threshold(THRESHOLD, DESCRIPTION, 0.05, 0.078, calibration),
        outcome=Outcome(scores, tuple(test.labels)),
        gallery=Gallery(*(exhibits(where) for where in cases)),
        timings=(Timing("decode (1000 \u00d7 1000 PNG)", 18.4, 21.97, 200), Timing("resize", 2.31, 2.9, 200),
                 Timing("score and map", 6.113, 7.08, 200), Timing("decode to verdict", 27.02, 31.4, 200)),
        environment=(
            ("processor", "an x86-64 processor with AVX2"),
            ("threads", "2"),
            ("torch", "2.7.1+cpu"),
            ("Python", "3.12.3"),
            ("platform", "Linux-6.1-x86_64-with-glibc2.36"),
            ("fastmaf", "0.6.0"),
        ),
        assumptions=(
            "New good images look like the calibration images: same product, camera, light and position. After any "
            "change there, recalibrate.",
            "The rate of false alarms is promised over the draw of the calibration images; nothing is promised for "
            "defects, of which only those in the test folders were seen.",
            "Intervals are percentile bootstraps over the test images.",
        ),
    )  # fmt: skip


def bare() -> Report:
    """A run that has nothing but its name."""
    return Report("Bare", "model.safetensors", "2025-11-25", "0.6.0")


def named_badly(report: Report) -> Report:
    """The same run with file and class names that are long, without a blank, and not Unicode."""
    name = "</td>\u5b57\udcff" + 60 * "abc"
    assert isinstance(report.data, Data) and isinstance(report.outcome, Outcome) and report.outcome.labels is not None
    assert isinstance(report.gallery, Gallery) and isinstance(report.gallery.detections, tuple)
    shown = tuple(replace(exhibit, file=name, label=name) for exhibit in report.gallery.detections)
    return replace(
        report,
        title=name,
        model=name,
        data=replace(report.data, counts=(Count("test", name, 5),), skipped=((name, name),), notes=(name,)),
        outcome=Outcome(report.outcome.scores, tuple(name if x == "crack" else x for x in report.outcome.labels)),
        gallery=Gallery(shown, (), shown),
        environment=((name, name),),
        assumptions=(name,),
    )


def unlabelled(report: Report) -> Report:
    """The same run on images whose classes are not known."""
    assert isinstance(report.data, Data) and isinstance(report.outcome, Outcome) and isinstance(report.gallery, Gallery)
    assert not isinstance(report.gallery.detections, Absent)
    reason = Absent("the classes of the test images are not known")
    shown = tuple(replace(exhibit, label=None, mask=None) for exhibit in report.gallery.detections)
    return replace(
        report,
        outcome=Outcome(report.outcome.scores, None),
        data=replace(
            report.data, counts=(*report.data.counts[:2], Count("test", "unknown", len(report.outcome.scores)))
        ),
        scores=reason,
        gallery=Gallery(reason, reason, shown),
    )
