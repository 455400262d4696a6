"""Sets of images: their tensors, and what is read of their folders."""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.images import dataset
from fastmaf.images.dataset import ImageSet, load_test, load_train, to_images, to_unit
from fastmaf.images.decode import DataError
from fastmaf.io.run_folder import DoesNotFitError
from tests.images.pictures import capsule_set, picture

# ---- tensors


def test_to_unit_is_pixel_over_255_in_channel_row_column_order() -> None:
    pixels = torch.arange(2 * 3 * 4 * 4).remainder(256).to(torch.uint8).reshape(2, 3, 4, 4)
    x = to_unit(pixels)
    assert x.dtype == torch.float32 and x.shape == (2, 48)
    for n, c, row, column in ((0, 0, 0, 0), (1, 2, 3, 1), (0, 1, 2, 3)):
        assert x[n, c * 16 + row * 4 + column] == np.float32(int(pixels[n, c, row, column])) / np.float32(255)


def test_to_images_undoes_to_unit_for_every_value() -> None:
    pixels = torch.arange(256).repeat(3).to(torch.uint8).reshape(1, 3, 16, 16)
    assert torch.equal(to_images(to_unit(pixels), 16).permute(0, 3, 1, 2), pixels)


def test_to_images_clamps() -> None:
    x = torch.tensor([[-1.0, 2.0, float("nan")]])
    assert to_images(x, 1).tolist() == [[[[0, 255, 0]]]]


def test_to_unit_and_to_images_name_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"uint8 \[n, 3, s, s\].*float32"):
        to_unit(torch.zeros(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"\[n, 48\].*\[1, 47\]"):
        to_images(torch.zeros(1, 47), 4)


def test_image_set_subset() -> None:
    pixels = torch.arange(3 * 3 * 2 * 2).to(torch.uint8).reshape(3, 3, 2, 2)
    whole = ImageSet(pixels, (Path("a"), Path("b"), Path("c")), ("good", "crack", "poke"), ("note",), ())
    part = whole.subset([2, 0])
    assert torch.equal(part.pixels, pixels[[2, 0]])
    assert part.paths == (Path("c"), Path("a")) and part.labels == ("poke", "good") and part.notes == ("note",)
    assert (len(part), part.size, part.features) == (2, 2, 12)
    assert len(whole.subset([])) == 0


# ---- folders


def test_load_train_and_test(tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "Müller Daten 検査 (2)")
    train = load_train(root, size=4, progress=False)
    assert train.pixels.shape == (3, 3, 4, 4) and train.labels == ("good",) * 3 and train.notes == ()
    assert [p.name for p in train.paths] == ["000.png", "001.png", "002.png"]
    assert train.pixels[:, 0, 0, 0].tolist() == [0, 10, 20]
    test = load_test(str(root), size=4, progress=False)
    assert test.labels == ("good", "good", "crack", "crack", "poke", "poke")
    assert all(path.parent.name == label for path, label in zip(test.paths, test.labels, strict=True))


def test_test_set_without_good_or_without_defects_is_loaded(tmp_path: Path) -> None:
    root = capsule_set(tmp_path)
    shutil.rmtree(root / "test" / "good")
    assert set(load_test(root, size=4, progress=False).labels) == {"crack", "poke"}
    shutil.rmtree(root / "test" / "crack")
    for file in (root / "test" / "poke").iterdir():
        file.rename(file.with_suffix(".txt"))
    picture(root / "test" / "good" / "0.png")
    test = load_test(root, size=4, progress=False)
    assert test.labels == ("good",)
    assert "no image in class folder test/poke" in test.notes


def test_suffixes_and_hidden_files(tmp_path: Path) -> None:
    root = capsule_set(tmp_path)
    folder = root / "train" / "good"
    for name in ("A.PNG", "B.JPG", "c.Jpeg", "d.bmp", "e.TIF", "f.tiff"):
        picture(folder / name)
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "._000.png"):
        (folder / name).write_bytes(b"x")
    picture(folder / "deeper" / "x.png")
    train = load_train(root, size=4, progress=False)
    assert len(train) == 10 and "deeper/x.png" in train.names
    assert train.notes == ("4 files skipped: hidden, or not named like an image",)


def test_notes_are_counted_by_kind(tmp_path: Path) -> None:
    root = capsule_set(tmp_path)
    for i in range(3):
        Image.new("L", (4, 4)).save(root / "train" / "good" / f"grey{i}.png")
    Image.new("RGBA", (4, 4)).save(root / "train" / "good" / "alpha.png")
    assert load_train(root, size=4, progress=False).notes == (
        "3 grey images, with R = G = B",
        "1 image with an alpha channel composited on white",
    )


def test_bad_file_stops_or_is_skipped_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = capsule_set(tmp_path)
    bad = root / "train" / "good" / "001.png"
    bad.write_text("no image")
    with pytest.raises(DataError, match="001.png"):
        load_train(root, size=4, progress=False)
    with caplog.at_level(logging.WARNING, logger="fastmaf"):
        train = load_train(root, size=4, skip_bad=True, progress=False)
    assert [p.name for p in train.paths] == ["000.png", "002.png"] and train.pixels[:, 0, 0, 0].tolist() == [0, 20]
    assert [path for path, _ in train.skipped] == [bad] and "not a readable image" in train.skipped[0][1]
    assert train.notes == ("1 file skipped: could not be read (001.png)",)
    assert str(bad) in caplog.text
    for file in (root / "train" / "good").iterdir():
        file.write_text("no image")
    with pytest.raises(DataError, match="none of the 3 train images"):
        load_train(root, size=4, skip_bad=True, progress=False)


def test_progress_goes_to_stderr_or_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = capsule_set(tmp_path)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_train(root, size=4, progress=False)
    assert capsys.readouterr() == ("", "")
    load_train(root, size=4)
    out, err = capsys.readouterr()
    assert out == "" and "reading train images" in err


def test_size_must_be_positive(tmp_path: Path) -> None:
    root = capsule_set(tmp_path)
    with pytest.raises(ValueError, match="size: expected at least 1"):
        load_train(root, size=0, progress=False)


def test_images_that_do_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    monkeypatch.setattr(dataset, "available_memory", lambda _: 1_000_000)
    with pytest.raises(DoesNotFitError, match=r"1 image at 1000 x 1000 pixels needs about 6\.0 MB"):
        dataset.load_train(tmp_path, size=1000)
    assert len(dataset.load_train(tmp_path, size=8, progress=False)) == 1
