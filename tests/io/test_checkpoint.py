"""state_dict, copies, dtypes, and the one-file checkpoint with every way in which it can be wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import fastmaf
from tests.core.helpers import blocks_of, build, generator, layers_of, normal, padding_of, train
from tests.io.checkpoint_files import edit_config, load, poke, read, refused, set_tensor


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
    """Saved from one layout and loaded into another: panels share other widths."""
    flow = build(301, blocks=1, hidden_features=(160, 170), degrees="random")
    flow.save(tmp_path / "model.safetensors")
    again, x = fastmaf.load(tmp_path / "model.safetensors"), normal(3, 301)
    assert again.stored_weights < flow.stored_weights
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
    refused(tmp_path, "no model file at .*; it is a folder", OSError)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 a zip, as torch.save writes", b"\x00" * 64, b"\xff" * 64],
    ids=["empty", "zip", "zeros", "ones"],
)
def test_what_is_no_safetensors_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    refused(path, "safetensors file")


def test_a_flow_without_numbers_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(ValueError, match="is on the device 'meta' and holds no numbers to save"):
        fastmaf.MAF(3, 2, 8, device="meta").save(path)
    assert not path.exists()


def test_a_state_dict_of_torch_save_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(build(5).state_dict(), path)
    refused(path, "zip archive, such as torch.save writes")


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


def dirty(flow: fastmaf.MAF) -> tuple[str, int]:
    """Returns the state_dict key of a weight with padding, and where a number of its padding lies."""
    for name, layer in layers_of(flow).items():
        where = padding_of(layer).nonzero()
        if where.numel():
            return f"{name}.weight", int(where[-1])
    raise AssertionError("no padding")


def test_numbers_in_the_padding_of_a_state_dict_are_refused() -> None:
    flow = build(13)
    key, where = dirty(flow)
    state = flow.state_dict()
    state[key] = state[key].clone()
    state[key][where] = 1e-20
    with pytest.raises(ValueError, match=f"{key}.*mask hides"):
        build(13).load_state_dict(state)


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
    flow = build(13, degrees="random")
    with pytest.raises(ValueError, match="degrees"):
        build(13, **{"degrees": "random", **other}).load_state_dict(flow.state_dict())


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


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_flow_that_is_not_finite_does_not_replace_a_good_file(tmp_path: Path, value: float) -> None:
    """``load`` refuses such numbers: what a diverged run saves last must not be all that is left."""
    flow, path = build(6, hidden_features=(5,), seed=0), tmp_path / "model.safetensors"
    flow.save(path)
    before = path.read_bytes()
    with torch.no_grad():
        next(p for name, p in flow.named_parameters() if name.endswith("output.bias"))[3] = value
    with pytest.raises(ValueError, match=r"output\.bias holds numbers that are not finite"):
        flow.save(path)
    assert path.read_bytes() == before
    fastmaf.load(path)
