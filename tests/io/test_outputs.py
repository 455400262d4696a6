"""Which files a command may replace, and by what it knows its own."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import fastmaf
from fastmaf.capsule import reproduce
from fastmaf.capsule.config import TrainConfig
from fastmaf.capsule.models import Model
from fastmaf.capsule.sample import sample
from fastmaf.capsule.synthetic import MARKER, draw_dataset
from fastmaf.capsule.train import train
from fastmaf.images.dataset import DataError, load_test, load_train
from fastmaf.images.png import save_grid, save_png
from fastmaf.io import outputs
from fastmaf.io.marks import DRAWN, KEYWORD, MAP, SAMPLE, is_output, role_of
from fastmaf.io.outputs import Kind, Output, OutputError, check_outputs
from tests.images.pictures import capsule_set, picture

FREE = Kind("anything", lambda _: True)
SMALL = TrainConfig(size=8, blocks=1, hidden_features=(8,), epochs=1, batch_size=4)


def check(*paths: Path, inputs: tuple[Path, ...] = ()) -> None:
    check_outputs([Output(path, FREE) for path in paths], inputs)


# ---- one place, however it is spelt


@pytest.mark.parametrize("spelling", ["a/x", "a/../a/x", "./a//x", "link/x", "a/back/a/x"])
def test_a_place_is_known_in_every_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spelling: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "a" / "back").symlink_to("..")
    with pytest.raises(OutputError, match="which this command writes, too"):
        check(tmp_path / "a" / "x", Path(spelling))
    (tmp_path / "a" / "x").touch()
    with pytest.raises(OutputError, match="is to be read"):
        check(Path(spelling), inputs=(tmp_path / "a" / "x",))
    check(tmp_path / "a" / "y", inputs=(tmp_path / "a" / "x",))


def test_a_link_to_an_input_is_that_input(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    (tmp_path / "out").symlink_to(tmp_path / "image")
    with pytest.raises(OutputError, match="is to be read"):
        check(tmp_path / "out", inputs=(tmp_path / "image",))
    os.link(tmp_path / "image", tmp_path / "hard")  # replacing this name leaves the other
    check(tmp_path / "hard", inputs=(tmp_path / "image",))


def test_case_counts_where_the_file_system_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "_folds_case", Clearable(lambda _: False))
    check(tmp_path / "Heat" / "a.png", tmp_path / "heat" / "a.png", tmp_path / "A", tmp_path / "a")
    monkeypatch.setattr(outputs, "_folds_case", Clearable(lambda _: True))
    for one, other in (("Heat/a.png", "heat/A.png"), ("A", "a")):
        with pytest.raises(OutputError):
            check(tmp_path / one, tmp_path / other)


class Clearable:
    """A function with a cache to clear."""

    def __init__(self, function: Callable[[str], bool]) -> None:
        self.function = function

    def __call__(self, folder: str) -> bool:
        return self.function(folder)

    def cache_clear(self) -> None: ...


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, words in (("pipe", "a pipe"), ("folder", "is a folder")):
        with pytest.raises(OutputError, match=words):
            check(tmp_path / name)
    with pytest.raises(NotADirectoryError):
        check(tmp_path / "file" / "x")
    assert stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(PermissionError) as caught:
        check(tmp_path / "new" / "x")
    assert caught.value.filename == str(tmp_path)


# ---- marks


def test_marks_are_read_from_headers_alone(tmp_path: Path) -> None:
    save_png(tmp_path / "sample.png", np.zeros((4, 4, 3), np.uint8))
    save_grid(tmp_path / "grid.png", np.zeros((2, 4, 4, 3), np.uint8))
    text = PngInfo()
    text.add_text("Comment", "x" * 10_000)
    text.add_text(KEYWORD, SAMPLE)
    Image.new("L", (4, 4)).save(tmp_path / "late.png", pnginfo=text)
    for name in ("sample.png", "grid.png", "late.png"):
        assert is_output(tmp_path / name), name
    assert role_of(tmp_path / "late.png") == SAMPLE
    for size in range(60):  # cut anywhere
        (tmp_path / "cut.png").write_bytes((tmp_path / "sample.png").read_bytes()[:size])
        assert role_of(tmp_path / "cut.png") in (None, SAMPLE)


def test_maps_of_versions_without_marks_are_known(tmp_path: Path) -> None:
    text = PngInfo()
    text.add_text("Scale", "512.0")
    text.add_text("Description", "anomaly map: value = level / 512.0")
    Image.new("I;16", (4, 4)).save(tmp_path / "map.png", pnginfo=text)
    Image.new("F", (4, 4)).save(tmp_path / "map.tiff", tiffinfo={270: "anomaly map, times"})
    assert role_of(tmp_path / "map.png") == role_of(tmp_path / "map.tiff") == MAP


def test_other_files_have_no_role(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    Image.new("F", (4, 4)).save(tmp_path / "a.tiff", tiffinfo={270: "a camera"})
    (tmp_path / "b.tiff").write_bytes(b"II*\0\xff\xff\xff\xff")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for file in tmp_path.iterdir():
        assert role_of(file) is None, file
    assert role_of(tmp_path / "nowhere.png") is None


# ---- commands


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return Model(fastmaf.MAF(48, 1, (8,), seed=0), 4, tmp_path / "model.safetensors", ())


def test_sample_deletes_and_replaces_its_own_pictures_alone(model: Model, tmp_path: Path) -> None:
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
        f"5 pictures that fastmaf wrote left aside: 2 in {results}, 3 in {results / 'samples'}",
    )
    train(tmp_path, tmp_path, SMALL, progress=False)
    found = load_train(tmp_path, size=8, progress=False)
    assert [path.name for path in found.paths] == ["0.png", "1.png", "2.png", "3.png"]
    assert any(note.startswith("1 picture that fastmaf wrote left aside: 1 in ") for note in found.notes)
    with pytest.raises(DataError, match="a picture that fastmaf wrote"):
        load_train(tmp_path / "results", size=8, progress=False)


def test_pictures_among_test_images_are_counted_and_left_aside(model: Model, tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "set")
    sample(model, root / "test" / "good", n=2, progress=False)
    found = load_test(root, size=4, progress=False)
    assert found.labels.count("good") == 2
    assert any(note.startswith("3 pictures that fastmaf wrote left aside: ") for note in found.notes)


@pytest.mark.parametrize("name", ["nll_curve.png", "train_log.csv", "model.safetensors", "train_log.previous.csv"])
def test_train_replaces_no_other_file(tmp_path: Path, name: str) -> None:
    root = capsule_set(tmp_path / "set")
    picture(tmp_path / "out" / "x.png").rename(tmp_path / "out" / name)
    mine = (tmp_path / "out" / name).read_bytes()
    with pytest.raises(OutputError, match=name):
        train(root, tmp_path / "out", SMALL, progress=False)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_bytes() == mine


@pytest.mark.parametrize("name", ["samples/003.png", "samples.png", "scores.csv", "roc_curve.png", "comparison.txt"])
def test_reproduce_notices_before_the_training(tmp_path: Path, name: str) -> None:
    target = tmp_path / "out" / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(b"mine")
    with pytest.raises(OutputError, match=Path(name).name):
        reproduce.reproduce(tmp_path / "out", SMALL, progress=False)
    assert not (tmp_path / "out" / "demo-data").exists() and target.read_bytes() == b"mine"


def test_demo_data_draws_over_its_own_pictures_alone(tmp_path: Path) -> None:
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
