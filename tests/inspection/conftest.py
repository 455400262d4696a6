"""A synthetic data set, a run of the recipe on it, and what that fitted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import load_train
from fastmaf.inspection.fit import Fitted, fit
from fastmaf.inspection.workflow.fit import fit as fit_folder
from tests.inspection.tiny import TINY, silent


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo")
    return draw_dataset(root, train=24, good=4, defects={"crack": 3, "squeeze": 3}, size=32, progress=False)


@pytest.fixture(scope="session")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    fit_folder(data, out, TINY, progress=False, say=silent)
    return out


@pytest.fixture(scope="session")
def fitted(data: Path) -> tuple[torch.Tensor, Fitted]:
    pixels = load_train(data, size=16, progress=False).pixels
    return pixels, fit(pixels, TINY, progress=False)
