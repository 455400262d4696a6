"""Reading one image file: conversions by kind of image, and errors."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, PngImagePlugin

from fastmaf.images import image_file
from fastmaf.images.decode import DataError, load_image
from tests.images.pictures import png, refused


def png16(path: Path, values: np.ndarray) -> None:
    """Writes a 16-bit PNG of [h, w, 1..4 channels], of which Pillow can write grey ones only."""
    height, width, channels = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    png(path, rows, (width, height), 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels])


# ---- kinds of image


def test_resize_is_bilinear_with_antialiasing_straight_to_a_square(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 36, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels, notes = load_image(tmp_path / "a.png", 5)
    # Independently, as torchvision does on tensors; PIL rounds after each axis, so one grey level may differ.
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(values).permute(2, 0, 1)[None].float(), (5, 5), mode="bilinear", antialias=True
    )[0]
    assert pixels.shape == (3, 5, 5) and pixels.dtype == torch.uint8 and notes == []
    assert (pixels.float() - expected).abs().max() <= 1.5


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 128, 129, 257], [300, 5000, 32768, 40000], [65000, 65278, 65407, 65535], [1, 2, 3, 4]])
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values.astype(np.uint16)).save(path)
    pixels, notes = load_image(path, 4)
    assert pixels[0].tolist() == np.rint(values / 257).astype(int).tolist()
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    assert notes == ["1 16-bit grey image scaled to 8 bits (value / 257)"]


def test_big_endian_16_bit_tiff(tmp_path: Path) -> None:
    values = np.array([[0, 2570], [25700, 65535]])
    path = tmp_path / "a.tif"
    # A minimal big-endian TIFF: header, pixels, one directory.
    tags = [(256, 4, 2), (257, 4, 2), (258, 3, 16), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 2), (279, 4, 8)]
    entries = b"".join(
        struct.pack(">HHI", tag, kind, 1) + (struct.pack(">HH", v, 0) if kind == 3 else struct.pack(">I", v))
        for tag, kind, v in tags
    )
    path.write_bytes(
        b"MM\0*"
        + struct.pack(">I", 16)
        + values.astype(">u2").tobytes()
        + struct.pack(">H", len(tags))
        + entries
        + struct.pack(">I", 0)
    )
    assert load_image(path, 2)[0][0].tolist() == [[0, 10], [100, 255]]


def test_dark_16_bit_images_are_told_apart_from_12_bit_values(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 4095, dtype=np.uint16)).save(tmp_path / "a.png")
    pixels, notes = load_image(tmp_path / "a.png", 4)
    assert int(pixels.max()) == 16 and any("12-bit" in note for note in notes)


def test_float_and_32_bit_grey(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0.0, 0.5], [0.2, 1.0]], dtype=np.float32)).save(path)
    pixels, notes = load_image(path, 2)
    assert pixels[1].tolist() == [[0, 128], [51, 255]] and "floating-point" in notes[0]
    for bad in (300.0, -0.1, float("nan")):
        Image.fromarray(np.array([[0.0, bad]], dtype=np.float32)).save(path)
        assert "floating-point grey" in refused(path)
    Image.fromarray(np.array([[0, 65535], [257, 514]], dtype=np.int32)).save(path)
    pixels, notes = load_image(path, 2)
    assert pixels[0].tolist() == [[0, 255], [1, 2]] and "32-bit" in notes[0]
    for wrong in (70000, 200, -3):
        Image.fromarray(np.array([[0, wrong]], dtype=np.int32)).save(path)
        assert "unknown white level" in refused(path)


def test_16_bit_colour_keeps_the_high_byte(tmp_path: Path) -> None:
    values = np.random.default_rng(1).integers(0, 65536, (6, 6, 3))
    png16(tmp_path / "a.png", values)
    pixels, notes = load_image(tmp_path / "a.png", 6)
    assert np.array_equal(pixels.permute(1, 2, 0).numpy(), values // 256)
    assert np.abs(pixels.permute(1, 2, 0).numpy() - values / 257).max() < 1
    assert notes == ["1 16-bit colour image read at 8 bits (the high byte of each value)"]
    eight = np.random.default_rng(2).integers(0, 256, (6, 6, 3))
    png16(tmp_path / "b.png", eight * 257)
    assert np.array_equal(load_image(tmp_path / "b.png", 6)[0].permute(1, 2, 0).numpy(), eight)


def test_16_bit_colour_with_alpha(tmp_path: Path) -> None:
    values = np.zeros((2, 2, 4), dtype=np.int64)
    values[0, 0] = (65535, 0, 0, 65535)
    png16(tmp_path / "a.png", values)
    pixels, notes = load_image(tmp_path / "a.png", 2)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0] and pixels[:, 1, 1].tolist() == [255, 255, 255]
    assert len(notes) == 2


def test_grey_bilevel_and_cmyk(tmp_path: Path) -> None:
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    pixels, notes = load_image(tmp_path / "grey.png", 4)
    assert pixels.unique().tolist() == [77] and notes == ["1 grey image, with R = G = B"]
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert load_image(tmp_path / "bits.png", 4)[0].unique().tolist() == [255]
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    pixels, notes = load_image(tmp_path / "cmyk.jpg", 4)
    assert pixels[0].min() > 240 and pixels[1:].max() < 15 and "CMYK" in notes[0]


def test_alpha_is_composited_on_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 2), (100, 0, 0, 0))
    image.putpixel((0, 0), (100, 50, 0, 255))
    image.putpixel((1, 0), (100, 50, 0, 51))
    image.save(tmp_path / "a.png")
    pixels, notes = load_image(tmp_path / "a.png", 2)
    assert pixels[:, 0, 0].tolist() == [100, 50, 0]
    assert pixels[:, 1, 1].tolist() == [255, 255, 255]  # a plain convert("RGB") shows the hidden colour: 100, 0, 0
    assert (pixels[:, 0, 1].int() - torch.tensor([224, 214, 204])).abs().max() <= 1
    assert notes == ["1 image with an alpha channel composited on white"]
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "b.png")
    assert load_image(tmp_path / "b.png", 2)[0].unique().tolist() == [255]


def test_palette_with_transparency(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "plain.png")
    pixels, notes = load_image(tmp_path / "plain.png", 2)
    assert pixels[:, 0, 0].tolist() == [10, 200, 30] and notes == ["1 palette image read as RGB"]
    image.putpixel((1, 1), 0)
    image.save(tmp_path / "holes.png", transparency=0)
    pixels, notes = load_image(tmp_path / "holes.png", 2)
    assert pixels[:, 1, 1].tolist() == [255, 255, 255] and pixels[:, 0, 0].tolist() == [10, 200, 30]
    assert len(notes) == 2


@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "JPEG"), ("a.tif", "TIFF"), ("a.png", "PNG")])
def test_exif_orientation_is_applied_once_and_reported(tmp_path: Path, name: str, kind: str) -> None:
    image = Image.new("RGB", (16, 16), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 16, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the upper half is then at the right
    image.save(tmp_path / name, kind, exif=exif)
    pixels, notes = load_image(tmp_path / name, 16)
    assert int(pixels[:, :, 10:].min()) > 230 and int(pixels[:, :, :6].max()) < 25
    assert notes == ["1 image turned by its EXIF orientation"]


# ---- files that are refused


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "tif"])
@pytest.mark.parametrize("lenient", [False, True])
def test_truncated_files_are_refused(tmp_path: Path, kind: str, lenient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as another library may have set it
    values = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{kind}"
    Image.fromarray(values).save(path)
    whole = path.read_bytes()
    for part in (0.02, 0.4, 0.8):
        path.write_bytes(whole[: int(len(whole) * part)])
        refused(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_a_png_cut_anywhere_is_refused_or_complete(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(values).save(path)
    whole, good = path.read_bytes(), load_image(path, 12)[0]
    for end in range(0, len(whole), 7):
        path.write_bytes(whole[:end])
        try:
            pixels, _ = load_image(path, 12)
        except DataError:
            continue
        assert torch.equal(pixels, good)


def test_files_that_are_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_text("hello, this is text")
    message = refused(path)
    assert message.endswith("expected PNG, JPEG, BMP, TIFF or WebP, found none of these")  # without any of the content
    path.write_bytes(b"")
    assert "empty file" in refused(path)
    Image.new("RGB", (4, 4)).save(path, "GIF")  # an image in a format that is not read
    assert refused(path).endswith("found GIF")
    path.unlink()
    assert "No such file" in refused(path)
    path.mkdir()
    refused(path)


def test_pixel_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert image_file.MAX_PIXELS < 89_478_485  # below the size at which Pillow starts to warn
    path = tmp_path / "a.png"
    Image.new("L", (100, 101)).save(path)
    monkeypatch.setattr(image_file, "MAX_PIXELS", 100 * 100)
    assert "100 x 101 = 10,100 pixels; expected at most 10,000" in refused(path)
    # A bomb beyond Pillow's own limit: refused from its header alone.
    png(path, bytes(50), (40000, 40000), 8, 2)
    assert "DecompressionBomb" in refused(path)


def test_damaged_text_chunks_do_not_escape_as_other_errors(tmp_path: Path) -> None:
    """Pillow refuses a PNG whose text would unpack to a huge size with a ValueError of its own."""
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * (PngImagePlugin.MAX_TEXT_CHUNK + 10), zip=True)
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, pnginfo=info)
    refused(path)
