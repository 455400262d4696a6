"""Pixel metrics against answers worked by hand, loops over all thresholds, and scikit-learn."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from scipy.ndimage import label
from sklearn.metrics import roc_auc_score

from fastmaf.metrics.aupro import au_pro, compare_pixels, pixel_auroc
from fastmaf.metrics.intervals import small_sample_factor
from fastmaf.metrics.pixel_ranks import resize_map
from fastmaf.metrics.results import EvaluationError

Masks = list[np.ndarray | None]


def drawn(seed: int, *, digits: int = 9, side: int = 12, size: int = 6) -> tuple[list[np.ndarray], Masks]:
    """Six maps [size, size], with ties where there are few digits; masks of several regions, an empty one, no mask."""
    rng = np.random.default_rng(seed)
    masks: Masks = [rng.random((side, side)) < share for share in (0.1, 0.3, 0.02, 0.15)]
    masks += [np.zeros((side, side), bool), None]
    maps = [rng.normal(0, 1, (size, size)).round(digits).astype(np.float32) for _ in masks]
    return maps, masks


def flat(maps: Sequence[np.ndarray], masks: Masks, side: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """All pixels' values and whether they are defects."""
    full = [np.zeros((side, side), bool) if mask is None else mask for mask in masks]
    values = [resize_map(values, mask.shape) for values, mask in zip(maps, full, strict=True)]
    return np.concatenate([resized.ravel() for resized in values]), np.concatenate([mask.ravel() for mask in full])


def pixel_interval(maps: Sequence[np.ndarray], masks: Masks, **options: int) -> tuple[float, float]:
    """The interval of the pixel AUROC itself: constant maps have 1/2 in every resample."""
    constant = [np.zeros_like(values) for values in maps]
    difference = compare_pixels([constant, maps], masks, **options)[1][1]
    return 0.5 + difference.low, 0.5 + difference.high


def naive_au_pro(maps: Sequence[np.ndarray], masks: Masks, limit: float) -> float:
    """The definition: a loop over every threshold, every image and every region, then the trapezoidal rule."""
    side = next(mask.shape[0] for mask in masks if mask is not None)
    values, defect = flat(maps, masks, side)
    points = [(0.0, 0.0)]
    for t in sorted(set(values.tolist()), reverse=True):
        shares = []
        for scores, mask in zip(maps, masks, strict=True):
            if mask is not None:
                detected = resize_map(scores, mask.shape) >= t
                regions, n = label(mask, [[1, 1, 1]] * 3)
                shares += [detected[regions == r].mean() for r in range(1, n + 1)]
        points.append((float((values[~defect] >= t).mean()), float(np.mean(shares))))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x0 >= limit or x1 == x0:
            continue
        end = min(x1, limit)
        area += (end - x0) * (y0 + (y0 + (y1 - y0) * (end - x0) / (x1 - x0))) / 2
    return area / limit


# Maps to the masks' resolution


@pytest.mark.parametrize(
    ("old", "new"), [((6, 6), (18, 18)), ((5, 7), (13, 9)), ((8, 8), (3, 5)), ((1, 1), (4, 2)), ((3, 1), (1, 1))]
)
def test_resize_agrees_with_torch(old: tuple[int, int], new: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(0, 1, old)
    truth = torch.nn.functional.interpolate(torch.from_numpy(values)[None, None], new, mode="bilinear")[0, 0]
    resized = resize_map(values, new)
    assert resized.dtype == np.float64 and resized.shape == new
    np.testing.assert_allclose(resized, truth.numpy(), atol=1e-12)


def test_resize_keeps_values_and_ties() -> None:
    values = np.random.default_rng(0).normal(0, 1, (5, 5)).astype(np.float32)
    np.testing.assert_array_equal(resize_map(values, (5, 5)), values)
    for value in np.random.default_rng(0).normal(0, 1, 100):  # a weighted sum of the two would round some of them
        assert (resize_map(np.full((7, 7), value), (19, 31)) == value).all()
    with pytest.raises(EvaluationError, match=r"\[2, 3, 4\]"):
        resize_map(np.zeros((2, 3, 4)), (5, 5))


# Pixels


def test_pixel_auroc_by_hand() -> None:
    maps = [np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[0.0, 3.0]])]
    masks = [np.array([[0, 1], [1, 0]], bool), np.array([[0, 0]], bool)]
    # defects 2 3 against 1 4 0 3: 2 wins over 1 and 0; 3 over 1 and 0, and half over 3
    assert pixel_auroc(maps, masks) == 4.5 / 8


