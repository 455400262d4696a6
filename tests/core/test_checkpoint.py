"""state_dict, copies, dtypes, and the one-file checkpoint with every way in which it can be wrong."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, build, generator, layers_of, many_tiles, normal, padding_of, train


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


def load(path: Path | str) -> fastmaf.MAF:
    """Loads a model of ``build``, whose small layers are cut into many tiles."""
    with many_tiles():
        return fastmaf.load(path)


def refused(path: Path, words: str, error: type[Exception] = fastmaf.CheckpointError) -> None:
    """Checks that loading fails with a message that names the file and, beside its path, matches ``words``."""
    with pytest.raises(error) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message, f"the message does not name the file: {message}"
    assert re.search(words, message.replace(str(path), "..."), re.DOTALL), (
        f"expected {words!r} in the message; found: {message}"
    )


def key_of(tensors: dict[str, Tensor], ending: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(ending))


@pytest.mark.parametrize("options", [
    {},
    {"degrees": "random", "order": "random", "blocks": 3, "hidden_features": (9, 4, 21)},
    {"degrees": "cyclic", "order": "natural", "log_scale_bound": None, "hidden_features": (6,)},
    {"log_scale_bound": 0.25, "soft_bound": True, "levels": 2},
    {"degrees": [torch.tensor([0, 13, 5, 5]), torch.tensor([7, 2])], "hidden_features": (4, 2), "dtype": torch.float32},
    {"init": "identity"},
], ids=lambda options: ",".join(options) or "defaults")  # fmt: skip
def test_save_and_load(tmp_path: Path, options: dict[str, Any]) -> None:
    flow = build(13, **options)
    dtype = next(flow.parameters()).dtype
    x = 2.0 * normal(6, 13, dtype=dtype)
    if "init" not in options:
        train(flow, normal(64, 13, seed=1, dtype=dtype), steps=3)
    flow.save(tmp_path / "sub folder" / "model.safetensors")
    assert [p.name for p in (tmp_path / "sub folder").iterdir()] == ["model.safetensors"], (
        "a temporary file was left behind"
    )
    again = load(tmp_path / "sub folder" / "model.safetensors")
    assert isinstance(again, fastmaf.MAF)
    assert next(again.parameters()).dtype == dtype
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(again.nll_per_dim(x), flow.nll_per_dim(x))
    assert torch.equal(again.sample(3, generator=generator()), flow.sample(3, generator=generator()))
    assert list(again.state_dict()) == list(flow.state_dict())
    assert all(p.requires_grad for p in again.parameters())
    again.save(tmp_path / "again.safetensors")
    assert torch.equal(load(str(tmp_path / "again.safetensors")).log_prob(x), flow.log_prob(x))


def test_production_layouts_survive(tmp_path: Path) -> None:
    """Saved under one tiling, as a file is; loading builds the tiles anew from the degrees."""
    flow = build(301, blocks=1, hidden_features=(160, 170), degrees="random", tiles="production")
    flow.save(tmp_path / "model.safetensors")
    again, x = fastmaf.load(tmp_path / "model.safetensors"), normal(3, 301)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


def test_a_leaky_model_stays_leaky(tmp_path: Path) -> None:
    flow = build(13, degrees="random", hidden_features=(20, 20), strict=False)
    flow.save(tmp_path / "model.safetensors")
    again, x = load(tmp_path / "model.safetensors"), normal(3, 13)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    with pytest.raises(fastmaf.NotInvertibleError):
        again.sample(1)


def test_metadata_of_the_user_is_kept(tmp_path: Path) -> None:
    flow = build(5)
    flow.save(tmp_path / "model.safetensors", {"epoch": "7"})
    assert read(tmp_path / "model.safetensors")[1]["epoch"] == "7"
    with pytest.raises(ValueError, match="fastmaf"):
        flow.save(tmp_path / "model.safetensors", {"fastmaf": "mine"})


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    flow = build(5)
    flow.save(path)
    before = path.read_bytes()

    def crash(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", crash)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(1.0)
    with pytest.raises(OSError, match="disk full"):
        flow.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left behind"


def test_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    flow = build(5)
    flow.save(tmp_path / "model.safetensors")
    load(tmp_path / "model.safetensors")


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nothing.safetensors", "model file", FileNotFoundError)
    refused(tmp_path, "model file|folder|directory", OSError)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 a zip, as torch.save writes", b"\x00" * 64, b"\xff" * 64],
    ids=["empty", "zip", "zeros", "ones"],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, "safetensors file")


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, -1])
def test_truncated_file(tmp_path: Path, part: float) -> None:
    path = tmp_path / "model.safetensors"
    build(13).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: -1 if part < 0 else int(part * len(content))])
    refused(path, "safetensors file")


def test_a_file_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for metadata in (None, {"format": "pt"}):
        save_file({"weight": torch.zeros(3)}, path, metadata)
        refused(path, "fastmaf")


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def edit(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        config = json.loads(metadata["fastmaf"])
        result = change(config)
        metadata["fastmaf"] = json.dumps(config if result is None else result)

    return edit


def set_tensor(
    ending: str, change: Callable[[Tensor], Tensor | None]
) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def edit(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        key = key_of(tensors, ending)
        tensor = change(tensors.pop(key).clone())
        if tensor is not None:
            tensors[key] = tensor

    return edit


def poke(value: float, where: int = 0) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[where] = value
        return tensor

    return change


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], None], str]] = {
    "NaN weight": (set_tensor("output.weight", poke(float("nan"))), "output.weight.*finite|finite.*output.weight"),
    "inf bias": (set_tensor("output.bias", poke(float("inf"))), "output.bias.*finite|finite.*output.bias"),
    "missing": (set_tensor("output.bias", lambda t: None), "output.bias"),
    "short weight": (set_tensor("output.weight", lambda t: t[:-1]), "output.weight"),
    "two-dimensional weight": (set_tensor("output.weight", lambda t: t[None]), "output.weight"),
    "long bias": (set_tensor("output.bias", lambda t: torch.cat((t, t))), "output.bias"),
    "integer weight": (set_tensor("output.weight", lambda t: t.long()), "output.weight"),
    "half bias": (set_tensor("output.bias", lambda t: t.half()), "float16"),
    "degree too large": (set_tensor("degrees_0", poke(99, -1)), "degree"),
    "negative degree": (set_tensor("degrees_0", poke(-1)), "degree"),
    "unsorted degrees": (set_tensor("degrees_0", lambda t: t.flip(0)), "degree|sorted"),
    "other number of degrees": (set_tensor("degrees_0", lambda t: t[:-1]), "degree|shape"),
    "float degrees": (set_tensor("degrees_0", lambda t: t.float() + 0.5), "degree"),
    "no degrees": (set_tensor("degrees_0", lambda t: None), "degrees_0"),
    "permutation twice the same": (set_tensor("permutation", poke(5, 0)), "permutation"),
    "permutation out of range": (set_tensor("permutation", poke(99, 0)), "permutation"),
    "no permutation": (set_tensor("permutation", lambda t: None), "permutation"),
    "extra tensor": (
        lambda tensors, metadata: tensors.update({"transforms.9.made.weight": torch.zeros(2)}),
        "transforms.9",
    ),
    "no JSON": (lambda tensors, metadata: metadata.update({"fastmaf": "{"}), "configuration|JSON|metadata"),
    "JSON list": (edit_config(lambda config: [1, 2]), "configuration|JSON|metadata|version|format"),
    "newer version": (edit_config(lambda config: config.update(version=99)), "99"),
    "no version": (edit_config(lambda config: config.pop("version") and None), "version|configuration|format"),
    "no features": (edit_config(lambda config: config.pop("features") and None), "features|configuration"),
    "other features": (edit_config(lambda config: config.update(features=14)), "14|features"),
    "words for features": (edit_config(lambda config: config.update(features="many")), "features|many|configuration"),
    "unknown transform": (edit_config(lambda config: config["transforms"][0].update(type="Spline")), "Spline"),
    "no transforms": (edit_config(lambda config: config.update(transforms=[])), "transforms"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_contents_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    edit, words = DAMAGE[name]
    build(13).save(path)
    tensors, metadata = read(path)
    edit(tensors, metadata)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    refused(path, words)


def test_editing_a_file_without_damage_loads(tmp_path: Path) -> None:
    """The editing above is not what makes those loads fail."""
    flow, path = build(13), tmp_path / "model.safetensors"
    flow.save(path)
    tensors, metadata = read(path)
    save_file(tensors, path, metadata)
    assert torch.equal(load(path).log_prob(normal(2, 13)), flow.log_prob(normal(2, 13)))


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
    "flat shape": (edit_transform(2, shape=[12]), r"shape.*\(12,\)"),
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
    found = fastmaf.read_extras(path)
    assert found.keys() == EXTRAS.keys()
    for name, expected in EXTRAS.items():
        assert found[name].dtype == expected.dtype and not found[name].requires_grad
        assert torch.equal(found[name].nan_to_num(), expected.detach().nan_to_num()), name
    again = fastmaf.load(path)
    assert torch.equal(again.log_prob(x), flow.log_prob(x)) and list(again.state_dict()) == list(flow.state_dict())
    assert read(path)[1]["epoch"] == "7"
    again.save(path)
    assert fastmaf.read_extras(path) == {}, "a flow does not know the extras of the file that it is from"


def test_no_extras(tmp_path: Path) -> None:
    flow = images()
    flow.save(tmp_path / "none.safetensors")
    flow.save(tmp_path / "empty.safetensors", extras={})
    assert fastmaf.read_extras(tmp_path / "none.safetensors") == {}
    assert (tmp_path / "none.safetensors").read_bytes() == (tmp_path / "empty.safetensors").read_bytes()


def test_extras_that_share_memory(tmp_path: Path) -> None:
    """With one another and with the flow: a file keeps values."""
    flow, path, whole = images(), tmp_path / "model.safetensors", normal(4, 3)
    first = flow.transforms[1]
    assert isinstance(first, fastmaf.GaussianWhitening)
    extras = {"mean": first.mean, "whole": whole, "again": whole, "rows": whole[1:3]}
    flow.save(path, extras=extras)
    found = fastmaf.read_extras(path)
    assert found.keys() == extras.keys() and all(torch.equal(found[name], extras[name]) for name in extras)
    assert torch.equal(fastmaf.load(path).log_prob(pixels()), flow.log_prob(pixels()))


def test_extras_of_no_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="model file"):
        fastmaf.read_extras(path)
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(fastmaf.CheckpointError, match="not a safetensors file"):
        fastmaf.read_extras(path)


def test_a_flow_of_few_bits_keeps_its_extras(tmp_path: Path) -> None:
    flow = build(13, dtype=torch.float32, whitening=2).to_inference()
    flow.save(tmp_path / "model.safetensors", extras={"threshold": torch.tensor(1.5)})
    assert float(fastmaf.read_extras(tmp_path / "model.safetensors")["threshold"]) == 1.5
    assert torch.equal(
        load(tmp_path / "model.safetensors").log_prob(normal(2, 13).float()), flow.log_prob(normal(2, 13).float())
    )


def dirty(flow: fastmaf.MAF) -> tuple[str, int]:
    """Returns the state_dict key of a weight with padding, and where a number of its padding lies."""
    for name, layer in layers_of(flow).items():
        where = padding_of(layer).nonzero()
        if where.numel():
            return f"{name}.weight", int(where[-1])
    raise AssertionError("no padding")


def test_numbers_in_the_padding_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    flow = build(13, tiles="production")
    key, where = dirty(flow)
    flow.save(path)
    tensors, metadata = read(path)
    tensors[key][where] = 1e-20
    save_file(tensors, path, metadata)
    with pytest.raises(fastmaf.CheckpointError) as caught:
        fastmaf.load(path)
    assert key in str(caught.value) and "mask hides" in str(caught.value).replace(str(path), "")

    state = flow.state_dict()
    state[key] = state[key].clone()
    state[key][where] = 1e-20
    with pytest.raises(ValueError, match=f"{key}.*mask hides"):
        build(13, tiles="production").load_state_dict(state)


def test_state_dict_round_trip() -> None:
    flow, other, x = build(13, degrees="random"), build(13, degrees="random"), normal(4, 13)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not torch.equal(other.log_prob(x), flow.log_prob(x))
    result = other.load_state_dict(copy.deepcopy(flow.state_dict()))
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(other.log_prob(x), flow.log_prob(x))


def test_a_state_dict_of_another_dtype() -> None:
    flow, single = build(13), build(13, dtype=torch.float32)
    single.load_state_dict(flow.state_dict())
    assert next(single.parameters()).dtype == torch.float32
    assert torch.equal(single.log_prob(normal(2, 13).float()), flow.float().log_prob(normal(2, 13).float()))


@pytest.mark.parametrize("other", [{"seed": 1}, {"degrees": "spread"}, {"levels": 2}], ids=str)
def test_a_state_dict_of_other_degrees_is_refused(other: dict[str, Any]) -> None:
    """Same shapes of all parameters, another meaning of each number."""
    flow = build(13, degrees="random", tiles="one")
    with pytest.raises(ValueError, match="degrees"):
        build(13, **{"degrees": "random", "tiles": "one", **other}).load_state_dict(flow.state_dict())


def test_a_state_dict_carries_its_order() -> None:
    """Orders are kept in the state_dict, so a model of another order becomes the saved one, its inverse included."""
    flow, other, x = build(13, order="random"), build(13, order="random", seed=1), normal(3, 13)
    other.load_state_dict(flow.state_dict())
    assert torch.equal(other.log_prob(x), flow.log_prob(x))
    assert torch.equal(other.inverse(x)[0], flow.inverse(x)[0])


def test_a_state_dict_of_other_shapes_is_refused() -> None:
    with pytest.raises((ValueError, RuntimeError)):
        build(13, hidden_features=(8, 5)).load_state_dict(build(13).state_dict())
    with pytest.raises(RuntimeError, match="Missing key"):
        build(13, blocks=3, order="natural").load_state_dict(build(13, order="natural").state_dict())


def test_deepcopy_is_independent() -> None:
    flow, x = build(13), normal(4, 13)
    twin, before = copy.deepcopy(flow), flow.log_prob(x)
    assert torch.equal(twin.log_prob(x), before)
    train(twin, normal(64, 13), steps=2)
    assert torch.equal(flow.log_prob(x), before) and not torch.equal(twin.log_prob(x), before)
    assert all(layer.layout.padding_is_zero(layer.weight) for layer in layers_of(twin).values())


def test_changing_dtype_and_back() -> None:
    flow = build(13, dtype=torch.float32)
    x = normal(4, 13, dtype=torch.float32)
    before = flow.log_prob(x)
    assert flow.to(torch.float64).log_prob(x.double()).dtype == torch.float64
    assert blocks_of(flow)[0].made.degrees[0].dtype == torch.int32, "degrees are no floats"
    assert torch.equal(flow.double().float().log_prob(x), before)
    train(flow.double(), normal(64, 13), steps=2)
    assert all(layer.layout.padding_is_zero(layer.weight) for layer in layers_of(flow).values())
