"""Masks of a labelled test set: where they are looked for, in which formats, and what is said of those that are odd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.capsule.synthetic import draw_dataset
from fastmaf.images.dataset import ImageSet, load_test
from fastmaf.images.decode import DataError
from fastmaf.inspection.masks import load_masks
from tests.images.pictures import picture

DEFECT = np.array([[0, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=bool)  # [3, 5]: not square


def images(root: Path, *names: str) -> ImageSet:
    """A test set of files that need not exist: class/name each."""
    paths = tuple(root / "test" / name for name in names)
    return ImageSet(torch.zeros(len(names), 3, 4, 4, dtype=torch.uint8), paths, tuple(p.parent.name for p in paths))


def put(root: Path, name: str, mask: Image.Image) -> Path:
    path = root / "ground_truth" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path)
    return path


def grey(values: np.ndarray = DEFECT, white: int = 255) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8) * np.uint8(white))


def test_drawn_set(tmp_path: Path) -> None:
    root = draw_dataset(tmp_path / "d", train=1, good=2, defects={"crack": 2, "poke": 1}, size=48, progress=False)
    test = load_test(root, size=16, progress=False)
    loaded = load_masks(root, test)
    assert [mask is None for mask in loaded.masks] == [True, True, False, False, False]
    for path, mask in zip(test.paths[2:], loaded.masks[2:], strict=True):
        file = root / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        assert mask is not None and mask.dtype == bool and mask.shape == (48, 48)  # the file's own, not the images'
        np.testing.assert_array_equal(mask, np.asarray(Image.open(file)) > 127)
    assert loaded.notes == () and loaded.usable(test).tolist() == [True] * 5


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "I;16", "RGBA", "LA"])
def test_modes(tmp_path: Path, mode: str) -> None:
    mask = grey()
    if mode == "1":
        mask = Image.fromarray(DEFECT)
    elif mode == "P":  # red on black, whose luminance is below a half
        mask = Image.fromarray(DEFECT.astype(np.uint8))
        mask.putpalette([0, 0, 0, 128, 0, 0])
    elif mode == "I;16":
        mask = Image.fromarray(np.where(DEFECT, 32768, 32767).astype(np.uint16))
    elif mode != "L":
        mask = mask.convert(mode)  # with an opaque alpha channel
    assert mask.mode == mode
    put(tmp_path, "ä crack/Bild 1_mask.png", mask)
    loaded = load_masks(tmp_path, images(tmp_path, "ä crack/Bild 1.tiff"))
    assert loaded.masks[0] is not None and loaded.masks[0].dtype == bool
    np.testing.assert_array_equal(loaded.masks[0], DEFECT)
    assert bool(loaded.notes) is (mode in ("RGBA", "LA"))  # said, since what is transparent would count as white


def test_threshold_and_names(tmp_path: Path) -> None:
    put(tmp_path, "x/a_mask.png", grey(DEFECT, 128))
    put(tmp_path, "x/a.png", grey(~DEFECT))  # the mask's own name goes first
    put(tmp_path, "x/b.png", grey())
    put(tmp_path, "x/c_mask.png", grey(DEFECT, 127))
    loaded = load_masks(tmp_path, images(tmp_path, "x/a.png", "x/b.JPG", "x/c.bmp"))
    a, b, c = loaded.masks
    assert a is not None and b is not None and c is not None
    np.testing.assert_array_equal(a, DEFECT)
    np.testing.assert_array_equal(b, DEFECT)
    assert c.shape == (3, 5) and not c.any()
    assert len(loaded.notes) == 1 and "x/c_mask.png" in loaded.notes[0] and "127 of 255" in loaded.notes[0]


def test_missing_masks_are_told_from_no_defect(tmp_path: Path) -> None:
    put(tmp_path, "x/1_mask.png", grey())
    put(tmp_path, "good/0_mask.png", grey())  # not read: a good image has no defect
    names = ("good/0.png", "x/1.png", "x/2.png", "y/3.png", "y/4.png", "y/5.png")
    test = images(tmp_path, *names)
    loaded = load_masks(str(tmp_path), test)
    assert [mask is None for mask in loaded.masks] == [True, False, True, True, True, True]
    assert loaded.usable(test).tolist() == [True, True, False, False, False, False]
    (note,) = loaded.notes
    assert "x/2.png, y/3.png, y/4.png and 1 more" in note


def test_no_ground_truth_at_all(tmp_path: Path) -> None:
    test = images(tmp_path, "good/0.png", "x/1.png")
    loaded = load_masks(tmp_path, test)
    assert loaded.masks == (None, None)
    assert len(loaded.notes) == 1 and str(tmp_path / "ground_truth") in loaded.notes[0]
    assert not loaded.usable(test).any()  # a good image alone is nothing to judge by
    nothing = images(tmp_path)
    assert load_masks(tmp_path, nothing).usable(nothing).shape == (0,)


def test_only_empty_masks_are_nothing_to_judge_by(tmp_path: Path) -> None:
    put(tmp_path, "x/1_mask.png", grey(DEFECT, 1))
    test = images(tmp_path, "good/0.png", "x/1.png")
    loaded = load_masks(tmp_path, test)
    assert loaded.masks[1] is not None and not loaded.usable(test).any()
    assert "(largest value 1 of 255)" in loaded.notes[0]


@pytest.mark.parametrize("damage", ["cut", "empty", "gif", "text"])
def test_damaged_masks_are_named(tmp_path: Path, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    file = put(tmp_path, "x/1_mask.png", Image.fromarray(noise))
    if damage == "gif":
        Image.fromarray(noise).save(file, format="GIF")
    else:
        file.write_bytes({"cut": file.read_bytes()[:2000], "empty": b"", "text": b"no picture"}[damage])
    with pytest.raises(DataError, match="1_mask.png"):
        load_masks(tmp_path, images(tmp_path, "x/1.png"))


@pytest.mark.parametrize("name", ["1_mask.PNG", "1.Png", "1_mask.jpg", "1.JPG", "1_mask.bmp", "1.tif"])
def test_suffixes_in_any_case_and_of_any_image(tmp_path: Path, name: str) -> None:
    put(tmp_path, f"x/{name}", grey(np.kron(DEFECT, np.ones((8, 8), bool))))  # JPEG blurs what is smaller
    loaded = load_masks(tmp_path, images(tmp_path, "x/1.png"))
    assert loaded.notes == ()
    np.testing.assert_array_equal(loaded.masks[0], np.kron(DEFECT, np.ones((8, 8), bool)))


def test_masks_of_images_in_folders_below_a_class(tmp_path: Path) -> None:
    for folder, value in (("a", 255), ("b", 0)):
        picture(tmp_path / "test" / "x" / folder / "1.png", size=4)
        put(tmp_path, f"x/{folder}/1_mask.png", Image.new("L", (4, 4), value))
    picture(tmp_path / "test" / "x" / "1.png", size=4)
    test = load_test(tmp_path, size=4, progress=False)
    loaded = load_masks(tmp_path, test)
    assert test.names == ("1.png", "a/1.png", "b/1.png")
    assert [None if mask is None else bool(mask.all()) for mask in loaded.masks] == [None, True, False]
    assert any(
        note.startswith("no mask in") and note.endswith("for 1 defective image: x/1.png") for note in loaded.notes
    )


@pytest.mark.parametrize(
    ("mask", "fits"),
    [
        ((24, 12), True), ((12, 6), True), ((48, 24), True), ((5, 2), True), ((5, 3), True), ((2400, 1200), True),
        ((12, 24), False), ((24, 24), False), ((24, 10), False), ((60, 6), False), ((240, 110), False),
    ],
)  # fmt: skip
def test_a_mask_of_another_shape_than_its_image(tmp_path: Path, mask: tuple[int, int], fits: bool) -> None:
    path = tmp_path / "test" / "x" / "1.png"
    path.parent.mkdir(parents=True)
    Image.new("RGB", (24, 12)).save(path)
    put(tmp_path, "x/1.png", Image.new("L", mask, 255))
    test = load_test(tmp_path, size=4, progress=False)
    if fits:
        assert load_masks(tmp_path, test).masks[0] is not None
        return
    words = rf"1\.png: a mask of {mask[0]} x {mask[1]} pixels does not fit x/1\.png of 24 x 12; expected"
    with pytest.raises(DataError, match=words):
        load_masks(tmp_path, test)
    (note,) = load_masks(tmp_path, test, skip_bad=True).notes
    assert note.startswith("1 mask skipped: ") and "24 x 12" in note


def test_damaged_masks_are_skipped_on_demand(tmp_path: Path) -> None:
    put(tmp_path, "x/1.png", grey()).write_bytes(b"")
    put(tmp_path, "x/2.png", grey())
    test = images(tmp_path, "good/0.png", "x/1.png", "x/2.png")
    loaded = load_masks(tmp_path, test, skip_bad=True)
    assert [mask is None for mask in loaded.masks] == [True, True, False]
    assert loaded.usable(test).tolist() == [True, False, True]
    (note,) = loaded.notes
    assert note.startswith("1 mask skipped: ") and "x/1.png: not a readable image" in note
