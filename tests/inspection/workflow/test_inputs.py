"""Which files the arguments of ``fastmaf inspect score`` stand for."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
from PIL import Image

from fastmaf.images.decode import DataError, Frame
from fastmaf.images.listing import following_links
from tests.images.pictures import picture
from tests.inspection.workflow.expanded import expand, read_all


def names(root: Path, *arguments: str | Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in expand(arguments).files]


def refused(*arguments: str | Path, stdin: io.TextIOBase | None = None) -> str:
    with pytest.raises(DataError) as caught:
        expand(arguments, stdin=stdin)
    return str(caught.value)


def link(path: Path, target: Path) -> None:
    try:
        path.symlink_to(target, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("no symbolic links here")


# ---- files and folders


def test_order_is_kept_and_a_file_comes_once(tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "more/c.png"):
        picture(tmp_path / name)
    b, a = tmp_path / "b.png", tmp_path / "a.png"
    inputs = expand([b, str(a), tmp_path / "more" / ".." / "b.png", tmp_path])
    assert [path.name for path in inputs.files] == ["b.png", "a.png", "c.png"]
    assert inputs.files[:2] == (b, a)
    assert inputs.notes == ("3 duplicate files skipped",)
    assert expand([b]).notes == ()


def test_a_link_to_a_file_is_that_file(tmp_path: Path) -> None:
    file = picture(tmp_path / "a.png")
    link(tmp_path / "b.png", file)
    inputs = expand([tmp_path])
    assert inputs.files == (file,) and inputs.notes == ("1 duplicate file skipped",)


def test_a_folder_is_read_with_all_below_it_sorted(tmp_path: Path) -> None:
    root = tmp_path / "Prüfung 検査 (2)"
    for name in ("z.png", "a/ü b.JPG", "a/deep/x.tif", "m.Bmp"):
        picture(root / name)
    for name in ("notes.txt", ".hidden.png", "a/Thumbs.db", "a/._ü b.JPG", ".cache/c.png"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    assert names(root, root) == ["a/deep/x.tif", "a/ü b.JPG", "m.Bmp", "z.png"]
    assert expand([root]).files == tuple(sorted(expand([root]).files))
    assert expand([root]).notes == ("4 files skipped: hidden, or not named like an image",)


def test_a_named_file_is_tried_whatever_its_name(tmp_path: Path) -> None:
    odd, hidden = tmp_path / "scan.dat", tmp_path / ".hidden.png"
    for path in (odd, hidden):
        Image.new("RGB", (4, 4)).save(path, "PNG")
    inputs = expand([odd, hidden])
    assert inputs.files == (odd, hidden) and inputs.notes == ()
    assert all(isinstance(read, Frame) for read in read_all(inputs.files, 4))


def test_links_between_folders_lead_into_no_loop(tmp_path: Path) -> None:
    picture(tmp_path / "a" / "1.png")
    picture(tmp_path / "elsewhere" / "2.png")
    link(tmp_path / "a" / "up", tmp_path)
    link(tmp_path / "a" / "again", tmp_path / "a")
    for arguments in ([tmp_path / "a"], [tmp_path / "a" / "**" / "*.png"], [tmp_path / "**"]):
        with following_links():
            inputs = expand(arguments)
        assert sorted(path.name for path in inputs.files) == ["1.png", "2.png"] and inputs.notes == ()


def test_a_link_that_leads_nowhere_is_left_aside_in_a_folder_and_to_the_reader_when_named(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    link(tmp_path / "b.png", tmp_path / "gone.png")
    link(tmp_path / "c.png", tmp_path / "c.png")
    inputs = expand([tmp_path])
    assert [path.name for path in inputs.files] == ["a.png"]
    assert inputs.notes[0].startswith("2 paths skipped: named like images, but not regular files (b.png is a link to")
    files = expand([tmp_path / name for name in ("a.png", "b.png", "c.png")]).files
    assert [type(read) for read in read_all(files, 4)] == [Frame, str, str]


def test_home_and_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    for variable in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(variable, str(tmp_path))
    assert expand(["~/a.png"]).files == expand(["~/*.png"]).files == (tmp_path / "a.png",)
    monkeypatch.chdir(tmp_path)
    for argument in (".", "a.png", "*.png", "**"):
        assert expand([argument]).files == (Path("a.png"),)
    Path("~").mkdir()
    picture(Path("~", "b.png"))
    assert expand(["~"]).files == (Path("~", "b.png"),)  # a folder of that very name comes first


def test_an_argument_that_stands_for_nothing_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("gut/bild_001.png", "gut/bild_002.png", "gut/notes.txt", "schlecht/x.png"):
        picture(tmp_path / name) if name.endswith("png") else (tmp_path / name).write_text("x")
    wanted = tmp_path / "gut" / "bild_01.png"
    message = refused(wanted)
    assert f"no such file or folder: {wanted}\n" in message
    assert f"did you mean {tmp_path / 'gut' / 'bild_001.png'}?" in message
    assert f"did you mean {tmp_path / 'gut'}?" in refused(tmp_path / "gutt")
    assert f"did you mean {tmp_path / 'schlecht' / 'x.png'}?" in refused(tmp_path / "schlect" / "x.png")
    assert f"did you mean {tmp_path / 'schlecht'}?" in refused(tmp_path / "schlect" / "nothing.png")
    message = refused(tmp_path / "gut" / "completely different")
    assert f"in {tmp_path / 'gut'}: found 2 x .png, 1 x .txt" in message and "did you mean" not in message
    assert f"{wanted.with_name('bild_001.png')} is a file" in refused(wanted.with_name("bild_001.png") / "x.png")
    monkeypatch.chdir(tmp_path)
    assert f"in {tmp_path}: no files, 2 folders" in refused("completely different")
    assert "did you mean gut?" in refused("./gutt")


def test_a_folder_without_an_image(tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    assert refused(folder) == f"no image in {folder}: it is empty"
    (folder / "below").mkdir()
    for name in ("a.jxl", "below/b.jxl"):
        (folder / name).write_bytes(b"x")
    assert f"no image in {folder}: found 2 x .jxl (supported: .png" in refused(folder)
    (folder / ".b.png").write_bytes(b"x")
    assert "1 x .b.png" in refused(folder)  # hidden: "1 x .png (supported: .png" would be no help
    picture(folder / "below" / "c.png")
    assert names(folder, folder) == ["below/c.png"]


def test_a_folder_that_cannot_be_opened_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "closed")  # root may open all
    inputs = expand([tmp_path])
    assert len(inputs.files) == 1 and inputs.notes == (
        f"1 folder could not be opened (no permission): {tmp_path / 'closed'}",
    )
    assert "it cannot be opened" in refused(tmp_path / "closed")


def test_nothing_given() -> None:
    assert "expected image files" in refused()
    assert "an empty path" in refused("")  # not the folder one is in: "$UNSET" is a mistake


# ---- a list on standard input


class Bytes(io.TextIOWrapper):
    """Standard input as it is with another encoding than the list's."""

    def __init__(self, content: bytes) -> None:
        super().__init__(io.BytesIO(content), encoding="ascii")