@pytest.mark.parametrize("digits", [0, 1, 9])
@pytest.mark.parametrize("seed", range(3))
def test_pixel_auroc_against_brute_force_and_sklearn(seed: int, digits: int) -> None:
    maps, masks = drawn(seed, digits=digits)
    values, defect = flat(maps, masks)
    pairs = values[defect][:, None] - values[~defect]
    assert pixel_auroc(maps, masks) == pytest.approx(float(((pairs > 0) + (pairs == 0) / 2).mean()), abs=1e-13)
    assert pixel_auroc(maps, masks) == pytest.approx(roc_auc_score(defect, values), abs=1e-13)


def test_pixels_rank_in_float64() -> None:
    maps = [np.array([[-4e4, -4e4 + 1e-7]])]
    assert pixel_auroc(maps, [np.array([[False, True]])]) == 1
    assert pixel_auroc(maps, [np.array([[True, False]])]) == 0


def test_good_images_count_at_the_most_common_shape() -> None:
    masks: Masks = [np.eye(4, dtype=bool), None, np.eye(2, dtype=bool), np.eye(4, dtype=bool)]
    maps = [np.array([[0.0, 1.0], [2.0, 5.0]]) + 0.1 * i for i in range(4)]
    explicit = [np.zeros((4, 4), bool) if mask is None else mask for mask in masks]
    small = [np.zeros((2, 2), bool) if mask is None else mask for mask in masks]
    for metric in (pixel_auroc, au_pro):
        assert metric(maps, masks) == metric(maps, explicit) != metric(maps, small)


def test_perfect_constant_and_inverted_maps() -> None:
    masks: Masks = [np.kron(np.eye(3), np.ones((2, 2))).astype(bool), None]
    perfect = [np.zeros((6, 6)) if mask is None else mask.astype(float) for mask in masks]
    assert pixel_auroc(perfect, masks) == 1 and au_pro(perfect, masks) == pytest.approx(1, abs=1e-12)
    inverted = [-values for values in perfect]
    assert pixel_auroc(inverted, masks) == 0 and au_pro(inverted, masks) == 0
    constant = [np.full((2, 2), 0.1)] * 2
    assert pixel_auroc(constant, masks) == 0.5 and au_pro(constant, masks) == pytest.approx(0.15)


