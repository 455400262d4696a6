"""Writes the files of this format version that must load for ever, and what they compute: once, when it is released.

``python -m tests.io.write_fixtures FOLDER``. The numbers are random; nothing is trained on data of anyone.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

import fastmaf
from fastmaf.inspection.model import load_inspection
from tests.io.model_files import SIZE, D, write_all

FLOWS = ("maf", "random orders", "whitened", "inverse", "normalised", "started", "float8 copy")
EXPECTED = "expected.json"


def computed(folder: Path) -> dict[str, Any]:
    """Returns what the files of a folder compute, in plain JSON types."""
    x = torch.linspace(0.1, 0.9, 3 * D).view(3, D)
    found: dict[str, Any] = {}
    with torch.no_grad():
        for file in sorted(folder.glob("flow-*.safetensors")):
            flow = fastmaf.load(file).eval()
            sample = flow.sample(2, seed=1).double()
            found[file.stem] = {
                "class": type(flow).__name__,
                "transforms": [type(transform).__name__ for transform in flow.transforms],
                "log_prob": flow.log_prob(x).double().tolist(),
                "sample": [float(sample.sum()), float(sample.square().sum()), *sample[0, :4].tolist()],
            }
        model = load_inspection(folder / "inspection.safetensors")
        pixels = (x.view(3, 3, SIZE, SIZE) * 255).round().to(torch.uint8)
        scores = model.scores(pixels)
        found["inspection"] = {
            "scores": scores.tolist(),
            "p_values": model.calibration.p_values(scores).tolist(),
            "threshold": model.calibration.threshold,
            "map": float(model.anomaly_maps(pixels).sum()),
        }
    return found


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        contents = write_all(Path(name))
    spline = fastmaf.SplineMap(bins=4)
    made = fastmaf.MADE(D, (6,), outputs_per_feature=spline.outputs, generator=torch.Generator().manual_seed(0))
    flow = fastmaf.Flow(D, [fastmaf.Logit(D, 0.1), fastmaf.MonotonicRQS(made, spline)])
    flow.save(folder / "flow-spline.safetensors")
    for kind in FLOWS:
        (folder / f"flow-{kind.replace(' ', '-')}.safetensors").write_bytes(contents[kind])
    for kind in ("inspection", "model", "training_state"):
        (folder / f"{kind}.safetensors").write_bytes(contents[kind])
    (folder / EXPECTED).write_text(json.dumps(computed(folder), indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
