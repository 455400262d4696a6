"""Image files read one by one: what is known of each, and of those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.images import decoded_image as decoding
from fastmaf.images.decode import Frame, load_image
from fastmaf.inspection.workflow.inputs import read_each
from tests.images.pictures import picture
from tests.inspection.tiny import silent
from tests.inspection.workflow.expanded import expand, read_all


def test_damaged_files_are_named_and_do_not_stop_the_others(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "1 ganz.png")
    whole = (tmp_path / "1 ganz.png").read_bytes()
    (tmp_path / "2 Hälfte.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "3 text.png").write_text("hello")
    (tmp_path / "4 empty.png").write_bytes(b"")
    picture(tmp_path / "5 ganz.png")
    files = expand([tmp_path]).files
    first, *messages, last = read_all(files, 8)
    assert isinstance(first, Frame) and isinstance(last, Frame) and (first.path, last.path) == (files[0], files[4])
    for file, message, words in zip(files[1:4], messages, ("", "found none of these", "an empty file"), strict=True):
        assert isinstance(message, str) and str(file) in message and words in message
    assert read_all([], 8) == []


def test_files_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    reads = read_each([picture(tmp_path / "a.png"), tmp_path / "later.png"], 4, say=silent)
    next(reads)
    picture(tmp_path / "later.png")
    assert isinstance(next(reads), Frame)


def test_a_frame_is_what_load_image_reads_and_the_whole_image(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 256, (30, 50, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(values).save(path)
    (frame,) = read_all([path], 8, keep_full=True)
    assert isinstance(frame, Frame)
    assert frame.pixels.dtype == torch.uint8 and torch.equal(frame.pixels, load_image(path, 8)[0])
    assert (frame.height, frame.width) == (30, 50) and frame.notes == ()
    assert frame.full is not None and np.array_equal(frame.full.permute(1, 2, 0).numpy(), values)
    (frame,) = read_all([path], 8)
    assert isinstance(frame, Frame) and frame.full is None


def test_the_frame_of_an_image_is_the_one_that_its_exif_rotation_shows(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 20))  # width, height
    image.paste((255, 255, 255), (0, 0, 40, 10))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: white at the right
    image.save(tmp_path / "a.png", exif=exif)
    (frame,) = read_all([tmp_path / "a.png"], 8, keep_full=True)
    assert isinstance(frame, Frame) and frame.full is not None
    assert (frame.height, frame.width) == (40, 20) and frame.full.shape == (3, 40, 20)
    assert int(frame.full[:, :, 10:].min()) == 255 and int(frame.full[:, :, :10].max()) == 0
    assert int(frame.pixels[:, :, 5:].min()) > 230 and frame.notes == ("1 image turned by its EXIF orientation",)


def test_16_bit_grey_is_scaled_in_both_sizes(tmp_path: Path) -> None:
    values = np.array([[0, 257], [32768, 65535]], dtype=np.uint16).repeat(4, 0).repeat(4, 1)
    Image.fromarray(values).save(tmp_path / "a.png")
    (frame,) = read_all([tmp_path / "a.png"], 8, keep_full=True)
    assert isinstance(frame, Frame) and frame.full is not None
    assert frame.full[1, ::4, ::4].tolist() == [[0, 1], [128, 255]] and torch.equal(frame.full, frame.pixels)
    assert frame.notes == ("1 16-bit grey image scaled to 8 bits (value / 257)",)


def test_decoding_and_resizing_are_timed_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only the decoder and the resizing move."""
    now = [100.0]
    decode, resize = decoding.decode, Image.Image.resize

    def slow_decode(*arguments: object) -> object:
        now[0] += 4.0
        return decode(*arguments)  # type: ignore[arg-type]

    def slow_resize(image: Image.Image, *arguments: object) -> Image.Image:
        now[0] += 0.5
        return resize(image, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(decoding, "perf_counter", lambda: now[0])
    monkeypatch.setattr(decoding, "decode", slow_decode)
    monkeypatch.setattr(Image.Image, "resize", slow_resize)
    (frame,) = read_all([picture(tmp_path / "a.png")], 4)
    assert isinstance(frame, Frame) and (frame.decode_seconds, frame.resize_seconds) == (4.0, 0.5)


def test_size_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="size: expected at least 1"):
        read_all([picture(tmp_path / "a.png")], 0)
    (frame,) = read_all([tmp_path / "a.png"], 1)
    assert isinstance(frame, Frame) and frame.pixels.shape == (3, 1, 1)