def test_au_pro_by_hand() -> None:
    # Two regions, of 1 and 3 pixels, that count the same. Falling: region A (1), free (1 of 4), B (3), free, ...
    mask = np.array([[1, 0, 1, 1, 1, 0, 0, 0]], bool)
    values = np.array([[9.0, 8.0, 7.0, 7.0, 7.0, 6.0, 5.0, 4.0]])
    assert au_pro([values], [mask], 0.25) == pytest.approx(0.5)  # all of A, nothing of B
    assert au_pro([values], [mask], 0.5) == pytest.approx((0.25 * 0.5 + 0.25 * 1) / 0.5)
    assert au_pro([values], [mask], 0.1) == pytest.approx(0.5)
    # all pixels at one threshold: a slope from (0, 0) to (1, 1), cut at the limit
    assert au_pro([values * 0], [mask], 0.2) == pytest.approx(0.1)
    # pixels that touch at a corner are one region of two: half of it is detected, not one of two regions
    corner = np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
    values = np.array([[1.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    # PRO 1/4 at FPR 0, then straight to (1, 1)
    assert au_pro([values], [corner], 1.0) == pytest.approx((0.25 + 1) / 2)


@pytest.mark.parametrize("limit", [0.01, 0.3, 1.0])
@pytest.mark.parametrize(("seed", "digits"), [(0, 0), (1, 1), (2, 9), (3, 9)])
def test_au_pro_against_all_thresholds(seed: int, digits: int, limit: float) -> None:
    maps, masks = drawn(seed, digits=digits, side=8, size=5)
    assert au_pro(maps, masks, limit) == pytest.approx(naive_au_pro(maps, masks, limit), abs=1e-12)


def test_au_pro_is_pixel_auroc_for_regions_of_one_size() -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((9, 9), bool)
    mask[::3, ::3] = True
    maps = [rng.normal(0, 1, (9, 9)) + mask for _ in range(3)]
    assert au_pro(maps, [mask] * 3, 1.0) == pytest.approx(pixel_auroc(maps, [mask] * 3), abs=1e-12)


@pytest.mark.parametrize("metric", [pixel_auroc, au_pro, pixel_interval])
def test_a_monotone_change_of_the_maps_changes_nothing(metric: Callable[..., object]) -> None:
    maps, masks = drawn(5, side=6)
    wide = [values.astype(np.float64) for values in maps]
    assert metric([3 * values**3 - 7 for values in wide], masks) == metric(wide, masks)


def test_pixel_interval_weights_whole_images() -> None:
    """Against the same resamples with their images repeated."""
    maps, masks = drawn(0, digits=1)
    resamples, groups = 40, (np.array([4, 5]), np.array([0, 1, 2, 3]))  # without and with a defect pixel
    rng = np.random.default_rng(3)
    times = np.zeros((resamples, 6), int)
    for group in groups:
        times[:, group] = rng.multinomial(len(group), np.full(len(group), 1 / len(group)), resamples)
    areas = []
    for row in times:
        chosen = np.repeat(np.arange(6), row)
        areas.append(pixel_auroc([maps[i] for i in chosen], [masks[i] for i in chosen]))
    low, high = pixel_interval(maps, masks, resamples=resamples, seed=3)
    area, ends = pixel_auroc(maps, masks), np.quantile(areas, [0.025, 0.975])
    widened = area + small_sample_factor(2) * (ends - area)  # two images have no defect pixel
    assert (low, high) == pytest.approx(tuple(widened.clip(-0.5, 1.5)), abs=1e-12)
    assert low < area < high


def test_sets_of_maps_are_compared_over_the_same_resamples() -> None:
    (maps, masks), other = drawn(0, digits=1), drawn(7, digits=1)[0]
    same, blank = [2 * values.astype(np.float64) + 1 for values in maps], [np.zeros_like(values) for values in maps]
    areas, differences = compare_pixels([maps, other, same, blank], masks, resamples=300, seed=3)
    assert areas == pytest.approx([pixel_auroc(several, masks) for several in (maps, other, same, blank)], abs=1e-12)
    assert areas[3] == 0.5
    second = differences[1]
    assert second.difference == areas[1] - areas[0] and second.resamples == 300
    assert second.low < second.difference < second.high
    reverse = compare_pixels([other, maps], masks, resamples=300, seed=3)[1][1]
    assert (second.low, second.high) == pytest.approx((-reverse.high, -reverse.low))
    for none in (differences[0], differences[2]):
        assert (none.difference, none.low, none.high, none.not_better) == (0, 0, 0, 1)


def test_pixel_interval_of_one_image_and_of_a_defect_throughout() -> None:
    maps, masks = drawn(0)
    assert pixel_interval(maps[:1], masks[:1]) == (-0.5, 1.5), "one image says nothing of others"
    whole = np.ones((6, 6), bool)  # drawn twice, it leaves nothing to rank against: such resamples do not count
    low, high = pixel_interval(maps[:2], [np.eye(6, dtype=bool), whole])
    assert low <= pixel_auroc(maps[:2], [np.eye(6, dtype=bool), whole]) <= high


@pytest.mark.parametrize("metric", [pixel_auroc, au_pro, pixel_interval])
def test_errors_of_pixel_metrics(metric: Callable[..., object]) -> None:
    plain, mask = np.zeros((2, 2)), np.eye(2, dtype=bool)
    broken = np.array([[0.0, math.nan], [0, 0]])
    for maps, masks, message in (
        ([plain], [mask, mask], "1 maps and 2 masks"),
        ([plain, broken], [mask, None], "map 1 "),
        ([plain, broken * 0 + math.inf], [mask, None], "map 1 "),
        ([plain[0]], [mask], r"\[2\]"),
        ([plain], [mask[None]], r"\[1, 2, 2\]"),
        ([plain, plain], [None, ~mask & mask], "none in 1 masks"),
        ([plain], [mask | ~mask], "need defect-free pixels"),
        ([], [], "none in 0 masks"),
    ):
        with pytest.raises(EvaluationError, match=message):
            metric(maps, masks)


@pytest.mark.parametrize("limit", [0, -0.1, 1.1, math.nan])
def test_au_pro_refuses_a_limit_out_of_range(limit: float) -> None:
    with pytest.raises(EvaluationError, match="fpr_limit"):
        au_pro([np.zeros((2, 2))], [np.eye(2, dtype=bool)], limit)


def test_no_resamples_are_refused() -> None:
    maps, masks = drawn(0)
    with pytest.raises(EvaluationError, match="resamples must be at least 1; found 0"):
        compare_pixels([maps], masks, resamples=0)
