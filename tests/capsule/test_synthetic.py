"""The synthetic data set: layout, reproducibility, and masks that cover the defects."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmaf.capsule import synthetic
from fastmaf.capsule.defects import draw_pair
from fastmaf.capsule.synthetic import DEFAULT_COUNTS, DEFECTS, MARKER, draw_dataset
from fastmaf.images.dataset import load_test, load_train
from fastmaf.images.decode import DataError

FEW = dict.fromkeys(DEFECTS, 1)


def contents(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*.png"))}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "ein Satz Kapseln é"
    return draw_dataset(root, train=4, good=2, defects=dict.fromkeys(DEFECTS, 3), size=96, seed=5, progress=False)


def test_layout_and_counts(drawn: Path) -> None:
    names = set(contents(drawn))
    expected = {f"train/good/{i:03d}.png" for i in range(4)} | {f"test/good/{i:03d}.png" for i in range(2)}
    for name in DEFECTS:
        expected |= {f"test/{name}/{i:03d}.png" for i in range(3)}
        expected |= {f"ground_truth/{name}/{i:03d}_mask.png" for i in range(3)}
    assert names == expected


def test_the_images_load_as_plain_rgb(drawn: Path) -> None:
    train, test = load_train(drawn, size=16, progress=False), load_test(drawn, size=16, progress=False)
    assert len(train) == 4 and train.notes == () and test.notes == ()
    assert {name: test.labels.count(name) for name in set(test.labels)} == {"good": 2, **dict.fromkeys(DEFECTS, 3)}


def test_default_counts_are_those_of_the_published_data() -> None:
    assert dict(DEFAULT_COUNTS) == {"crack": 23, "faulty_imprint": 22, "poke": 21, "scratch": 23, "squeeze": 20}
    assert tuple(DEFAULT_COUNTS) == DEFECTS


def test_same_seed_same_bytes_other_seed_other_images(tmp_path: Path) -> None:
    def draw(name: str, seed: int) -> dict[str, bytes]:
        return contents(draw_dataset(tmp_path / name, train=2, good=1, defects=FEW, size=48, seed=seed, progress=False))

    first, again, other = draw("a", 3), draw("b", 3), draw("c", 4)
    assert first == again
    assert all(first[name] != other[name] for name in first if not name.startswith("ground_truth"))
    pictures = [bytes_ for name, bytes_ in first.items() if not name.startswith("ground_truth")]
    assert len(set(pictures)) == len(pictures)


def test_counts_may_change_without_changing_the_images(tmp_path: Path) -> None:
    small = draw_dataset(tmp_path / "a", train=1, good=1, defects={"poke": 1}, size=48, progress=False)
    large = draw_dataset(tmp_path / "b", train=3, good=2, defects={"crack": 1, "poke": 2}, size=48, progress=False)
    few, many = contents(small), contents(large)
    assert set(few) < set(many) and all(many[name] == few[name] for name in few)


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("size", [64, 192])
def test_masks_lie_where_the_defect_changes_the_picture(defect: str, size: int) -> None:
    for seed in range(4):
        clean, broken = draw_pair(np.random.default_rng(seed), size, defect)
        mask = synthetic._mask(clean, broken)
        difference = np.abs(broken - clean).max(2)
        assert mask.shape == (size, size) and set(np.unique(mask)) == {0, 255}
        inside, outside = difference[mask == 255], difference[mask == 0]
        assert inside.max() == difference.max() > 5  # the largest change is marked
        assert outside.max() <= 10.0  # and no clearly visible one is unmarked
        assert inside.mean() > 5 * outside.mean()
        assert 0 < (mask > 0).mean() < 0.2


def test_saved_mask_belongs_to_the_saved_picture(drawn: Path) -> None:
    for name in DEFECTS:
        for i in range(3):
            picture, mask = synthetic._picture(f"test/{name}", i, 96, 5)
            assert mask is not None
            assert np.array_equal(np.asarray(Image.open(drawn / f"test/{name}/{i:03d}.png")), picture)
            saved = np.asarray(Image.open(drawn / f"ground_truth/{name}/{i:03d}_mask.png"))
            assert saved.dtype == np.uint8 and np.array_equal(saved, mask)


def test_pictures_show_a_capsule_on_light_paper() -> None:
    for i in range(5):
        picture, mask = synthetic._picture("train/good", i, 192, 0)
        assert mask is None and picture.shape == (192, 192, 3) and picture.dtype == np.uint8
        corners = picture[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
        assert corners.min() > 170
        assert picture[85:105, 30:60].mean() < 60  # the dark cap at the left
        red, green, blue = picture[85:105, 110:170].reshape(-1, 3).mean(0)
        assert red > green + 25 and red > blue + 25  # the orange body at the right


def test_sensor_noise_is_small() -> None:
    picture, _ = synthetic._picture("train/good", 0, 192, 0)
    paper = picture[4:20, 4:188].astype(float)
    sigma = np.diff(paper, axis=1).std() / np.sqrt(2)
    assert 0.8 < sigma < 2.0


def test_the_severities_vary() -> None:
    """Each class has faint defects and plain ones."""
    for defect in ("crack", "poke", "scratch", "squeeze"):
        amounts = []
        for seed in range(10):
            clean, broken = draw_pair(np.random.default_rng(seed), 64, defect)
            amounts.append(float(np.abs(broken - clean).sum()))
        assert max(amounts) > 5 * min(amounts), defect


def test_refuses_a_folder_that_holds_something_else(tmp_path: Path) -> None:
    mine = tmp_path / "photos"
    mine.mkdir()
    (mine / "holiday.png").write_bytes(b"precious")
    with pytest.raises(DataError, match=r"photos is not empty \(it holds holiday.png\).*nothing was written"):
        draw_dataset(mine, train=1, good=0, defects={}, size=32, progress=False)
    assert [p.name for p in mine.iterdir()] == ["holiday.png"] and (mine / "holiday.png").read_bytes() == b"precious"
    with pytest.raises(DataError, match="is a file"):
        draw_dataset(mine / "holiday.png", train=1, progress=False)
    (mine / MARKER).write_text("not json")
    with pytest.raises(DataError, match="cannot be read"):
        draw_dataset(mine, train=1, progress=False)
    assert (mine / "holiday.png").exists() and not (mine / "train").exists()


def test_redraws_its_own_folder_and_leaves_no_old_image(tmp_path: Path) -> None:
    root = draw_dataset(tmp_path / "set", train=3, good=1, defects=FEW, size=32, progress=False)
    (root / "train" / "good" / "mine.txt").write_text("kept")
    draw_dataset(root, train=1, good=1, defects={"poke": 2}, size=48, seed=1, progress=False)
    fresh = draw_dataset(tmp_path / "fresh", train=1, good=1, defects={"poke": 2}, size=48, seed=1, progress=False)
    assert contents(root) == contents(fresh)
    assert (root / "train" / "good" / "mine.txt").read_text() == "kept"
    marker = json.loads((root / MARKER).read_text("utf-8"))
    assert marker["counts"] == {"train/good": 1, "test/good": 1, "test/poke": 2}
    assert (marker["seed"], marker["size"]) == (1, 48)


def test_a_forged_marker_reaches_no_other_folder(tmp_path: Path) -> None:
    outside = tmp_path / "000.png"
    outside.write_bytes(b"precious")
    root = tmp_path / "set"
    root.mkdir()
    (root / MARKER).write_text(json.dumps({"counts": {"..": 5, "test/../..": 5}}))
    draw_dataset(root, train=1, good=0, defects={}, size=32, progress=False)
    assert outside.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"defects": {"dent": 3}}, "unknown class dent.*crack"),
        ({"train": -1}, "train=-1"),
        ({"seed": -1}, "seed=-1"),
        ({"size": 16}, "32 to 1024"),
    ],
)
def test_wrong_arguments(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_dataset(tmp_path / "set", progress=False, **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "set").exists()
