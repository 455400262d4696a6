"""Images of which a part is missing or damaged, and values that need another interpretation."""

from __future__ import annotations

import io
import struct
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, TiffImagePlugin

from fastmaf.images.decode import DataError, load_frame, load_image
from tests.images.pictures import chunk, png, refused


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


# ---- a part is missing

JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"quality": 90, "subsampling": 0},
    "4:2:0": {"quality": 90, "subsampling": 2},
    "progressive": {"quality": 90, "progressive": True},
    "restarts": {"quality": 90, "restart_marker_blocks": 5},
    "restarts at rows": {"quality": 90, "restart_marker_rows": 1, "subsampling": 2},
}


def jpegs(mode: str, options: dict[str, Any], smooth: bool = False) -> bytes:
    values = noise(72, 107, {"L": 1, "RGB": 3, "CMYK": 4}[mode]).squeeze()
    image = Image.fromarray(values, mode) if not smooth else Image.linear_gradient("L").resize((107, 72)).convert(mode)
    image.save(stream := io.BytesIO(), "JPEG", **options)
    return stream.getvalue()


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("smooth", [False, True])
def test_a_jpeg_cut_short_with_an_end_marker_is_refused(
    tmp_path: Path, mode: str, options: dict[str, Any], smooth: bool
) -> None:
    path = tmp_path / "a.jpg"
    whole = jpegs(mode, options, smooth)
    path.write_bytes(whole)
    expected = np.asarray(Image.open(path).convert("RGB"))
    full = load_frame(path, 4, keep_full=True).full
    assert full is not None and np.array_equal(full.permute(1, 2, 0).numpy(), expected)
    data = whole.rindex(b"\xff\xda") if not options.get("progressive") else whole.index(b"\xff\xda")
    for part in (0.05, 0.3, 0.5, 0.9):
        cut = whole[: data + 20 + int((len(whole) - data - 20) * part)].rstrip(b"\xff")
        path.write_bytes(cut + b"\xff\xd9")
        refused(path)


def test_grey_jpegs_that_are_whole_are_read(tmp_path: Path) -> None:
    """libjpeg fills in the same grey where data are missing."""
    for mode in ("L", "RGB"):
        for size in ((64, 64), (7, 5), (17, 33)):
            Image.new(mode, size, "#808080").save(tmp_path / "a.jpg")
            assert load_image(tmp_path / "a.jpg", 4)[0].unique().tolist() == [128]
    path = tmp_path / "more.jpg"  # some cameras append data after the end
    path.write_bytes((tmp_path / "a.jpg").read_bytes() + noise(5000).tobytes())
    assert load_image(path, 4)[0].unique().tolist() == [128]


