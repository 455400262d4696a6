"""The capsule commands replace no file of the user, and their pictures are not read as data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fastmaf
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.models import Model
from fastmaf.capsule.sample import sample
from fastmaf.capsule.synthetic import MARKER, draw_dataset
from fastmaf.capsule.train import train
from fastmaf.images.dataset import load_test, load_train
from fastmaf.images.decode import DataError
from fastmaf.io.marks import DRAWN, role_of
from fastmaf.io.outputs import OutputError
from tests.images.pictures import capsule_set, picture

SMALL = TrainConfig(size=8, blocks=1, hidden_features=(8,), epochs=1, batch_size=4)


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(fastmaf.MAF(48, 1, (8,), seed=0), 4, tmp_path / "model.safetensors", ())


def test_sample_deletes_and_replaces_only_its_own_pictures(model: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"
    mine = [picture(out / "samples" / name).read_bytes() for name in ("017.png", "2024-part.png")]
    sample(model, out, n=4, progress=False)
    sample(model, out, n=2, progress=False)
    assert sorted(path.name for path in (out / "samples").iterdir()) == [
        "000.png", "001.png", "017.png", "2024-part.png",
    ]  # fmt: skip
    assert [(out / "samples" / name).read_bytes() for name in ("017.png", "2024-part.png")] == mine
    with pytest.raises(OutputError, match=r"017\.png is there already, and is not a sample"):
        sample(model, out, n=20, progress=False)
    picture(out / "samples.png")
    with pytest.raises(OutputError, match=r"samples\.png"):
        sample(model, out, n=1, progress=False)
    assert len(list((out / "samples").iterdir())) == 4


def test_samples_and_curves_are_not_trained_on(model: Model, tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / f"{i}.png", (10 * i, 0, 0))
    sample(model, tmp_path / "results", n=3, progress=False)
    train(tmp_path, tmp_path / "results", SMALL, progress=False)
    results = tmp_path / "results"
    assert load_train(tmp_path, size=8, progress=False).notes[1:] == (
        f"5 pictures written by fastmaf skipped: 2 in {results}, 3 in {results / 'samples'}",
    )
    train(tmp_path, tmp_path, SMALL, progress=False)
    images = load_train(tmp_path, size=8, progress=False)
    assert [path.name for path in images.paths] == ["0.png", "1.png", "2.png", "3.png"]
    assert any(note.startswith("1 picture written by fastmaf skipped: 1 in ") for note in images.notes)
    with pytest.raises(DataError, match="a picture written by fastmaf"):
        load_train(tmp_path / "results", size=8, progress=False)


def test_pictures_among_test_images_are_counted_and_left_aside(model: Model, tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "set")
    sample(model, root / "test" / "good", n=2, progress=False)
    images = load_test(root, size=4, progress=False)
    assert images.labels.count("good") == 2
    assert any(note.startswith("3 pictures written by fastmaf skipped: ") for note in images.notes)


@pytest.mark.parametrize("name", ["nll_curve.png", "train_log.csv", "model.safetensors", "train_log.previous.csv"])
def test_train_replaces_no_other_file(tmp_path: Path, name: str) -> None:
    root = capsule_set(tmp_path / "set")
    picture(tmp_path / "out" / "x.png").rename(tmp_path / "out" / name)
    mine = (tmp_path / "out" / name).read_bytes()
    with pytest.raises(OutputError, match=name):
        train(root, tmp_path / "out", SMALL, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_bytes() == mine


def test_demo_data_replaces_only_its_own_pictures(tmp_path: Path) -> None:
    root = draw_dataset(tmp_path / "set", train=3, good=1, defects={"poke": 1}, size=32, progress=False)
    assert role_of(root / "train/good/000.png") == role_of(root / "ground_truth/poke/000_mask.png") == DRAWN
    assert len(load_train(root, size=8, progress=False)) == 3
    mine = picture(root / "train" / "good" / "001.png").read_bytes()
    picture(root / "train" / "good" / "004.png")
    before = {path: path.read_bytes() for path in root.rglob("*.png")}
    for n in (2, 5):
        with pytest.raises(DataError, match=r"00[14]\.png was not drawn by this command; nothing was written"):
            draw_dataset(root, train=n, good=0, defects={}, size=32, progress=False)
    assert {path: path.read_bytes() for path in root.rglob("*.png")} == before
    draw_dataset(root, train=1, good=0, defects={}, size=32, progress=False)
    assert (root / "train" / "good" / "001.png").read_bytes() == mine
    assert not (root / "train" / "good" / "002.png").exists()


def test_a_set_that_a_version_without_marks_drew_is_drawn_again(tmp_path: Path) -> None:
    root = draw_dataset(tmp_path / "set", train=3, good=1, defects={}, size=32, progress=False)
    for file in root.rglob("*.png"):
        picture(file)
    marker = json.loads((root / MARKER).read_text())
    del marker["marked"]
    (root / MARKER).write_text(json.dumps(marker))
    picture(root / "train" / "good" / "003.png")
    draw_dataset(root, train=2, good=1, defects={}, size=32, progress=False)
    assert sorted(path.name for path in (root / "train" / "good").iterdir()) == ["000.png", "001.png", "003.png"]
