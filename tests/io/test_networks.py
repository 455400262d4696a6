"""Model files of flows with residual blocks, contexts, other activations and dropout."""

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

OPTIONS: dict[str, dict[str, Any]] = {
    "residual": {"residual": True, "hidden_features": (7, 5, 7)},
    "context": {"context_features": 2, "activation": "silu"},
    "dropout": {"dropout": 0.25},
    "activations": {"activation": ("tanh", "identity")},
    "all": {"residual": True, "hidden_features": (7, 5, 7), "context_features": 3, "activation": "elu", "dropout": 0.5},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def spline_flow(**options: Any) -> fastmaf.Flow:
    spline = fastmaf.SplineMap(bins=3)
    options = {"hidden_features": (7, 5), **options}
    with shared_widths():
        made = fastmaf.MADE(
            13, outputs_per_feature=spline.outputs, generator=generator(), dtype=torch.float64, **options
        )
    return fastmaf.Flow(13, [fastmaf.MonotonicRQS(made, spline)])


@by_options
@pytest.mark.parametrize("make", [lambda **options: build(13, **options), spline_flow], ids=["affine", "spline"])
def test_save_and_load(tmp_path: Path, options: dict[str, Any], make: Callable[..., fastmaf.Flow]) -> None:
    flow, x = make(**options).eval(), normal(6, 13)
    context = [normal(6, options["context_features"])] if "context_features" in options else []
    flow.save(tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors").eval()
    assert again.config() == flow.config() and str(again) == str(flow)
    assert torch.equal(again.log_prob(x, *context), flow.log_prob(x, *context))
    assert torch.equal(again.inverse(x, *context)[0], flow.inverse(x, *context)[0])
    assert list(again.state_dict()) == list(flow.state_dict())
    assert all(p.requires_grad for p in again.parameters())
    made = again._mades()[0]
    assert made.dropout == options.get("dropout", 0.0) and made.activation == options.get("activation", "relu")


@by_options
def test_inference_copies(tmp_path: Path, options: dict[str, Any]) -> None:
    flow, x = build(13, dtype=torch.float32, **options), normal(6, 13, dtype=torch.float32)
    context = [normal(6, options["context_features"]).float()] if "context_features" in options else []
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        small = flow.to_inference(dtype)
        small.save(tmp_path / "model.safetensors")
        again = load(tmp_path / "model.safetensors")
        assert torch.equal(again.log_prob(x, *context), small.log_prob(x, *context))


def test_default_networks_are_written_as_before() -> None:
    keys = {"type", "features", "hidden_features", "activation", "strict", "log_scale_bound", "soft_bound"}
    assert build(5, blocks=1, order="natural").config()["transforms"][0].keys() == keys


def of_block(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return edit_config(lambda config: change(config["transforms"][0]) and None)


def other_degrees(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Of one of the layers that are added, with as many weights as they need."""
    set_tensor("degrees_2", poke(2))(tensors, metadata)
    for layer in ("hidden.2.weight", "output.weight"):
        set_tensor(layer, lambda t: torch.cat((t, t)))(tensors, metadata)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], None], str]] = {
    "no context weight": (set_tensor("context_layers.1.weight", lambda t: None), "context_layers.1.weight"),
    "turned context weight": (set_tensor("context_layers.0.weight", lambda t: t.t()), r"expected \(7, 3\)"),
    "NaN context weight": (set_tensor("context_layers.3.weight", poke(float("nan"))), "context_layers.3.*finite"),
    "another size": (of_block(lambda block: block.update(context_features=2)), r"expected \(7, 2\)"),
    "no context": (of_block(lambda block: block.pop("context_features")), "unexpected.*context_layers"),
    "size 0": (of_block(lambda block: block.update(context_features=0)), "context_features: expected a whole number"),
    "even": (of_block(lambda block: block.update(hidden_features=[7, 5])), "odd number of sizes"),
    "unequal": (of_block(lambda block: block.update(hidden_features=[7, 5, 6])), "odd number of sizes.*equal"),
    "words": (of_block(lambda block: block.update(residual="yes")), "residual: expected true or false"),
    "dropout": (of_block(lambda block: block.update(dropout=1.0)), "dropout: expected a finite number .* less than 1"),
    "few activations": (of_block(lambda block: block.update(activation=["elu"])), "expected one for each of 3 layers"),
    "activation": (
        of_block(lambda block: block.update(activation="mish")),
        "activation: expected one of .* or a list",
    ),
    "degrees": (other_degrees, "first, third, fifth, … hidden layer must be equal"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_contents_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.safetensors"
    edit, words = DAMAGE[name]
    build(13, blocks=1, order="natural", **OPTIONS["all"]).save(path)
    tensors, metadata = read(path)
    edit(tensors, metadata)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    refused(path, words)


@by_options
def test_state_dicts(options: dict[str, Any]) -> None:
    flow, other = build(13, **options), build(13, **{**options, "init": "identity"})
    other.load_state_dict(flow.state_dict())
    for a, b in zip(flow.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert set(build(13).state_dict()) <= set(build(13, context_features=2).state_dict())


@pytest.mark.parametrize("layer", [torch.nn.Linear(2, 32), torch.nn.Identity()])
def test_context_layers_that_files_do_not_hold_are_refused(tmp_path: Path, layer: torch.nn.Module) -> None:
    flow = build(13, context_features=2)
    flow._mades()[0].context_layers[0] = layer
    with pytest.raises(
        TypeError, match=r"context layer 0 of transforms\.\d\.made must be a torch\.nn\.Linear without bias"
    ):
        flow.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