@pytest.mark.parametrize("bits", [8, 16])
def test_a_png_whose_compressed_stream_ends_too_soon_is_refused(tmp_path: Path, bits: int) -> None:
    row = b"\0" + bytes(range(1, 11)) * 3 * (bits // 8)
    png(tmp_path / "a.png", row * 12, (10, 12), bits, 2)
    load_image(tmp_path / "a.png", 4)
    for rows in (0, 5, 11):
        png(tmp_path / "a.png", row * rows, (10, 12), bits, 2)
        assert "data end before the last" in refused(tmp_path / "a.png")
    png(tmp_path / "a.png", b"\0" * len(row) * 12, (10, 12), bits, 2)
    assert load_image(tmp_path / "a.png", 4)[0].max() == 0  # black is not missing


def test_an_interlaced_png(tmp_path: Path) -> None:
    values = noise(13, 21)
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [values[y::dy, x::dx] for y, x, dy, dx in starts]
    raw = b"".join(b"\0" + row.tobytes() for part in passes for row in part)
    png(tmp_path / "a.png", raw, (21, 13), 8, 0, interlaced=1)
    full = load_frame(tmp_path / "a.png", 4, keep_full=True).full
    assert full is not None and np.array_equal(full[0].numpy(), values)
    png(tmp_path / "a.png", raw[: len(raw) // 2], (21, 13), 8, 0, interlaced=1)
    refused(tmp_path / "a.png")
    png(tmp_path / "a.png", bytes(len(raw)), (21, 13), 8, 0, interlaced=1)
    assert load_image(tmp_path / "a.png", 4)[0].max() == 0


@pytest.mark.parametrize("lenient", [False, True])
def test_damage_is_refused_whatever_pillows_settings_are(
    tmp_path: Path, lenient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    path = tmp_path / "a.png"
    png(path, (b"\0" + bytes(30)) * 6 + (b"\x09" + bytes(30)) * 6, (10, 12), 8, 2)  # there is no filter 9
    refused(path)
    Image.fromarray(noise(64, 64, 3)).save(path)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2 :] = b"\x55" * (len(whole) - len(whole) // 2)
    path.write_bytes(whole)
    refused(path)
    Image.fromarray(noise(64, 64, 3)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-2])  # a missing end marker is not added either
    refused(path)


def test_threads_leave_pillows_settings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    Image.fromarray(noise(200, 200, 3)).save(whole := tmp_path / "a.jpg")
    (cut := tmp_path / "b.jpg").write_bytes(whole.read_bytes()[:5000])
    seen = set()

    def read(i: int) -> bool:
        seen.add(ImageFile.LOAD_TRUNCATED_IMAGES)
        try:
            load_image((whole, cut)[i % 2], 16)
        except DataError:
            return False
        finally:
            seen.add(ImageFile.LOAD_TRUNCATED_IMAGES)
        return True

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(read, range(200))) == [True, False] * 100
    finally:
        sys.setswitchinterval(before)
    assert seen == {True}


# ---- pages and frames


def test_the_other_pages_of_a_tiff_are_not_even_looked_for(tmp_path: Path) -> None:
    """The second page is damaged: reading it would fail."""
    pages = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "lime")]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    content = bytearray((tmp_path / "a.tif").read_bytes())
    (first,) = struct.unpack("<I", content[4:8])
    (entries,) = struct.unpack("<H", content[first : first + 2])
    (second,) = struct.unpack("<I", content[first + 2 + 12 * entries :][:4])
    content[second : second + 2] = b"\xff\xff"
    (tmp_path / "a.tif").write_bytes(content)
    pixels, notes = load_image(tmp_path / "a.tif", 4)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0]
    assert notes == ["1 image with several frames or pages: only the first is read"]


def test_a_tiff_of_many_pages_reads_one_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pages = [Image.new("L", (2, 2), i) for i in range(50)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    load, places = TiffImagePlugin.ImageFileDirectory_v2.load, set()

    def counted(self: Any, file: Any) -> None:
        places.add(file.tell())
        load(self, file)

    monkeypatch.setattr(TiffImagePlugin.ImageFileDirectory_v2, "load", counted)
    assert load_image(tmp_path / "a.tif", 4)[0].unique().tolist() == [0]
    assert len(places) == 1


def test_the_first_frame_of_an_animated_png(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    pixels, notes = load_image(tmp_path / "a.png", 4)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0] and "only the first" in notes[0]


# ---- damaged EXIF data


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "progressive.jpg"])
@pytest.mark.parametrize("exif", [b"Exif\0\0damaged", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"nonsense"])
def test_pixels_are_read_whatever_the_exif_data_are(tmp_path: Path, name: str, exif: bytes) -> None:
    image = Image.fromarray(noise(16, 16, 3))
    image.save(tmp_path / f"plain-{name}", progressive="prog" in name)
    image.save(tmp_path / name, exif=exif, progressive="prog" in name)
    pixels, notes = load_image(tmp_path / name, 16)
    assert torch.equal(pixels, load_image(tmp_path / f"plain-{name}", 16)[0])
    if exif == b"Exif\0\0damaged":
        assert notes == ["1 image with damaged EXIF data, read without its orientation"]


def test_a_tiff_whose_exif_directory_is_damaged(tmp_path: Path) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[0x8769] = 0x7FFFFFF0  # the offset of the EXIF data
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.tif", tiffinfo=info)
    assert load_image(tmp_path / "a.tif", 4)[0][:, 0, 0].tolist() == [255, 0, 0]


# ---- values that need another interpretation


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_8_bit_values_in_16_bits_are_reported_and_scaled_as_all_others(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(8, 8).astype(np.uint16)).save(path)
    pixels, notes = load_image(path, 8)
    assert pixels.max() <= 1
    assert notes[0] == "1 16-bit grey image scaled to 8 bits (value / 257)"
    assert "almost black image" in notes[1] and "save 8-bit values with 8 bits" in notes[1]


