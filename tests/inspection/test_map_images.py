"""Maps in the image's frame: resizing, colours, and files that give the numbers back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmaf.inspection.legend import NARROWEST
from fastmaf.inspection.map_images import SCALE, UNIT, contour_level, overlay, to_frame, write_map, write_overlay


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 8, shape).astype(np.float32)


def read(path: Path) -> np.ndarray:
    """The values of a map's file, as its text chunks describe them."""
    with Image.open(path) as image:
        return np.asarray(image) / float(image.info.get("Scale", 1.0))


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (100, 37), (7, 201), (1, 1), (129, 1)])
@pytest.mark.parametrize("side", [1, 5, 64])
def test_to_frame_is_bilinear_with_half_pixel_centres(side: int, shape: tuple[int, int]) -> None:
    values = noise(side, side)
    result = to_frame(values, shape)
    exact = torch.from_numpy(values).double()[None, None]
    expected = torch.nn.functional.interpolate(exact, shape, mode="bilinear")[0, 0]
    assert result.dtype == np.float32 and result.shape == shape
    np.testing.assert_allclose(result, expected, atol=2e-6)
    assert result.min() >= values.min() and result.max() <= values.max()


def test_to_frame_keeps_places() -> None:
    values = np.zeros((8, 8), dtype=np.float32)
    values[2, 5] = 1
    result = to_frame(values, (80, 160))
    at = np.argwhere(result > 0.9).mean(axis=0)
    np.testing.assert_allclose(at, [24.5, 109.5])


@pytest.mark.parametrize("name", ["map.png", "map.TIFF", "Prüf bild 1.tif", "neu/Ordner/map.PNG"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (65, 64)])
def test_maps_come_back(tmp_path: Path, name: str, shape: tuple[int, int]) -> None:
    values = np.abs(noise(*shape))
    write_map(tmp_path / name, values)
    result = read(tmp_path / name)
    assert result.shape == shape
    if name.lower().endswith("png"):
        assert np.abs(result - values).max() <= 0.5 / SCALE + 1e-6
        assert Image.open(tmp_path / name).mode.startswith("I")
    else:
        np.testing.assert_array_equal(result, values)
    assert [p.name for p in (tmp_path / name).parent.iterdir()] == [Path(name).name]  # nothing temporary is left


def test_png_follows_its_own_description_and_clips(tmp_path: Path) -> None:
    values = np.array([[-1e9, -2.5, 0.0, 0.125, 2.5, 1e9, np.inf, -np.inf]])
    write_map(tmp_path / "m.png", values)
    with Image.open(tmp_path / "m.png") as image:
        text, levels = dict(image.info), np.asarray(image).astype(int)
    assert text["Unit"] == UNIT and text["Description"] == "anomaly map: value = level / 512.0"
    most = 65535 / SCALE
    np.testing.assert_array_equal(levels / float(text["Scale"]), [[0, 0, 0, 0.125, 2.5, most, most, 0]])


def test_tiff_keeps_everything_and_says_its_unit(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf, -np.inf, 1e-30, 3e38]], dtype=np.float32)
    write_map(tmp_path / "m.tif", values)
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), values)
    with Image.open(tmp_path / "m.tif") as image:
        assert image.mode == "F" and UNIT in image.tag_v2[270]


def test_what_cannot_be_written_is_said_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.png, \.tif or \.tiff; found \.jpg"):
        write_map(tmp_path / "m.jpg", noise(2, 2))
    with pytest.raises(ValueError, match="no suffix"):
        write_map(tmp_path / "m", noise(2, 2))
    with pytest.raises(ValueError, match="NaN"):
        write_map(tmp_path / "m.png", np.array([[np.nan]]))
    for shape in ((2,), (0, 3), (1, 2, 3)):
        with pytest.raises(ValueError, match="map must be"):
            write_map(tmp_path / "m.png", np.zeros(shape))
    with pytest.raises(ValueError, match=r"\.png; found \.jpg"):
        write_overlay(tmp_path / "o.jpg", picture(2, 2), noise(2, 2), 0, 1, score=1, threshold=2)
    assert not list(tmp_path.iterdir())


def test_an_existing_map_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    values = noise(5, 5)
    write_map(tmp_path / "m.tif", values)
    with pytest.raises(ValueError):
        write_map(tmp_path / "m.tif", np.zeros((0, 5)))
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), values)
    write_map(tmp_path / "m.tif", values + 1)
    np.testing.assert_array_equal(read(tmp_path / "m.tif"), values + 1)


def test_overlay_leaves_what_is_low_and_is_more_opaque_with_the_value() -> None:
    image, values = picture(30, 40), np.tile(np.linspace(-1, 3, 40, dtype=np.float32), (30, 1))
    before = image.copy()
    result = overlay(image, values, low=0.0, high=2.0)
    np.testing.assert_array_equal(image, before)
    assert result.dtype == np.uint8 and result.shape == image.shape
    low = values <= 0
    np.testing.assert_array_equal(result[low], image[low])
    assert (result[~low & (values > 0.1)] != image[~low & (values > 0.1)]).any(axis=1).all()
    black, white = (overlay(np.full_like(image, level), values, low=0.0, high=2.0)[0].astype(int) for level in (0, 255))
    kept = (white - black).mean(axis=1) / 255  # what is left of the image
    assert (np.diff(kept) <= 0.01).all() and kept[0] == 1 and 0.5 < kept[-1] < 0.6
    lightness = black @ [0.2126, 0.7152, 0.0722]
    assert (np.diff(lightness[values[0] > 0]) >= -0.5).all()
    np.testing.assert_array_equal(black[values[0] >= 2], np.tile(black[-1], ((values[0] >= 2).sum(), 1)))


