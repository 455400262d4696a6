"""State dicts of earlier versions, whose packed weights lie in tiles."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmaf
from fastmaf.tiles import former_tiles, numel_of
from tests.core.helpers import build, layers_of, normal
from tests.io.version_1 import in_tiles, tiles_of, version_1_state


def state_of_version_1(flow: torch.nn.Module, state: dict[str, Tensor]) -> OrderedDict[str, Tensor]:
    """Returns the state with the metadata that torch kept beside it."""
    with_metadata = OrderedDict(state)
    with_metadata._metadata = {name: {"version": 1} for name, _ in flow.named_modules()}  # type: ignore[attr-defined]
    return with_metadata


@pytest.mark.parametrize("metadata", [True, False])
@pytest.mark.parametrize(("features", "hidden"), [(13, (7, 5)), (40, (33, 17)), (601, (200, 150)), (1, (3,))])
def test_a_state_dict_of_tiles_becomes_panels(features: int, hidden: tuple[int, ...], metadata: bool) -> None:
    options: dict[str, Any] = {"hidden_features": hidden, "degrees": "random", "widths": "own"}
    flow, other, x = build(features, **options), build(features, **options), normal(3, features)
    state = version_1_state(flow)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(0)
    other.load_state_dict(state_of_version_1(flow, state) if metadata else state)
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), flow.parameters(), strict=True))


def test_the_tables_above_cut_layers_into_several_tiles() -> None:
    assert max(map(len, tiles_of(build(601, hidden_features=(200, 150), widths="own")).values())) > 2


def square() -> fastmaf.MaskedLinear:
    """Returns a layer whose tiles hold as many numbers as its panels, in another order."""
    layer = fastmaf.MaskedLinear(torch.ones(16, dtype=torch.int64), torch.ones(16, dtype=torch.int64))
    assert numel_of(former_tiles(layer.layout)) == layer.layout.numel
    return layer


def test_a_weight_that_fits_both_is_told_by_the_version() -> None:
    saved, former, present = square(), square(), square()
    tiles = in_tiles(saved.dense_weight(), former_tiles(saved.layout))
    former.load_state_dict(state_of_version_1(former, {"weight": tiles, "bias": saved.bias.detach()}))
    assert torch.equal(former.dense_weight(), saved.dense_weight())
    present.load_state_dict({"weight": saved.weight.detach(), "bias": saved.bias.detach()})
    assert torch.equal(present.dense_weight(), saved.dense_weight())


@pytest.mark.parametrize("outputs_per_feature", [1, 2, 3, 7])
def test_tiles_of_any_number_of_outputs_per_feature(outputs_per_feature: int) -> None:
    """Tiles of output layers ended at multiples of the outputs per feature, also where a tile reached its most rows."""
    make = {"features": 5000, "hidden_features": 9, "outputs_per_feature": outputs_per_feature}
    saved, loaded = fastmaf.MADE(**make).output, fastmaf.MADE(**make).output
    tiles = in_tiles(saved.dense_weight(), former_tiles(saved.layout, outputs_per_feature))
    loaded.load_state_dict(state_of_version_1(loaded, {"weight": tiles, "bias": saved.bias.detach()}))
    assert torch.equal(loaded.dense_weight(), saved.dense_weight())


def test_a_weight_of_another_size_is_refused() -> None:
    flow = build(13, widths="own")
    name, state = next(f"{name}.weight" for name in layers_of(flow)), version_1_state(flow)
    numel = state[name].numel()
    state[name] = state[name][1:]
    message = (
        rf"{name}: expected {numel} numbers, as earlier versions of fastmaf packed the weight; found shape \({numel}"
    )
    with pytest.raises(ValueError, match=message.replace(rf"\({numel}", rf"\({numel - 1},\)")):
        flow.load_state_dict(state_of_version_1(flow, state))
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        flow.load_state_dict(state)


@pytest.mark.parametrize("value", [1e-20, float("nan")])
def test_numbers_where_the_mask_hides_the_weight_are_refused(value: float) -> None:
    flow = build(13, widths="own")
    state = version_1_state(flow)
    name = next(f"{name}.weight" for name in layers_of(flow))
    state[name][12] = value  # the first unit does not see the last input
    with pytest.raises(ValueError, match=f"{name} holds numbers where the mask hides the weight, in rows 0 to 7"):
        flow.load_state_dict(state_of_version_1(flow, state))


def test_a_state_dict_states_its_version() -> None:
    flow = build(5)
    metadata = flow.state_dict()._metadata  # type: ignore[attr-defined]
    assert {metadata[name]["version"] for name in layers_of(flow)} == {2}
