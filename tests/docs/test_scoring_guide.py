"""The function for Ray Data and Spark in the guide on scoring gives the rows of ``fastmaf inspect score``."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import fastmaf
from fastmaf.inspection.workflow.score import score

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "scoring.md"


def test_the_function_gives_the_rows_of_the_command(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(100, 140, (24, 16, 16, 3)) + rng.integers(-9, 9, (24, 1, 1, 1))
    detector = fastmaf.Detector(size=16, rank=6, blocks=0, folds=3, random_state=0).fit(images.astype(np.uint8))
    detector.save(tmp_path / "model.safetensors")
    (tmp_path / "in").mkdir()
    for i, image in enumerate(images[:5]):
        Image.fromarray(image.astype(np.uint8)).save(tmp_path / "in" / f"{i}.png")
    names: dict[str, Any] = {}
    threads = torch.get_num_threads()
    exec(re.findall(r"```python\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL)[0], names)
    try:
        paths = np.array(sorted(map(str, (tmp_path / "in").iterdir())), dtype=object)
        batch = names["Score"](str(tmp_path / "model.safetensors"))({"i": np.arange(5), "path": paths})
    finally:
        torch.set_num_threads(threads)
    lines = io.StringIO()
    score(tmp_path / "model.safetensors", [str(tmp_path / "in")], json_lines=True, stdout=lines, say=lambda _: None)
    rows = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert batch["i"].tolist() == list(range(5)) and batch["path"].tolist() == [row["file"] for row in rows]
    assert batch["score"].tolist() == [row["score"] for row in rows]
    assert batch["p_value"].tolist() == [row["p_value"] for row in rows]
    assert [("good", "anomalous")[int(one)] for one in batch["anomalous"]] == [row["verdict"] for row in rows]
