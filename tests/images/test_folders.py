"""Folders that are read for training and for tests, and errors for others."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastmaf.images.dataset import load_test, load_train
from fastmaf.images.decode import DataError
from fastmaf.images.folders import has_normals
from fastmaf.images.png import png_text
from fastmaf.io.marks import OVERLAY
from tests.images.pictures import capsule_set, picture


def message_of(load: Callable[..., object], root: Path) -> str:
    with pytest.raises(DataError) as caught:
        load(root, size=4, progress=False)
    message = str(caught.value)
    assert "<folder>/train/good/*.png" in message and "found:" in message
    return message


def test_missing_folder_names_the_nearest(tmp_path: Path) -> None:
    capsule_set(tmp_path / "capsule")
    message = message_of(load_train, tmp_path / "capsul")
    assert f"no such folder: {tmp_path / 'capsul'}" in message
    assert f"did you mean {tmp_path / 'capsule'}?" in message


@pytest.mark.parametrize("wrong", ["god", "Goood", "goods"])
def test_misspelt_class_folder(tmp_path: Path, wrong: str) -> None:
    root = capsule_set(tmp_path / "set")
    (root / "train" / "good").rename(root / "train" / wrong)
    message = message_of(load_train, root)
    assert f"no folder train/good in {root}" in message
    assert f"did you mean {root / 'train' / wrong} (expected the name good)?" in message
    assert f"  train/{wrong}/  3 images" in message and "  test/crack/  2 images" in message


def test_misspelt_split_folder(tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "set")
    (root / "test").rename(root / "tests")
    assert f"did you mean {root / 'tests'} (expected the name test)?" in message_of(load_test, root)


@pytest.mark.parametrize("load", [load_train, load_test])
def test_root_a_level_too_high_or_too_low(tmp_path: Path, load: Callable[..., object]) -> None:
    root = capsule_set(tmp_path / "a" / "capsule")
    for given in (tmp_path / "a", tmp_path):
        assert f"did you mean {root} (it holds" in message_of(load, given)
    inside = [root / "test", root / "test" / "crack", root / "test" / "good"]
    if load is load_test:  # to train, these two hold nothing but good images
        inside += [root / "train", root / "train" / "good"]
    for given in inside:
        assert f"did you mean {root} (the folder above" in message_of(load, given)


def test_images_directly_in_train(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / "train" / f"{i}.png")
    assert f"did you mean {tmp_path / 'train' / 'good'} (move the 2 images in train/ there)?" in message_of(
        load_train, tmp_path
    )


# ---- folders of good images alone


def test_a_folder_of_normal_images_alone(tmp_path: Path) -> None:
    root = tmp_path / "Gute Teile 良品 (3)"
    for i in range(3):
        picture(root / f"{i}.png", (10 * i, 0, 0))
    (root / "notes.txt").write_text("x")
    train = load_train(root, size=4, progress=False)
    assert train.pixels[:, 0, 0, 0].tolist() == [0, 10, 20] and train.labels == ("good",) * 3
    assert train.notes == (
        "no folder train/good: using 3 images directly in Gute Teile 良品 (3)/ as good images",
        "1 file skipped: hidden, or not named like an image",
    )


def test_a_folder_of_normal_images_from_inside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "parts" / "a.png")
    monkeypatch.chdir(tmp_path / "parts")
    (note,) = load_train(".", size=4, progress=False).notes
    assert "using 1 image directly in parts/ as" in note


def test_a_folder_good_alone(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / "good" / f"{i}.png", (10 * i, 0, 0))
    train = load_train(tmp_path, size=4, progress=False)
    assert [path.parent.name for path in train.paths] == ["good", "good"] and train.labels == ("good", "good")
    assert train.notes == ("no folder train/good: using the images in good/ as good images",)
    picture(tmp_path / "overview.png")
    train = load_train(tmp_path, size=4, progress=False)
    assert len(train) == 2
    assert train.notes[1] == f"1 image directly in {tmp_path.name}/ skipped: not in good/"


@pytest.mark.parametrize("where", ["", "good"])
def test_test_images_may_lie_beside_normal_ones(tmp_path: Path, where: str) -> None:
    picture(tmp_path / where / "0.png")
    for part in ("test/good", "test/crack", "ground_truth/crack"):
        picture(tmp_path / part / "0.png")
    assert load_train(tmp_path, size=4, progress=False).paths == (tmp_path / where / "0.png",)
    assert load_test(tmp_path, size=4, progress=False).labels == ("good", "crack")


@pytest.mark.parametrize("given", ["train", "train/good"])
def test_the_part_of_a_set_that_holds_its_normal_images(tmp_path: Path, given: str) -> None:
    root = capsule_set(tmp_path / "set")
    picture(root / "train" / "good.png")
    train = load_train(root / given, size=4, progress=False)
    assert [path.resolve() for path in train.paths] == [root / "train" / "good" / f"{i:03d}.png" for i in range(3)]


def test_a_set_with_train_good_is_read_as_before(tmp_path: Path) -> None:
    root = capsule_set(tmp_path)
    for other in ("a.png", "good/b.png"):
        picture(root / other)
    train = load_train(root, size=4, progress=False)
    assert [path.name for path in train.paths] == ["000.png", "001.png", "002.png"] and train.notes == ()


def test_class_folders_without_train_good_are_ambiguous(tmp_path: Path) -> None:
    for name in ("crack", "good", "poke", "ground_truth"):
        picture(tmp_path / name / "0.png")
    message = message_of(load_train, tmp_path)
    assert message.count("did you mean") == 1
    assert f"did you mean {tmp_path / 'good'} (1 image, if all are normal)?" in message
    assert "<folder>/*.png or <folder>/good/*.png" in message and "  crack/  1 image" in message
    (tmp_path / "good").rename(tmp_path / "ok")
    message = message_of(load_train, tmp_path)
    for name in ("crack", "ok", "poke"):
        assert f"did you mean {tmp_path / name} (1 image, if" in message
    assert load_train(tmp_path / "ok", size=4, progress=False).labels == ("good",)


def test_images_beside_folders_of_images_are_ambiguous(tmp_path: Path) -> None:
    """A misspelt ``train`` must not lead to training on an overview picture beside it."""
    root = capsule_set(tmp_path / "set")
    picture(root / "overview.png")
    (root / "train").rename(root / "trian")
    assert f"did you mean {root / 'trian'} (expected the name train)?" in message_of(load_train, root)
    (root / "trian").rename(root / "2024")  # images two levels below
    assert f"did you mean {root / 'train'} (move the 1 image in set/ there)?" in message_of(load_train, root)
    shutil.rmtree(root / "2024")
    assert load_train(root, size=4, progress=False).paths == (root / "overview.png",)


def test_a_train_folder_without_good_stays_an_error(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "train" / "ok" / "b.png")
    assert f"did you mean {tmp_path / 'train' / 'ok'} (1 image, if" in message_of(load_train, tmp_path)


def test_links_in_a_loop_are_followed_once(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "sub").mkdir()
    try:
        (tmp_path / "sub" / "up").symlink_to(tmp_path, target_is_directory=True)
    except OSError:
        pytest.skip("no symbolic links here")
    message_of(load_train, tmp_path)  # sub/up holds images too: ambiguous


def test_empty_folders(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "good"
    folder.mkdir(parents=True)
    assert f"no image in {folder}: it is empty" in message_of(load_train, tmp_path)
    (folder / "a.jxl").write_bytes(b"x")
    (folder / "b.jxl").write_bytes(b"x")
    assert "found 2 x .jxl (supported: .png" in message_of(load_train, tmp_path)
    (tmp_path / "test" / "good").mkdir(parents=True)
    assert f"no class folder with images in {tmp_path / 'test'}" in message_of(load_test, tmp_path)
    picture(tmp_path / "test" / "a.png")
    assert "1 image directly in test/, not in a class folder" in message_of(load_test, tmp_path)


def test_root_is_a_file(tmp_path: Path) -> None:
    archive = tmp_path / "capsule.tar.xz"
    archive.write_bytes(b"x")
    assert "expected a folder, found a file" in message_of(load_train, archive)


def test_has_normals_returns_whether_a_folder_can_be_trained_on(tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "set")
    picture(tmp_path / "flat" / "a.png")
    assert has_normals(root) and has_normals(tmp_path / "flat") and has_normals(root / "train")
    assert not any(
        has_normals(folder) for folder in (tmp_path, tmp_path / "none", root / "test", root / "test" / "good")
    )


# ---- folders below, and files that are not read


def test_folders_below_a_class_are_read(tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "set")
    for name in ("train/good/monday", "train/good/monday/late", "test/crack/b", "test/good/b"):
        for i in range(2):
            picture(root / name / f"{i:03d}.png")
    train = load_train(root, size=4, progress=False)
    assert len(train) == 7 and train.labels == ("good",) * 7 and train.notes == ()
    assert train.names == (
        "000.png", "001.png", "002.png", "monday/000.png", "monday/001.png", "monday/late/000.png",
        "monday/late/001.png",
    )  # fmt: skip
    test = load_test(root, size=4, progress=False)
    assert (test.labels.count("good"), test.labels.count("crack"), test.labels.count("poke")) == (4, 4, 2)
    assert test.names[2:4] == ("b/000.png", "b/001.png") and test.shapes == ((8, 8),) * 10
    part = test.subset([3, 0])
    assert part.names == ("b/001.png", "000.png") and len(part.shapes) == 2
    for file in [*(root / "train" / "good").glob("*.png"), *(root / "test" / "crack").glob("*.png")]:
        file.unlink()  # none directly in the class folder
    assert len(load_train(root, size=4, progress=False)) == 4
    assert load_test(root, size=4, progress=False).labels.count("crack") == 2


def test_a_folder_good_alone_is_read_with_all_below_it(tmp_path: Path) -> None:
    picture(tmp_path / "good" / "a" / "0.png")
    picture(tmp_path / "good" / "b" / "0.png")
    assert load_train(tmp_path, size=4, progress=False).names == ("a/0.png", "b/0.png")


@pytest.mark.parametrize("name", ["__MACOSX", ".thumbnails", "@eaDir", ".ipynb_checkpoints"])
def test_folders_of_operating_systems_are_ignored(tmp_path: Path, name: str) -> None:
    root = capsule_set(tmp_path / "set")
    for part in ("train/good", "test/good", "test", "."):
        picture(root / part / name / "x.png")
    (root / "train" / "good" / "._000.png").write_bytes(b"\0\x05\x16\x07")
    assert len(load_train(root, size=4, progress=False)) == 3
    test = load_test(root, size=4, progress=False)
    assert set(test.labels) == {"good", "crack", "poke"} and len(test) == 6 and test.notes == ()
    for i in range(2):
        picture(tmp_path / "flat" / f"{i}.png")
    picture(tmp_path / "flat" / name / "x.png")
    assert len(load_train(tmp_path / "flat", size=4, progress=False)) == 2


def test_formats_that_are_not_read_are_counted(tmp_path: Path) -> None:
    root = capsule_set(tmp_path / "set")
    for name in ("train/good/a.jxl", "train/good/b.JXL", "train/good/c.heic", "train/good/d.txt"):
        (root / name).write_bytes(b"x")
    assert load_train(root, size=4, progress=False).notes == (
        "1 .heic file skipped: not supported; convert to PNG",
        "2 .jxl files skipped: not supported; convert to PNG",
        "1 file skipped: hidden, or not named like an image",
    )
    for file in (root / "test" / "poke").iterdir():
        file.rename(file.with_suffix(".jxl"))
    notes = load_test(root, size=4, progress=False).notes
    assert "no image in class folder test/poke" in notes
    assert "2 .jxl files skipped: not supported; convert to PNG" in notes
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(3):
        (flat / f"{i}.jxl").write_bytes(b"x")
    message = message_of(load_train, flat)
    assert f"no folder train/good in {flat}: found 3 x .jxl (supported: .png" in message
    assert f"{flat}  0 images, 3 x .jxl (not read)" in message


def test_a_folder_that_cannot_be_opened_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = capsule_set(tmp_path / "set")
    for part in ("train/good", "test/crack"):
        (root / part / "closed").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: Path(path).name != "closed")  # root may open all
    for load, part in ((load_train, "train/good"), (load_test, "test/crack")):
        notes = load(root, size=4, progress=False).notes
        assert notes == (f"1 folder could not be opened (no permission): {root / part / 'closed'}",)


def test_a_folder_without_readable_images_is_described(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (4, 4)).save(tmp_path / name, pnginfo=png_text(OVERLAY))
    os.mkfifo(tmp_path / "c.png")
    listing = "0 images, 1 x a FIFO (named pipe) (not read), 2 x a picture written by fastmaf (not read)"
    assert f"{tmp_path}  {listing}" in message_of(load_train, tmp_path)