def test_overlay_shows_on_black_white_and_the_colours_between() -> None:
    values = np.full((4, 4), 9.0)
    for level in (0, 90, 160, 255):
        image = np.full((4, 4, 3), level, dtype=np.uint8)
        change = overlay(image, values, low=0, high=1).astype(int) - image
        assert np.abs(change).max() > 60


def test_overlay_at_infinity_and_its_errors() -> None:
    image = picture(2, 3)
    result = overlay(image, np.array([[np.inf, 1, 0], [-np.inf, 0, 5]]), low=0, high=1)
    np.testing.assert_array_equal(result[1, :2], image[1, :2])
    same = np.full_like(image, 77)
    result = overlay(same, np.array([[np.inf, 1, 0], [-np.inf, 0, 5]]), low=0, high=1)
    np.testing.assert_array_equal(result[0, 0], result[0, 1])
    with pytest.raises(ValueError, match="NaN"):
        overlay(image, np.array([[np.nan, 1, 0], [1, 0, 5]]), low=0, high=1)
    with pytest.raises(ValueError, match=r"\[2, 3\]; found \[3, 2\]"):
        overlay(image, np.zeros((3, 2)), low=0, high=1)
    for low, high in ((1, 1), (2, 1), (float("nan"), 1), (0, float("inf"))):
        with pytest.raises(ValueError, match="low < high"):
            overlay(image, np.zeros((2, 3)), low=low, high=high)
    for bad in (image.astype(float), image[..., 0], image[:0]):
        with pytest.raises(ValueError, match="uint8"):
            overlay(bad, np.zeros(bad.shape[:2]), low=0, high=1)


def test_a_contour_surrounds_the_region_on_dark_and_bright_images() -> None:
    values = np.zeros((40, 40), np.float32)
    values[15:25, 10:30] = 5
    for level in (0, 128, 255):
        image = np.full((40, 40, 3), level, np.uint8)
        plain = overlay(image, values, low=1, high=9)
        result = overlay(image, values, low=1, high=9, contour=4.0)
        np.testing.assert_array_equal(result[15:25, 10:30], plain[15:25, 10:30])  # the region itself stays visible
        np.testing.assert_array_equal(result[12:28, 20, 0], [level, 0, 255, *plain[15:25, 20, 0], 255, 0, level])
    np.testing.assert_array_equal(overlay(image, values, low=1, high=9, contour=5.0), plain)  # nothing above


def test_the_level_of_a_contour() -> None:
    low, high = np.full((2, 2), 3.0), np.array([[0.0, 9.0], [1.0, 2.0]])
    assert contour_level(low, 8.0, anomalous=True) == 1.5 and contour_level(low, 8.0, anomalous=False) is None
    assert contour_level(high, 4.0, anomalous=True) == contour_level(high, 4.0, anomalous=False) == 4
    assert contour_level(np.zeros((2, 2)), 4.0, anomalous=True) is None


@pytest.mark.parametrize(("shape", "factor"), [((600, 310), 1), ((50, 31), 10), ((7, 300), 1)])
def test_write_overlay_draws_the_overlay_above_its_legend(tmp_path: Path, shape: tuple[int, int], factor: int) -> None:
    image, values = picture(*shape), np.abs(to_frame(noise(8, 8), shape))
    for score in (2.0, 4.0):
        write_overlay(tmp_path / "ä b.png", image, values, 0.5, 9.0, score=score, threshold=3.0)
        with Image.open(tmp_path / "ä b.png") as file:
            result = np.asarray(file)
        large = np.kron(image, np.ones((factor, factor, 1), np.uint8))
        frame = to_frame(values, large.shape[:2]) if factor > 1 else values
        level = contour_level(frame, 9.0, score > 3)
        height, width = large.shape[:2]
        assert result.shape[0] > height and result.shape[1] == max(width, NARROWEST)
        expected = overlay(large, frame, low=0.5, high=9.0, contour=level)
        np.testing.assert_array_equal(result[:height, :width], expected)


def test_legends_tell_the_verdicts_apart(tmp_path: Path) -> None:
    image, values = picture(300, 300), np.full((300, 300), 1.0)
    strips = []
    for score, threshold in ((2.0, 3.0), (3.0, 3.0), (4.0, 3.0)):
        write_overlay(tmp_path / "o.png", image, values, 2.0, 9.0, score=score, threshold=threshold)
        with Image.open(tmp_path / "o.png") as file:
            strips.append(np.asarray(file)[300:].astype(int))
    orange = [int(((strip[..., 0] > 200) & (strip[..., 2] < 150)).sum()) for strip in strips]
    assert orange[2] > orange[1] == orange[0], "the verdict's colour; at the threshold an image is good"


def test_overlays_of_views(tmp_path: Path) -> None:
    image, values = picture(600, 310), np.abs(to_frame(noise(8, 8), (600, 310)))
    options = {"low": 0.5, "high": 9.0, "score": 4.0, "threshold": 3.0}
    write_overlay(tmp_path / "a.png", image, values, **options)
    write_overlay(tmp_path / "b.png", image.transpose(1, 0, 2)[::-1], values.T[::-1], **options)  # not contiguous
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        np.testing.assert_array_equal(np.asarray(a)[:600, :310], np.asarray(b)[:310, :600][::-1].transpose(1, 0, 2))
