"""Draws the pictures of README.md and the documentation from the folder of ``fastmaf capsule reproduce``.

    python -m fastmaf.bench.dev.pictures RESULTS_FOLDER

docs/images/capsule-samples.png: training images beside samples of both recipes. docs/images/capsule-heat-maps.png: a
defect of each class beside its anomaly map. Only results on the synthetic set are accepted.
"""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastmaf.capsule.synthetic import DEFECTS, MARKER
from fastmaf.images.dataset import load_test, load_train
from fastmaf.images.decode import load_frame
from fastmaf.inspection.map_images import to_frame
from fastmaf.inspection.masks import load_masks
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.report.build import samples
from fastmaf.inspection.report.pictures import data_uri
from fastmaf.io.atomic import written_atomically
from fastmaf.metrics.results import NORMAL

FOLDER = Path(__file__).parents[2] / "docs" / "images"
SIDE, GAP, LABEL, TEXT = 192, 8, 200, 20  # pixels
SPAN = 1.25  # brightest value of a heat map, in units of the largest of the good images


def sample_rows(results: Path) -> Image.Image:
    """Returns training images, samples of the published recipe and samples of the whitened flow, one row each."""
    epochs = len((results / "train_log.csv").read_text(encoding="utf-8").splitlines()) - 1
    normals = load_train(_data(results), size=64, progress=False)
    rows: dict[str, Iterable[np.ndarray]] = {
        "training\nimages": samples(normals, NORMAL, 5),
        f"published\nrecipe,\n{epochs} epochs": _read(results),
        "fastmaf's\nrecipe": _read(results / "inspection"),
    }
    canvas = Image.new("RGB", (LABEL + 5 * (SIDE + GAP), len(rows) * (SIDE + GAP) - GAP), "white")
    for row, (label, images) in enumerate(rows.items()):
        top = row * (SIDE + GAP)
        _write(canvas, label, (0, top + SIDE // 2), "lm")
        for column, image in enumerate(images):
            canvas.paste(_enlarged(image), (LABEL + column * (SIDE + GAP), top))
    return canvas


def heat_maps(results: Path) -> Image.Image:
    """Returns a defect of each class above its anomaly map: the image at the upper quartile of the class's scores."""
    data, model = _data(results), load_inspection(results / "inspection")
    images = load_test(data, size=model.size, progress=False)
    masks, prediction = load_masks(data, images).masks, model.predict(images.pixels)
    labels = np.array(images.labels)
    canvas = Image.new("RGB", (LABEL + 5 * (SIDE + GAP), 2 * (SIDE + GAP) + 2 * TEXT), "white")
    top, below = 2 * TEXT, 2 * TEXT + SIDE + GAP
    _write(canvas, "defect", (0, top + SIDE // 2), "lm")
    _write(canvas, "anomaly map,\nmask outlined", (0, below + SIDE // 2), "lm")
    for column, label in enumerate(DEFECTS):
        index = np.flatnonzero(labels == label)
        chosen = int(index[np.argsort(prediction.scores[index])][round(0.75 * (len(index) - 1))])
        values = to_frame(prediction.anomaly_maps[chosen], (SIDE, SIDE)) / (SPAN * model.map_levels[1])
        colours = matplotlib.colormaps["inferno"](values, bytes=True)[..., :3]
        outlined = data_uri(colours, masks[chosen], SIDE)[0].partition(",")[2]
        left = LABEL + column * (SIDE + GAP)
        _write(canvas, label.replace("_", " "), (left + SIDE // 2, TEXT), "mm")
        canvas.paste(
            Image.fromarray(load_frame(images.paths[chosen], SIDE).pixels.permute(1, 2, 0).numpy()), (left, top)
        )
        canvas.paste(Image.open(io.BytesIO(base64.b64decode(outlined))), (left, below))
    return canvas


def main(results: Path, folder: Path = FOLDER) -> list[Path]:
    """Writes both pictures and returns their files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    pictures = {"capsule-samples": sample_rows(results), "capsule-heat-maps": heat_maps(results).quantize(256)}
    for name, picture in pictures.items():
        files.append(folder / f"{name}.png")
        with written_atomically(files[-1]) as file:
            picture.save(file, format="PNG", optimize=True)
    return files


def _data(results: Path) -> Path:
    data = results / "demo-data"
    if not (data / MARKER).is_file():
        raise ValueError(f"{results}: expected a reproduction on the synthetic set; found none in {data}")
    return data


def _read(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted((folder / "samples").glob("*.png"))[:5]]


def _enlarged(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def _write(canvas: Image.Image, text: str, at: tuple[int, int], anchor: str) -> None:
    font = ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), TEXT)
    ImageDraw.Draw(canvas).text(at, text, fill="#333333", font=font, anchor=anchor)


if __name__ == "__main__":
    print(*main(Path(sys.argv[1])), sep="\n")
