"""Patterns of file names among the arguments of ``fastmaf inspect score``."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastmaf.images.decode import DataError
from tests.images.pictures import picture
from tests.inspection.workflow.expanded import expand


def names(root: Path, pattern: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in expand([pattern]).files]


def refused(pattern: Path) -> str:
    with pytest.raises(DataError) as caught:
        expand([pattern])
    return str(caught.value)


def test_patterns_are_expanded_here(tmp_path: Path) -> None:
    root = tmp_path / "Müller Daten"
    for name in ("b 1.png", "a 2.png", "a 3.jpg", "ä.png", ".h.png", "sub/c 1.png", "sub/deep/d.png"):
        picture(root / name)
    assert names(root, root / "*.png") == ["a 2.png", "b 1.png", "ä.png"]
    assert names(root, root / "a ?.[pj]*") == ["a 2.png", "a 3.jpg"]
    assert names(root, root / "[!a]*1.png") == ["b 1.png"]
    assert names(root, root / "s*b" / "*") == ["sub/c 1.png", "sub/deep/d.png"]  # a folder that matches counts whole
    assert names(root, tmp_path / "M*" / "sub" / "*.png") == ["sub/c 1.png"]
    assert names(root, root / "**" / "*1.png") == ["b 1.png", "sub/c 1.png"]
    assert names(root, root / "**" / "deep") == names(root, root / "**" / "deep" / "**") == ["sub/deep/d.png"]
    assert names(root, root / ".*.png") == [".h.png"]
    assert sorted(names(root, root / "**")) == sorted(names(root, root)) and expand([root / "**"]).notes == ()


def test_a_file_that_is_named_like_a_pattern_comes_first(tmp_path: Path) -> None:
    for name in ("x[1].png", "x1.png", "set [2]/a.png", "set 2/b.png"):
        picture(tmp_path / name)
    assert names(tmp_path, tmp_path / "x[1].png") == ["x[1].png"]
    assert names(tmp_path, tmp_path / "set [2]" / "*.png") == ["set [2]/a.png"]
    (tmp_path / "x[1].png").unlink()
    assert names(tmp_path, tmp_path / "x[1].png") == ["x1.png"]


def test_a_pattern_leaves_other_files_aside_unless_it_spells_out_their_suffix(tmp_path: Path) -> None:
    for name in ("a.png", "scan.dat", "Thumbs.db"):
        picture(tmp_path / "a.png") if name == "a.png" else (tmp_path / name).write_bytes(b"x")
    inputs = expand([tmp_path / "*"])
    assert [path.name for path in inputs.files] == ["a.png"]
    assert inputs.notes == ("2 files skipped: hidden, or not named like an image",)
    assert names(tmp_path, tmp_path / "*.dat") == ["scan.dat"]
    assert f"no image matches {tmp_path / '[sT]*'}: found 1 x .db, 1 x .dat (supported:" in refused(tmp_path / "[sT]*")
    (tmp_path / "folder").mkdir()
    assert "1 folder without images" in refused(tmp_path / "fold*")


def test_a_pattern_without_match(tmp_path: Path) -> None:
    for i in range(2):
        picture(tmp_path / "parts" / f"image_{i}.png")
    message = refused(tmp_path / "parts" / "*.jpg")
    assert f"nothing matches {tmp_path / 'parts' / '*.jpg'}\n" in message and "found 2 x .png" in message
    assert f"did you mean {tmp_path / 'parts' / 'image_0.png'}?" in refused(tmp_path / "parts" / "imgae_*.png")
    assert f"did you mean {tmp_path / 'parts' / '*.png'}?" in refused(tmp_path / "part" / "*.png")
    assert f"nothing matches {tmp_path / 'parts' / '*.png' / '*'}" in refused(tmp_path / "parts" / "*.png" / "*")
