"""Blocks, layers and parameters that are used in several places are shared again after loading."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import fastmaf
from fastmaf.io.tensor_file import read_tensors, write_tensors
from tests.core.helpers import blocks_of, build, correlated, normal, train
from tests.tolerances import assert_close


def twice() -> fastmaf.Flow:
    block = blocks_of(build(6, blocks=1))[0]
    return fastmaf.Flow(6, [block, fastmaf.Permutation(torch.arange(5, -1, -1)), block])


def shared_layer() -> fastmaf.Flow:
    flow = build(6)
    first, second = blocks_of(flow)
    second.made.hidden[0] = first.made.hidden[0]
    return flow


def shared_parameter() -> fastmaf.Flow:
    flow = build(6, order="natural")
    first, second = blocks_of(flow)
    second.made.output.weight = first.made.output.weight
    return flow


def shared_whitening() -> fastmaf.Flow:
    whitening = fastmaf.GaussianWhitening(6, 2, dtype=torch.float64)
    whitening.fit_(correlated(50, 6))
    return fastmaf.Flow(6, [whitening, *build(6).transforms, whitening])  # type: ignore[list-item]


MODELS = {f.__name__: f for f in (twice, shared_layer, shared_parameter, shared_whitening)}


@pytest.mark.parametrize("name", MODELS)
def test_sharing_survives_a_file(name: str, tmp_path: Path) -> None:
    flow, x = MODELS[name](), correlated(128, 6)
    flow.save(tmp_path / "flow.safetensors")
    again = fastmaf.load(tmp_path / "flow.safetensors")
    # A loaded model is laid out anew, with other widths than the test's, so sums may run in another order.
    assert_close("values", again.log_prob(x), flow.log_prob(x))
    assert [*again.state_dict()] == [*flow.state_dict()]
    assert [n for n, _ in again.named_parameters()] == [n for n, _ in flow.named_parameters()], "one parameter or two"
    train(again, x, steps=5)
    train(flow, x, steps=5)
    assert_close("values", again.log_prob(x), flow.log_prob(x))
    again.save(tmp_path / "again.safetensors")
    third = fastmaf.load(tmp_path / "again.safetensors")
    assert torch.equal(third.log_prob(x), again.log_prob(x))


def test_modules_are_the_same_object_again(tmp_path: Path) -> None:
    for make in (twice, shared_whitening):
        make().save(tmp_path / "flow.safetensors")
        again = fastmaf.load(tmp_path / "flow.safetensors")
        assert again.transforms[0] is again.transforms[-1]


def test_other_flows_say_nothing_of_sharing(tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    build(6).save(path)
    assert "shared" not in json.loads(read_tensors(path)[1]["fastmaf"])


@pytest.mark.parametrize(
    "shared, message",
    [
        ({"transforms.9": "transforms.0"}, "no two such parts"),
        ({"transforms.2": "transforms.0.made"}, "differs"),
        ({"transforms.2.made.output.weight": "transforms.0.made.output.weight"}, "differs"),
        ({"transforms.2.made.output.weight": "features"}, "no two such parts"),
    ],
)
def test_files_that_share_what_differs_are_refused(shared: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "flow.safetensors"
    build(6).save(path)
    tensors, metadata = read_tensors(path)
    config = json.loads(metadata["fastmaf"]) | {"shared": shared}
    write_tensors(tensors, path, {"fastmaf": json.dumps(config)})
    with pytest.raises(fastmaf.CheckpointError, match=message):
        fastmaf.load(path)


def test_memory_that_overlaps_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    flow, path = build(6, order="natural"), tmp_path / "flow.safetensors"
    first, second = blocks_of(flow)
    second.made.output.weight.data = first.made.output.weight.data
    with pytest.raises(ValueError, match=r"transforms\.\d\.made\.output\.weight and .* overlap in memory"):
        flow.save(path)
    assert not path.exists()


def test_neighbours_in_one_vector_are_no_sharing(tmp_path: Path) -> None:
    flow, path = build(6), tmp_path / "flow.safetensors"
    vector_to_parameters(1.5 * parameters_to_vector(flow.parameters()).detach(), flow.parameters())
    flow.save(path)
    assert torch.equal(fastmaf.load(path).log_prob(normal(3, 6)), flow.log_prob(normal(3, 6)))
