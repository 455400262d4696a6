"""The pictures of README and documentation, drawn from a tiny reproduction on the synthetic set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmaf.bench.dev import pictures
from fastmaf.capsule.synthetic import DEFECTS, MARKER, draw_dataset
from fastmaf.reproduction import reproduce
from tests.reproduction.tiny import RECIPE, TINY

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::fastmaf.ConnectivityWarning")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("results")
    data = draw_dataset(out / "demo-data", train=8, good=3, defects=dict.fromkeys(DEFECTS, 2), size=32, progress=False)
    assert reproduce(out, TINY, data=data, recipe=RECIPE, progress=False, say=lambda text: None)
    return out


def test_both_pictures_are_drawn(results: Path, tmp_path: Path) -> None:
    files = pictures.main(results, tmp_path / "images")
    assert [file.name for file in files] == ["capsule-samples.png", "capsule-heat-maps.png"]
    for file in files:
        with Image.open(file) as picture:
            assert 1000 < picture.width < 1300
            shown = np.asarray(picture.convert("RGB")).astype(int)
        cell = pictures.SIDE + pictures.GAP
        columns = [shown[-cell:, pictures.LABEL + i * cell :][:, : pictures.SIDE] for i in range(5)]
        assert all(column.std() > 5 for column in columns), "a place is empty"
        assert (shown[:, : pictures.LABEL] < 128).any(), "the rows are labelled"


def test_results_on_other_images_are_refused(results: Path, tmp_path: Path) -> None:
    (tmp_path / "demo-data").mkdir()
    with pytest.raises(ValueError, match="expected a reproduction on the synthetic set"):
        pictures.heat_maps(tmp_path)
    assert (results / "demo-data" / MARKER).is_file()
