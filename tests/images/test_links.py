"""Links in a data folder: none that leads out of it is followed unless the user asks for it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fastmaf.cli.app import app
from fastmaf.images.dataset import load_test, load_train
from fastmaf.images.decode import DataError
from fastmaf.images.folders import has_normals
from fastmaf.images.listing import following_links
from fastmaf.inspection.masks import load_masks
from tests.images.pictures import capsule_set, picture
from tests.inspection.workflow.expanded import expand


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data set with a private picture beside it."""
    picture(tmp_path / "private" / "secret.png")
    picture(tmp_path / "private" / "below" / "more.png")
    capsule_set(tmp_path / "set")
    try:
        (tmp_path / "probe").symlink_to(tmp_path)
    except OSError:
        pytest.skip("no symbolic links here")
    return tmp_path / "set"


def test_links_to_files_and_folders_outside_are_left_aside_with_a_note(root: Path, tmp_path: Path) -> None:
    good = root / "train" / "good"
    (good / "file.png").symlink_to(tmp_path / "private" / "secret.png")
    (good / "folder").symlink_to(tmp_path / "private")
    (good / "relative.png").symlink_to(Path("..") / ".." / ".." / "private" / "secret.png")
    (good / "chain.png").symlink_to(good / "file.png")
    images = load_train(root, size=4, progress=False)
    assert images.names == ("000.png", "001.png", "002.png")
    assert images.notes[-1].startswith("4 links out of the folder skipped (") and "--follow-links" in images.notes[-1]
    assert str(tmp_path / "private") in images.notes[-1]
    with following_links():
        names = load_train(root, size=4, progress=False).names
    assert {"file.png", "relative.png", "chain.png", "folder/secret.png", "folder/below/more.png"} < set(names)


def test_links_within_the_data_set_are_followed(root: Path) -> None:
    (root / "train" / "good" / "inner.png").symlink_to(root / "test" / "good" / "000.png")
    (root / "train" / "good" / "crack").symlink_to(root / "test" / "crack")
    assert len(load_train(root, size=4, progress=False)) == 3 + 1 + 2


def test_a_data_set_that_is_itself_a_link_was_asked_for(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    images = load_train(tmp_path / "link", size=4, progress=False)
    assert len(images) == 3 and not any("link" in note for note in images.notes)


@pytest.mark.parametrize("part", ["train", "train/good", "test"])
def test_a_part_of_the_data_set_that_leads_out_is_an_error(root: Path, tmp_path: Path, part: str) -> None:
    (root / part).rename(tmp_path / "elsewhere")
    (root / part).symlink_to(tmp_path / "elsewhere")
    load = load_test if part == "test" else load_train
    with pytest.raises(DataError, match="leads out of .*set, to .*elsewhere.*--follow-links"):
        load(root, size=4, progress=False)
    with following_links():
        assert len(load(root, size=4, progress=False)) >= 3


def test_classes_and_masks_that_lead_out(root: Path, tmp_path: Path) -> None:
    (root / "test" / "scratch").symlink_to(tmp_path / "private")
    (root / "ground_truth").symlink_to(tmp_path / "private")
    images = load_test(root, size=4, progress=False)
    assert set(images.labels) == {"good", "crack", "poke"}
    (tmp_path / "private" / "crack").mkdir()
    picture(tmp_path / "private" / "crack" / "000_mask.png", (255, 255, 255))
    assert all(mask is None for mask in load_masks(root, images).masks)
    with following_links():
        assert "scratch" in load_test(root, size=4, progress=False).labels
        assert sum(mask is not None for mask in load_masks(root, images).masks) == 1


def test_a_link_to_the_root_of_the_file_system_is_not_walked(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "train" / "good" / "all").symlink_to("/")
    opened: list[str] = []
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: opened.append(os.path.realpath(self)) or real(self))
    load_train(root, size=4, progress=False)
    assert has_normals(root) and all(folder.startswith(os.path.realpath(root)) for folder in opened)


def test_arguments_of_commands(root: Path, tmp_path: Path) -> None:
    """A link that is named is followed; those found in folders and by patterns are not."""
    good = root / "train" / "good"
    (good / "file.png").symlink_to(tmp_path / "private" / "secret.png")
    (good / "folder").symlink_to(tmp_path / "private")
    for argument in (good, root / "**" / "*.png", good / "*", str(root / "tr*" / "good")):
        found = expand([argument])
        assert not any("private" in os.path.realpath(file) for file in found.files)
        assert any("out of the folder skipped" in note for note in found.notes)
    assert [file.name for file in expand([good / "file.png", good / "folder"]).files] == [
        "file.png",
        "more.png",
    ]
    with pytest.raises(DataError, match="1 link out of the folder skipped"):
        expand([good / "file*"])
    with following_links():
        assert [file.name for file in expand([good / "file*"]).files] == ["file.png"]
    listed = io.StringIO(str(good / "file.png"))
    assert len(expand(["-"], stdin=listed).files) == 1


def test_the_option_of_the_command_line(root: Path, tmp_path: Path) -> None:
    (root / "train").rename(tmp_path / "elsewhere")
    (root / "train").symlink_to(tmp_path / "elsewhere")
    command = ["inspect", "choose", "--data", str(root), "--size", "8", "--quiet"]
    for _ in range(2):  # the option holds for one call
        done = CliRunner().invoke(app, command)
        assert "leads out of" in str(done.exception)
        done = CliRunner().invoke(app, [*command, "--follow-links"])
        assert "expected at least 5 good images" in str(done.exception)
