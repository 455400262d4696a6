"""Feature maps of any module on one grid."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastmaf.inspection.features.extractor import Extractor, extractor_of, on_grid
from tests.inspection.features.conftest import TwoMaps


def test_finer_maps_are_averaged_over_the_cells_of_the_coarsest() -> None:
    fine, coarse = torch.randn(2, 3, 8, 8), torch.randn(2, 5, 4, 4)
    joined = on_grid([fine, coarse])
    assert joined.shape == (2, 8, 4, 4)
    torch.testing.assert_close(joined[:, :3, 1, 2], fine[:, :, 2:4, 4:6].mean(dim=(2, 3)))
    assert torch.equal(joined[:, 3:], coarse)


@pytest.mark.parametrize("form", [list, tuple, lambda maps: {str(i): m for i, m in enumerate(maps)}])
def test_sequences_mappings_arrays_and_tensors(form: Any) -> None:
    maps = [torch.randn(2, 3, 4, 4), torch.randn(2, 5, 4, 4)]
    assert torch.equal(on_grid(form(maps)), torch.cat(maps, dim=1))
    assert torch.equal(on_grid(form([part.numpy() for part in maps])), torch.cat(maps, dim=1))
    assert torch.equal(on_grid(maps[0]), maps[0]) and torch.equal(on_grid(maps[0].numpy()), maps[0])


def test_large_grids_and_many_channels_are_reduced() -> None:
    joined = on_grid(torch.randn(1, 300, 40, 20))
    assert joined.shape == (1, 256, 16, 16)
    assert torch.equal(
        on_grid(torch.ones(1, 300, 2, 2) * torch.arange(300.0)[:, None, None])[0, :, 0, 0],
        on_grid(torch.ones(3, 300, 2, 2) * torch.arange(300.0)[:, None, None])[2, :, 1, 1],
    )


@pytest.mark.parametrize(
    ("maps", "found"),
    [
        (torch.randn(2, 3), r"found \[2, 3\]"),
        ([torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)], r"found \[2, 3, 4, 4\], \[1, 3, 4, 4\]"),
        ([], "found none"),
        (torch.randn(2, 0, 4, 4), r"found \[2, 0, 4, 4\]"),
        (None, "found NoneType"),
        ("maps", "found str"),
        (torch.full((1, 2, 3, 3), float("nan")), "found NaN or infinity"),
    ],
)
def test_other_values_are_refused(maps: Any, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        on_grid(maps)


def test_results_do_not_depend_on_the_batch_and_the_mode_is_restored(pixels: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2), nn.Dropout(0.5), nn.BatchNorm2d(4)).train()
    extractor = Extractor(network, size=32)
    whole = extractor(pixels[:5])
    assert torch.equal(extractor(pixels[3:4]), whole[3:4]) and network.training
    assert network[2].num_batches_tracked == 0


def test_a_module_gets_rgb_on_0_to_1(pixels: Tensor) -> None:
    (image,) = Extractor(nn.Identity(), size=32)(pixels[:1])
    expected = nn.functional.adaptive_avg_pool2d(pixels[0] / 255, 16)
    torch.testing.assert_close(image, expected)


def test_names_and_labels() -> None:
    assert extractor_of(TwoMaps()).label == "TwoMaps"
    with pytest.raises(ValueError, match="'efficientnet-lite0' or a torch module; found 'resnet'"):
        extractor_of("resnet")
    with pytest.raises(ValueError, match="computed elsewhere; found images"):
        Extractor(None)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert np.isfinite(on_grid(np.ones((1, 2, 3, 3), np.int64)).numpy()).all()
