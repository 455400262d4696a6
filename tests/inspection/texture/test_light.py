"""The context of the density of a texture."""

from __future__ import annotations

import numpy as np
import torch

from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.texture.light import CONTEXT, Light, log_intensity
from fastmaf.inspection.texture.scoring import anomaly_map
from tests.inspection.texture.conftest import grain


def test_contexts_hold_light_and_position() -> None:
    images = [log_intensity(image[:1].float() / 255) for image in grain(12, 0)]
    light = Light.fit(images)
    contexts = torch.stack([light.contexts(image, (3, 5)) for image in images])
    assert contexts.shape == (12, 15, CONTEXT)
    torch.testing.assert_close(contexts[:, 0, :2].mean(dim=0), torch.zeros(2), rtol=0, atol=1e-4)
    torch.testing.assert_close(contexts[:, 0, :2].std(dim=0, correction=0), torch.ones(2), rtol=1e-4, atol=0)
    assert (contexts[0, :, :2] == contexts[0, 0, :2]).all()
    assert contexts[0, 0, 2:].tolist() == [-1, -1, 1, 1] and contexts[0, 7, 2:].tolist() == [0, 0, 0, 0]
    assert contexts[0, 9, 2:].tolist() == [0, 1, 0, 1]
    extreme = light.contexts(torch.zeros_like(images[0]), (1, 1))
    assert extreme.abs().max() == 3 and torch.isfinite(extreme).all()


def test_a_gain_is_added_to_logarithms() -> None:
    x = torch.tensor([0.2, 0.4])
    dark, bright = log_intensity(x), log_intensity(2 * x)
    torch.testing.assert_close((bright - dark)[0], (bright - dark)[1], rtol=0.1, atol=0)
    assert log_intensity(torch.ones(1)) == 0 and -1.8 < float(log_intensity(torch.zeros(1))) < -1.7


def test_other_light_raises_the_score_of_no_good_image_beyond_the_threshold_where_it_was_seen(
    candidate: TextureCandidate,
) -> None:
    model = candidate.model()
    good = grain(12, 7)
    dark = (good.float() * 0.92).round().to(torch.uint8)
    for images in (good, dark):
        assert model.calibration.is_anomalous(model.predict(images).scores).sum() <= 4


def test_the_map_at_the_border_is_that_of_the_nearest_location(candidate: TextureCandidate) -> None:
    model = candidate.model()
    maps, border = model.predict(grain(2, 8)).anomaly_maps, model.filters.border
    assert border > 0 and maps.max() > 0
    np.testing.assert_allclose(maps[:, 0], maps[:, 1], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(maps[:, :, -1], maps[:, :, -2], rtol=1e-4, atol=1e-6)
    level = torch.zeros(4, 6)
    level[0, 2], level[3, 5] = 5.0, 7.0  # at the edge of what is seen, and in a corner of it
    found = anomaly_map([level], 2 * (4 + 2 * border) * (6 + 2 * border), border)
    across, down = found.shape[1] // (6 + 2 * border), found.shape[0] // (4 + 2 * border)
    assert found[0, (border + 2) * across + across // 2] == found.max(dim=1).values[0] > 4.5
    assert found[-1, -1] == 7 == found.max() and found[-1, 0] == 0
    assert found[(border + 3) * down + down // 2, -1] == 7
