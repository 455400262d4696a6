"""The notebook runs from top to bottom on the synthetic set, draws its figures, and is kept without outputs."""

from __future__ import annotations

import io
import json
import sys
from base64 import b64decode
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

from fastmaf.inspection.model import load_inspection

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "maf_made_capsule.ipynb"
TINY = {"SIZE": 8, "EPOCHS": 2, "BLOCKS": 2, "HIDDEN": "16,16", "RATE": 1e-3, "STEPS": 2, "DRAW": 22, "DRAW_TEST": 2}


def read() -> NotebookNode:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_outputs() -> None:
    raw = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    nbformat.validate(raw)
    assert (raw["nbformat"], raw["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in raw["cells"]]
    assert len(set(identities)) == len(identities)
    code = [cell for cell in raw["cells"] if cell["cell_type"] == "code"]
    assert 8 <= len(code) <= 14
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert str(ROOT) not in NOTEBOOK.read_text(encoding="utf-8")


def add_kernel(folder: Path) -> None:
    """Describes a kernel "this" of this very interpreter, whatever kernels the machine has installed."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "this interpreter",
        "language": "python",
    }
    place = folder / "kernels" / "this"
    place.mkdir(parents=True)
    (place / "kernel.json").write_text(json.dumps(spec))


@pytest.mark.slow
def test_it_runs_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results"
    for name, value in {**TINY, "OUT": out}.items():
        monkeypatch.setenv(f"FASTMAF_NOTEBOOK_{name}", str(value))
    monkeypatch.delenv("FASTMAF_NOTEBOOK_DATA", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    add_kernel(tmp_path)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    notebook = read()
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="this", resources=resources).execute()

    pictures = {cell.id: images(cell) for cell in notebook.cells if cell.cell_type == "code"}
    counts = {"images": 1, "curve": 1, "samples": 1, "figures": 2, "whitened": 1, "detection": 1, "where": 2}
    assert {name: len(found) for name, found in pictures.items() if found} == counts
    assert all(min(picture.size) > 100 for found in pictures.values() for picture in found)
    drawn = {"nll_curve.png", "samples.png", "nll_hist_good_defect.png", "roc_curve.png"}
    drawn |= {"whitened_samples.png", "inspection_roc_curve.png", "inspection.safetensors"}
    assert {path.name for path in out.iterdir()} == {*drawn, "demo-data"}
    assert load_inspection(out / "inspection.safetensors").calibration.n == 22
    text = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    assert "19 images to train on, 3 held out, 12 to test; D = 192" in text
    assert "threshold held-out" in text
    assert "AUROC of the published recipe" in text and "squeeze: " in text
    assert "Warning" not in text


def images(cell: NotebookNode) -> list[Image.Image]:
    """The pictures among a cell's outputs, decoded."""
    found = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
    return [Image.open(io.BytesIO(b64decode(data))) for data in found]
