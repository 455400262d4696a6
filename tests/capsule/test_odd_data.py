"""Training on odd data: one image, a batch larger than the data, images that are all the same or of one colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.capsule.models import load_model
from tests.capsule.runs import run, tensors_of, with_

pytestmark = [pytest.mark.usefixtures("undrawn"), pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]


def folder_of(root: Path, images: list[np.ndarray]) -> Path:
    (root / "train" / "good").mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image).save(root / "train" / "good" / f"{i}.png")
    return root


NOISE = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
GREY = np.full((8, 8, 3), 128, dtype=np.uint8)


@pytest.mark.parametrize(("images", "options"), [
    ([NOISE[0]], {}),
    ([GREY], {"batch_size": 1000}),
    ([*NOISE], {"batch_size": 10_000}),
    ([GREY] * 5, {}),
    ([0 * GREY] * 5, {"order": "random"}),
    ([GREY * 0 + 255] * 3, {"holdout": 0.4}),
], ids=["one image", "one colour", "large batch", "all the same", "black", "white"])  # fmt: skip
def test_training_ends_with_a_model_that_computes(tmp_path: Path, images: list[np.ndarray], options: Any) -> None:
    data = folder_of(tmp_path / "data", images)
    result = run(data, tmp_path / "run", with_(**{"holdout": 0.0, "epochs": 2, **options}))
    assert [row["skipped_steps"] for row in result.log] == [0, 0]
    assert all(row["nll"] is not None and np.isfinite(row["nll"]) for row in result.log)
    assert all(torch.isfinite(tensor).all() for tensor in tensors_of(tmp_path / "run").values())
    flow = load_model(tmp_path / "run").flow
    assert torch.isfinite(flow.sample(3, seed=0)).all() and torch.isfinite(flow.log_prob(torch.rand(2, 192))).all()