def test_8_and_12_bit_values_in_16_bit_colour_and_floats_are_reported(tmp_path: Path) -> None:
    for high, expected in ((255, "no value above 255"), (4095, "no value above 4095"), (65535, None)):
        values = np.random.default_rng(0).integers(0, high + 1, (8, 8, 3))
        values[0, 0] = high
        raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
        png(tmp_path / "a.png", raw, (8, 8), 16, 2)
        notes = load_image(tmp_path / "a.png", 8)[1]
        assert [expected in note for note in notes[:-1]] == [True] if expected else len(notes) == 1
    Image.fromarray(np.array([[0.0, 0.003]], dtype=np.float32)).save(tmp_path / "a.tif")
    assert "almost black" in load_image(tmp_path / "a.tif", 2)[1][0]


@pytest.mark.parametrize("kind", ["u2", "f4"])
def test_a_tiff_whose_white_is_zero(tmp_path: Path, kind: str) -> None:
    white = {"u2": 65535, "f4": 1}[kind]
    values = (np.array([[0, 0.2], [0.6, 1]]) * white).astype(kind)
    info = TiffImagePlugin.ImageFileDirectory_v2()
    Image.fromarray(values).save(tmp_path / "a.tif", tiffinfo=info)
    content = bytearray((tmp_path / "a.tif").read_bytes())
    at = content.index(struct.pack("<HHI", 262, 3, 1))
    content[at + 8 : at + 10] = b"\0\0"
    (tmp_path / "a.tif").write_bytes(content)
    assert load_image(tmp_path / "a.tif", 2)[0][0].tolist() == [[255, 204], [102, 0]]


def test_a_transparent_value_of_16_bit_images(tmp_path: Path) -> None:
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in np.array([[1000, 25700], [1001, 65535]]))
    png(tmp_path / "a.png", raw, (2, 2), 16, 0, chunk(b"tRNS", struct.pack(">H", 1000)))
    pixels, notes = load_image(tmp_path / "a.png", 2)
    assert pixels[0].tolist() == [[255, 100], [4, 255]] and "composited on white" in notes[-1]
    values = np.array([[[0x1000, 0x2000, 0x3000], [0x6400, 0x6400, 0x6400]]])
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    png(tmp_path / "a.png", raw, (2, 1), 16, 2, chunk(b"tRNS", struct.pack(">HHH", 0x1000, 0x2000, 0x3000)))
    assert load_frame(tmp_path / "a.png", 2, keep_full=True).full[:, 0].T.tolist() == [[255] * 3, [100] * 3]  # type: ignore[index]


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (0, 0)])
def test_images_without_pixels_are_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    png(tmp_path / "a.png", b"\0" * 20, size, 8, 2)
    refused(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.bmp")
    content = bytearray((tmp_path / "a.bmp").read_bytes())
    content[18:26] = struct.pack("<II", *size)
    (tmp_path / "a.bmp").write_bytes(content)
    refused(tmp_path / "a.bmp")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_text_and_profiles_that_unpack_to_a_huge_size_are_refused(tmp_path: Path, kind: bytes) -> None:
    bomb = zlib.compress(bytes(100_000_000))
    head = {b"zTXt": b"a\0\0", b"iTXt": b"a\0\1\0\0\0", b"iCCP": b"a\0\0"}[kind]
    png(tmp_path / "a.png", b"\0" * 4 * 4, (1, 4), 8, 2, chunk(kind, head + bomb))
    refused(tmp_path / "a.png")


# ---- reading is interrupted


@pytest.mark.parametrize("form", ["PNG", "JPEG", "progressive", "BMP", "TIFF", "WEBP"])
def test_ctrl_c_at_any_read_is_not_taken_for_a_damaged_file(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"format": "JPEG", "progressive": True} if form == "progressive" else {"format": form}
    Image.fromarray(noise(40, 50, 3)).save(content := io.BytesIO(), **options)

    class Interrupted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            nonlocal reads
            reads += 1
            if reads == interrupted_at:
                raise KeyboardInterrupt
            return super().read(size)

    monkeypatch.setattr("fastmaf.images.image_file.open_regular", lambda path: Interrupted(content.getvalue()))
    reads = interrupted_at = 0
    load_image("image", 8)
    most = reads
    assert most > 1
    for number in range(1, most + 1):
        reads, interrupted_at = 0, number
        with pytest.raises(KeyboardInterrupt):
            load_image("image", 8)


def test_a_failure_to_read_is_not_taken_for_missing_data(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(400, 500, 3)).save(content := io.BytesIO(), format="BMP")

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell() > 100_000:
                raise OSError(5, "Input/output error")
            return super().read(size)

    monkeypatch.setattr("fastmaf.images.image_file.open_regular", lambda path: Failing(content.getvalue()))
    with pytest.raises(DataError, match="image: .*Input/output error"):
        load_image("image", 8)
