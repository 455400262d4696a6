"""WebP images: lossy, lossless, with an alpha channel, turned, animated, cut short, and far too large."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, features

from fastmaf.images.dataset import load_train
from fastmaf.images.decode import load_frame, load_image
from tests.images.pictures import refused

pytestmark = pytest.mark.skipif(not features.check("webp"), reason="this Pillow was built without WebP")
VALUES = np.random.default_rng(0).integers(0, 256, (24, 37, 4), dtype=np.uint8)


def webp(mode: str = "RGB", **options: Any) -> bytes:
    Image.fromarray(VALUES).convert(mode).save(stream := io.BytesIO(), "WEBP", **options)
    return stream.getvalue()


def test_lossless_values_are_those_of_the_image(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(webp(lossless=True))
    frame = load_frame(path, 8, keep_full=True)
    assert frame.full is not None and frame.notes == ()
    assert np.array_equal(frame.full.permute(1, 2, 0).numpy(), VALUES[..., :3])
    Image.fromarray(VALUES[..., :3]).save(tmp_path / "a.png")
    assert torch.equal(frame.pixels, load_image(tmp_path / "a.png", 8)[0])


def test_an_alpha_channel_and_an_orientation(tmp_path: Path) -> None:
    path = tmp_path / "a.webp"
    path.write_bytes(webp("RGBA", lossless=True, exact=True))
    Image.fromarray(VALUES).save(tmp_path / "a.png")
    pixels, notes = load_image(path, 8)
    assert torch.equal(pixels, load_image(tmp_path / "a.png", 8)[0]) and "alpha channel" in notes[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    path.write_bytes(webp(lossless=True, exif=exif))
    frame = load_frame(path, 8)
    assert (frame.height, frame.width) == (37, 24) and "EXIF orientation" in frame.notes[0]


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    pixels, notes = load_image(tmp_path / "a.webp", 4)
    assert pixels[:, 0, 0].tolist() == [255, 0, 0] and "only the first" in notes[0]


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"quality": 80, "exif": b"Exif\0\0II*\0"}])
def test_a_file_cut_short_is_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, path = webp(**options), tmp_path / "a.webp"
    for part in (0, 1, 11, 15, 29, 40, len(whole) // 2, len(whole) * 9 // 10, len(whole) - 20):
        path.write_bytes(whole[:part])
        refused(path)


@pytest.mark.parametrize("chunk", [
    b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\xff\xff" * 2,
    b"VP8L" + struct.pack("<I", 10) + b"\x2f" + struct.pack("<I", 0x0FFF_FFFF) + bytes(5),
    b"VP8 " + struct.pack("<I", 10) + b"\0\0\0\x9d\x01\x2a" + struct.pack("<HH", 16383, 16383),
])  # fmt: skip
def test_a_size_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: bytes
) -> None:
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("Pillow has opened it"))
    (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunk)) + b"WEBP" + chunk)
    assert "pixels; expected at most 64,000,000" in refused(tmp_path / "a.webp")


def test_a_folder_of_webp_images_is_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "train" / "good").mkdir(parents=True)
    (tmp_path / "train" / "good" / "a.webp").write_bytes(webp())
    (tmp_path / "train" / "good" / "b.WebP").write_bytes(webp(lossless=True))
    assert load_train(tmp_path, size=4, progress=False).names == ("a.webp", "b.WebP")
