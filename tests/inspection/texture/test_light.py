"""The context of the density of a texture."""

from __future__ import annotations

import torch

from fastmaf.inspection.texture.candidate import TextureCandidate
from fastmaf.inspection.texture.light import CONTEXT, Light, log_intensity
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


def test_nothing_is_found_at_the_border(candidate: TextureCandidate) -> None:
    maps = candidate.model().predict(grain(2, 8)).anomaly_maps
    assert (maps[:, 0] == 0).all() and (maps[:, :, -1] == 0).all() and maps.max() > 0
