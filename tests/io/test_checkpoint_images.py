"""Files of flows over images: whitening, local blocks and logit, and tensors kept beside a flow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastmaf
from tests.core.helpers import build, generator, normal, shared_widths
from tests.io.checkpoint_files import edit_config, load, poke, read, refused, set_tensor


def images() -> fastmaf.Flow:
    """Returns a flow of the transforms for images: logit, whitening and a local block."""
    whitening = fastmaf.GaussianWhitening(12, 3).fit_(normal(40, 12, dtype=torch.float32))
    local = fastmaf.LocalAutoregressive((3, 2, 2), generator=generator(1))
    with torch.no_grad():
        for parameter in local.parameters():
            parameter.copy_(0.2 * normal(*parameter.shape, dtype=torch.float32))
    return fastmaf.Flow(12, [fastmaf.Logit(12, 0.1), whitening, local])


def pixels(n: int = 4) -> Tensor:
    return torch.rand(n, 12, generator=generator())


def edit_transform(place: int, **changes: Any) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    """Changes entries of a transform's configuration; None takes one away."""

    def change(config: dict[str, Any]) -> None:
        entry = config["transforms"][place]
        entry.update(changes)
        for name in [name for name, value in changes.items() if value is None]:
            del entry[name]

    return edit_config(change)


IMAGE_DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], None], str]] = {
    "negative variance": (set_tensor("variance", poke(-1e-3, 2)), "transforms.1.variance.*not negative.*-0.001"),
    "NaN variance": (set_tensor("variance", poke(float("nan"))), "variance.*finite"),
    "infinite variance": (set_tensor("variance", poke(float("inf"))), "variance.*finite"),
    "no noise": (set_tensor("scale", poke(0.0, 5)), "transforms.1.scale.*positive.*0"),
    "negative noise": (set_tensor("scale", poke(-2.0)), "transforms.1.scale.*positive.*-2"),
    "NaN noise": (set_tensor("scale", poke(float("nan"))), "scale.*finite"),
    "infinite noise": (set_tensor("scale", poke(float("inf"))), "scale.*finite"),
    "NaN mean": (set_tensor("mean", poke(float("nan"))), "mean.*finite"),
    "NaN factor": (set_tensor("factors", poke(float("nan"), 7)), "factors.*finite"),
    "no factors": (set_tensor("factors", lambda t: None), "factors"),
    "no mean": (set_tensor("mean", lambda t: None), "mean"),
    "fewer factors": (set_tensor("factors", lambda t: t[:, :2]), "factors.*12, 3.*12, 2"),
    "long scale": (set_tensor("scale", lambda t: torch.cat((t, t))), "scale"),
    "scale in float64": (set_tensor("scale", lambda t: t.double()), "scale.*float64"),
    "integer mean": (set_tensor("mean", lambda t: t.long()), "int64"),
    "other rank": (edit_transform(1, rank=2), "factors"),
    "rank beyond the features": (edit_transform(1, rank=13), "rank.*13"),
    "words for a rank": (edit_transform(1, rank="full"), "full|rank|configuration"),
    "no rank": (edit_transform(1, rank=None), "rank"),
    "features of another flow": (edit_transform(1, features=13), "13"),
    "NaN convolution": (set_tensor("first.weight", poke(float("nan"), 3)), "first.weight.*finite"),
    "infinite bias": (set_tensor("second.bias", poke(float("inf"))), "second.bias.*finite"),
    "no convolution": (set_tensor("linear.weight", lambda t: None), "linear.weight"),
    "smaller convolution": (set_tensor("linear.weight", lambda t: t[:, :, :1, :1]), "linear.weight"),
    "other kernel": (edit_transform(2, kernel=5), "weight"),
    "even kernel": (edit_transform(2, kernel=2), "kernel.*2"),
    "other hidden": (edit_transform(2, hidden=3), "first|second"),
    "other patch": (edit_transform(2, patch=1), "weight"),
    "patch that does not divide": (edit_transform(2, patch=4), "patch.*4"),
    "words for a shape": (edit_transform(2, shape="large"), "shape|large|configuration"),
    "flat shape": (edit_transform(2, shape=[12]), r"shape.*\[12\]"),
    "shape of other features": (edit_transform(2, shape=[3, 4, 4]), "48"),
    "no shape": (edit_transform(2, shape=None), "shape"),
    "no bound": (edit_transform(2, log_scale_bound=-1), "log_scale_bound.*-1"),
    "an option of a later version": (edit_transform(2, dilation=2), "dilation"),
    "alpha out of range": (edit_transform(0, alpha=0.5), "alpha.*0.5"),
    "no alpha": (edit_transform(0, alpha=None), "alpha"),
    "words for an alpha": (edit_transform(0, alpha="small"), "small|alpha|configuration"),
    "logit of other features": (edit_transform(0, features=11), "11"),
    "extra tensor": (lambda tensors, metadata: tensors.update({"transforms.0.mean": torch.zeros(2)}), "transforms.0"),
    "one kind taken for another": (edit_transform(1, type="logit", alpha=0.1), "transforms.1"),
}