def test_a_list_on_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ü 1.png", "b.png", "[x]*.png", "folder/c.png", "first.png"):
        picture(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    text = "\ufeffü 1.png\r\n\r\n  \nb.png\n[x]*.png\nfolder\nb.png"
    expected = ["first.png", "ü 1.png", "b.png", "[x]*.png", "folder/c.png"]
    for stdin in (io.StringIO(text), Bytes(text.encode())):
        inputs = expand(["first.png", "-"], stdin=stdin)
        assert [path.as_posix() for path in inputs.files] == expected
        assert inputs.notes == ("1 duplicate file skipped",)
    monkeypatch.setattr("sys.stdin", Bytes(b"b.png\n"))
    assert expand(["-", "first.png"]).files == (Path("b.png"), Path("first.png"))


@pytest.mark.skipif(os.name == "nt", reason="file names are no bytes there")
def test_names_on_stdin_that_are_no_utf8_or_hold_other_line_breaks(tmp_path: Path) -> None:
    picture(tmp_path / "a\x85b\u2028.png")
    try:
        os.rename(picture(tmp_path / "x.png"), os.fsencode(tmp_path) + b"/latin\xfc.png")
    except OSError:
        pytest.skip("this file system holds no other names than UTF-8")
    listed = b"\n".join(os.fsencode(tmp_path) + name for name in (b"/latin\xfc.png", "/a\x85b\u2028.png".encode()))
    files = expand(["-"], stdin=Bytes(listed)).files
    assert [path.name for path in files] == ["latin\udcfc.png", "a\x85b\u2028.png"]
    assert all(isinstance(read, Frame) for read in read_all(files, 4))


def test_listed_files_that_are_gone_are_left_to_the_reader_unless_all_are(tmp_path: Path) -> None:
    file = picture(tmp_path / "bild_1.png")
    files = expand(["-"], stdin=io.StringIO(f"{tmp_path / 'gone.png'}\n{file}\na\0b\n")).files
    reads = read_all(files, 4)
    assert [type(read) for read in reads] == [str, Frame, str] and "gone.png" in str(reads[0])
    message = refused("-", stdin=io.StringIO(f"{tmp_path / 'bild_2.png'}\nx\n"))
    assert "none of its 2 paths exists" in message and f"did you mean {file}?" in message


def test_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    for empty in ("", "\n \r\n"):
        assert "no file name on standard input" in refused("-", stdin=io.StringIO(empty))
    monkeypatch.setattr("sys.stdin", None)
    assert "no standard input" in refused("-")
