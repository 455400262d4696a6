"""No command replaces what is not its own, and no output is read as an image."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fastmaf
from fastmaf.images.dataset import load_train
from fastmaf.images.decode import DataError
from fastmaf.images.names import from_cell
from fastmaf.inspection.fold_models import replace_fold_models
from fastmaf.inspection.model import load_inspection
from fastmaf.inspection.workflow.calibrate import calibrate
from fastmaf.inspection.workflow.evaluate import evaluate
from fastmaf.inspection.workflow.export import export
from fastmaf.inspection.workflow.fit import fit
from fastmaf.inspection.workflow.score import score
from fastmaf.io.marks import MAP, OVERLAY, role_of
from fastmaf.io.outputs import OutputError
from tests.inspection.tiny import TINY, silent
from tests.inspection.workflow.expanded import expand


def noise(path: Path, seed: int = 0, side: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(100, 150, (side, side, 3)).astype(np.uint8)
    Image.fromarray(values).save(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i in range(3):
        noise(tmp_path / "in" / f"{i:03d}.png", i)
    noise(tmp_path / "in" / "ground" / "x.tiff")
    return tmp_path / "in"


@pytest.fixture
def judged(run: Path, images: Path) -> Callable[..., int]:
    def call(*arguments: Path, **options: Any) -> int:
        paths = [str(path) for path in arguments or (images,)]
        return score(run, paths, stdout=io.StringIO(), **{"progress": False, "say": silent, **options})

    return call


@pytest.mark.parametrize(
    "options",
    [
        {"overlays": "in"},
        {"maps": "in"},
        {"maps": "in/ground", "map_suffix": ".tiff"},
        {"overlays": "in/ground/.."},
        {"overlays": "link"},
        {"maps": "other/../in"},
        {"overlays": "both", "maps": "both"},
        {"overlays": "both", "maps": "new/../both"},
        {"overlays": "link/new", "maps": "in/new"},
        {"out": "new.csv", "overlays": "new.csv"},
        {"out": "both/001.csv", "maps": "both/001.csv/deep"},
    ],
)
def test_score_replaces_neither_images_nor_its_own_outputs(
    judged: Callable[..., int], images: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    (tmp_path / "link").symlink_to(images)
    before = contents(tmp_path)
    with pytest.raises(OutputError):
        judged(**{name: value if name == "map_suffix" else tmp_path / value for name, value in options.items()})
    assert contents(tmp_path) == before


def test_score_replaces_its_own_rows_and_pictures_and_nothing_else(
    judged: Callable[..., int], images: Path, tmp_path: Path
) -> None:
    shown, maps, out = tmp_path / "overlays", tmp_path / "maps", tmp_path / "rows.csv"
    for _ in range(2):
        assert judged(overlays=shown, maps=maps, out=out) == 0
        assert judged(out=tmp_path / "rows.jsonl", maps=tmp_path / "floats", map_suffix=".tiff") == 0
    assert {role_of(path) for path in shown.iterdir()} == {OVERLAY}
    assert {role_of(path) for folder in ("maps", "floats") for path in (tmp_path / folder).iterdir()} == {MAP}
    with pytest.raises(OutputError, match="is there already, and is not an anomaly map"):
        judged(maps=shown)
    noise(shown / "001.png", 5)
    mine = (shown / "001.png").read_bytes()
    with pytest.raises(OutputError, match="is not an overlay of an anomaly map that this command wrote"):
        judged(overlays=shown)
    assert (shown / "001.png").read_bytes() == mine
    for name in ("rows.csv", "rows.jsonl"):
        (tmp_path / name).write_text("part,price\n1,2\n")
        with pytest.raises(OutputError, match=f"{name} is there already"):
            judged(out=tmp_path / name)
        assert (tmp_path / name).read_text() == "part,price\n1,2\n"
        (tmp_path / name).write_text("")  # as mktemp leaves it
        assert judged(out=tmp_path / name) == 0


def test_outputs_are_skipped_or_refused_as_images(judged: Callable[..., int], images: Path) -> None:
    shown, messages = images / "overlays", []
    judged(overlays=shown, maps=images / "floats", map_suffix=".tiff")
    expanded = expand([images])
    assert [path.name for path in expanded.files] == ["000.png", "001.png", "002.png", "x.tiff"]
    assert (
        expanded.notes[0].startswith("8 pictures written by fastmaf skipped: ") and f"4 in {shown}" in expanded.notes[0]
    )
    assert judged(shown / "000.png", images / "000.png", say=messages.append) == 0
    assert messages == [f"1 picture written by fastmaf skipped: 1 in {shown}", messages[1]]
    assert messages[1].startswith("1 image scored at the threshold ")
    for argument in (shown / "000.png", shown, shown / "*.png", shown / "**"):
        with pytest.raises(DataError, match="written by fastmaf"):
            expand([argument])
    with pytest.raises(DataError, match="000.png: a picture written by fastmaf"):
        fastmaf.Detector(size=8).fit([images / "000.png", shown / "000.png"])


def test_a_results_folder_below_the_data_is_not_trained_on(run: Path, tmp_path: Path) -> None:
    for i in range(4):
        noise(tmp_path / "data" / f"{i}.png", i)
    score(
        run, [str(tmp_path / "data")], overlays=tmp_path / "data" / "results", stdout=io.StringIO(), say=silent,
        progress=False,
    )  # fmt: skip
    (tmp_path / "data" / "results" / "3.png").rename(tmp_path / "data" / "4.png")
    train_set = load_train(tmp_path / "data", size=8, progress=False)
    assert [path.name for path in train_set.paths] == ["0.png", "1.png", "2.png", "3.png"]
    assert train_set.notes[-1] == f"1 picture written by fastmaf skipped: 1 in {tmp_path / 'data'}"
    for file in (tmp_path / "data").glob("?.png"):
        file.unlink()
    with pytest.raises(DataError):
        load_train(tmp_path / "data", size=8, progress=False)


def test_export_replaces_an_export_and_nothing_else(run: Path, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    own = tmp_path / "own.safetensors"
    own.write_bytes((run / "model.safetensors").read_bytes())
    mine = tmp_path / "mine.onnx"
    mine.write_bytes(b"\x08\x07\x12\x07pytorch and so on")
    before = contents(tmp_path)
    for onnx in (own, images / "000.png", mine, images):
        with pytest.raises(OutputError):
            export(own, onnx, [str(images)], say=silent)
    assert contents(tmp_path) == before
    for _ in range(2):
        assert "agree" in export(own, tmp_path / "new.onnx", [str(images / "000.png")], say=silent)


@pytest.mark.parametrize("name", ["scores.csv", "metrics.json", "report.html"])
def test_eval_replaces_no_other_file(run: Path, data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"mine": 1}\n')
    with pytest.raises(OutputError, match=name):
        evaluate(run, data, tmp_path, progress=False, say=silent)
    assert contents(tmp_path) == {name: b'{"mine": 1}\n'}


@pytest.mark.parametrize("name", ["model.safetensors", "training_log.csv", "report.html", "model.previous.safetensors"])
def test_train_moves_no_other_file_away(data: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match=name):
        fit(data, tmp_path, TINY, progress=False, say=silent)
    assert contents(tmp_path) == {name: b"mine"}


def test_train_into_the_place_of_a_file_is_refused_before_the_images_are_read(data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError):
        fit(tmp_path / "nowhere", tmp_path / "out", TINY, progress=False, say=silent)


def test_models_of_folds_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "folds"
    flow = fastmaf.MAF(48, 1, (8,), seed=0)
    flow.save(folder / "fold-1.safetensors", {"statistics": "x"})
    flow.save(folder / "fold-2.safetensors")
    (folder / "fold-of-mine.safetensors").write_text("mine")
    replace_fold_models(tmp_path / "new", tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["fold-2.safetensors", "fold-of-mine.safetensors"]


def test_calibrating_through_a_link_keeps_the_link(run: Path, tmp_path: Path) -> None:
    target, link = tmp_path / "v1.safetensors", tmp_path / "current.safetensors"
    target.write_bytes((run / "model.safetensors").read_bytes())
    link.symlink_to(target)
    calibrate(link, 0.25)
    assert link.is_symlink() and load_inspection(target).calibration.false_alarm == 0.25


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_row_for_each_image_whatever_its_name(
    judged: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["=1+1.png", "+a.png", "-a.png", "@a.png", "\ta.png", "a\rb.png", "a\nb.png", "a\x1b[2J.png", "a.png"]
    monkeypatch.chdir(noise(tmp_path / "odd" / "a.png").parent)
    for i, name in enumerate(names[:-1]):
        noise(Path("./") / "x.png", i + 1).rename(name)
    messages: list[str] = []
    assert (
        judged(*map(Path, names), out=tmp_path / "rows.csv", overlays=tmp_path / "overlays", say=messages.append) == 0
    )
    text = (tmp_path / "rows.csv").read_bytes().decode()
    assert len(text.splitlines()) == 10
    cells = [row["file"] for row in csv.DictReader(io.StringIO(text))]
    assert [from_cell(cell) for cell in cells] == names
    assert cells[-1] == "a.png" and not any(cell[0] in "=+-@\t\r" for cell in cells)
    assert len(list((tmp_path / "overlays").iterdir())) == 9


def test_names_of_pictures_are_never_too_long(judged: Callable[..., int], tmp_path: Path) -> None:
    for a, b in (("a", "x"), ("b", "x"), ("a", "y")):
        noise(tmp_path / (a * 150) / (b * 120) / f"{'n' * 250}.png", side=8)
    assert judged(tmp_path, overlays=tmp_path / "o", maps=tmp_path / "m", map_suffix=".tiff") == 0
    assert len(list((tmp_path / "o").iterdir())) == len(list((tmp_path / "m").iterdir())) == 4 + 3


def test_json_lines_of_an_earlier_call_are_known_by_their_keys(judged: Callable[..., int], tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    assert judged(out=out) == 0
    assert len([json.loads(line) for line in out.read_text().splitlines()]) == 4
    assert judged(out=out) == 0