@pytest.mark.parametrize("name", IMAGE_DAMAGE)
def test_damaged_transforms_for_images_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    edit, words = IMAGE_DAMAGE[name]
    images().save(path, extras={"anything": torch.full((2,), torch.nan)})
    tensors, metadata = read(path)
    edit(tensors, metadata)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    refused(path, words)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_transforms_for_images_through_a_file(tmp_path: Path, dtype: torch.dtype) -> None:
    flow, x, path = images().to(dtype), pixels().to(dtype), tmp_path / "model.safetensors"
    flow.save(path)
    again = fastmaf.load(path)
    assert [type(t) for t in again.transforms] == [type(t) for t in flow.transforms]
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(again.nll_per_dim(x), flow.nll_per_dim(x))
    assert torch.equal(again.sample(3, generator=generator()), flow.sample(3, generator=generator()))
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("rank", [0, 4])
def test_a_whitened_maf_through_a_file(tmp_path: Path, rank: int) -> None:
    flow, x = build(13, whitening=rank, order="random"), normal(5, 13)
    first = flow.transforms[0]
    assert isinstance(first, fastmaf.GaussianWhitening)
    first.fit_(normal(60, 13, seed=1) + 3)
    flow.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    assert isinstance(again, fastmaf.MAF) and isinstance(again.transforms[0], fastmaf.GaussianWhitening)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(again.nll_per_dim(x), flow.nll_per_dim(x))
    first.fit_(normal(60, 13, seed=2) - 3)
    assert not torch.equal(again.log_prob(x), flow.log_prob(x)), "shares memory with the file's model"


EXTRAS: dict[str, Tensor] = {
    "threshold": torch.tensor(3.5, dtype=torch.float64),
    "maps.mean": normal(2, 4, 4),
    # Names that the flow's own tensors have, and the prefix itself.
    "transforms.1.scale": torch.tensor([-1.0]),
    "extra.": torch.arange(3),
    "extra.extra.x": torch.zeros(0, 3),
    "grösse 1/2": torch.tensor([True, False]),
    "fastmaf": torch.ones(2, dtype=torch.bfloat16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "strided": normal(4, 6).t()[1:5:2],
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "not finite": torch.tensor([torch.nan, torch.inf]),
}


def test_extras_are_kept_beside_the_flow(tmp_path: Path) -> None:
    flow, x, path = images(), pixels(), tmp_path / "model.safetensors"
    flow.save(path, {"epoch": "7"}, EXTRAS)
    extras = fastmaf.load_with_extras(path).extras
    assert extras.keys() == EXTRAS.keys()
    for name, expected in EXTRAS.items():
        assert extras[name].dtype == expected.dtype and not extras[name].requires_grad
        assert torch.equal(extras[name].nan_to_num(), expected.detach().nan_to_num()), name
    again = fastmaf.load(path)
    assert torch.equal(again.log_prob(x), flow.log_prob(x)) and list(again.state_dict()) == list(flow.state_dict())
    assert read(path)[1]["epoch"] == "7"
    again.save(path)
    assert fastmaf.load_with_extras(path).extras == {}, "a flow does not know the extras of the file that it is from"


def test_no_extras(tmp_path: Path) -> None:
    flow = images()
    flow.save(tmp_path / "none.safetensors")
    flow.save(tmp_path / "empty.safetensors", extras={})
    assert fastmaf.load_with_extras(tmp_path / "none.safetensors").extras == {}
    assert (tmp_path / "none.safetensors").read_bytes() == (tmp_path / "empty.safetensors").read_bytes()


def test_extras_that_share_memory(tmp_path: Path) -> None:
    """With one another and with the flow: a file keeps values."""
    flow, path, whole = images(), tmp_path / "model.safetensors", normal(4, 3)
    first = flow.transforms[1]
    assert isinstance(first, fastmaf.GaussianWhitening)
    extras = {"mean": first.mean, "whole": whole, "again": whole, "rows": whole[1:3]}
    flow.save(path, extras=extras)
    found = fastmaf.load_with_extras(path).extras
    assert found.keys() == extras.keys() and all(torch.equal(found[name], extras[name]) for name in extras)
    assert torch.equal(fastmaf.load(path).log_prob(pixels()), flow.log_prob(pixels()))


def test_extras_of_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="model file"):
        fastmaf.load_with_extras(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(fastmaf.CheckpointError, match="not a safetensors file"):
        fastmaf.load_with_extras(path)


def test_a_flow_of_few_bits_keeps_its_extras(tmp_path: Path) -> None:
    flow, x = build(13, dtype=torch.float32, whitening=2).to_inference(), normal(2, 13).float()
    flow.save(tmp_path / "model.safetensors", extras={"threshold": torch.tensor(1.5)})
    with shared_widths():
        saved = fastmaf.load_with_extras(tmp_path / "model.safetensors")
    assert float(saved.extras["threshold"]) == 1.5
    assert torch.equal(saved.flow.log_prob(x), flow.log_prob(x))
