"""The tensors of a flow in a model file, checked against its configuration before anything is built from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fastmaf.degrees import input_degrees, prefix
from fastmaf.io.flow_config import FLOATS, KINDS, Config, Expected
from fastmaf.io.safe_json import shown
from fastmaf.io.schema import SchemaError
from fastmaf.io.tensor_file import TensorFile, TensorInfo
from fastmaf.io.tiles import repacked
from fastmaf.kernels import PackedLayout

EXTRA = "extra."  # begins the names of tensors that are not the flow's

_ORTHONORMAL = 1e-2  # how far a factor's norm may be from 1: that of float16's rounding


def flow_tensors(file: TensorFile, config: Config) -> dict[str, Tensor]:
    """Returns the tensors of the flow that a checked configuration describes, in this version's packing.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or dtype, or holds values that it may not.
        CheckpointError: the file has become shorter.
    """
    found = {name: info for name, info in file.tensors.items() if not name.startswith(EXTRA)}
    expected = {f"transforms.{i}.{name}": tensor for i, _, own in _kinds(config) for name, tensor in own.items()}
    _check_names(found, expected, config)
    _check_shapes(found, expected)
    tensors = {name: file.read(name) for name in found}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SchemaError(f"tensor {shown(name)} holds values that are not finite")
    for i, entry, _ in _kinds(config):
        if entry["type"] == "gaussian_whitening":
            _check_whitening(tensors, f"transforms.{i}.")
        elif entry["type"] == "affine_autoregressive":
            layouts = _layouts(tensors, f"transforms.{i}.made.", entry, config["features"])
            for name, layout in layouts.items():
                weight = f"{name}.weight"
                tensors[weight] = repacked(layout, config["tiles"].get(name, []), tensors[weight], name)
    return tensors


def _kinds(config: Config) -> Iterator[tuple[int, Config, dict[str, Expected]]]:
    """Yields place, configuration and expected tensors of each transform of a known kind."""
    for i, entry in enumerate(config["transforms"]):
        if entry["type"] in KINDS:
            yield i, entry, KINDS[entry["type"]].tensors(entry, config["features"])


def _check_names(found: Mapping[str, TensorInfo], expected: Mapping[str, Expected], config: Config) -> None:
    # A transform of a registered class that is not fastmaf's own knows its tensors itself.
    own = {f"transforms.{i}" for i, entry in enumerate(config["transforms"]) if entry["type"] not in KINDS}
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(name for name in found.keys() - expected.keys() if ".".join(name.split(".", 2)[:2]) not in own)
    if missing or extra:
        raise SchemaError(
            f"tensor names do not fit the configuration: missing {shown(missing[:3]) if missing else 'none'}, "
            f"unexpected {shown(extra[:3]) if extra else 'none'}"
        )


def _check_shapes(found: Mapping[str, TensorInfo], expected: Mapping[str, Expected]) -> None:
    """Checks shapes and dtypes; all floating-point tensors have that of the first, but for rounded weights."""
    floating = [found[name].dtype for name, tensor in expected.items() if tensor.dtype == "flow"]
    dtype = floating[0] if floating else torch.float32
    if dtype not in FLOATS:
        first = next(name for name, tensor in expected.items() if tensor.dtype == "flow")
        raise SchemaError(f"tensor {first}: expected a floating-point dtype; found {dtype}")
    for name, tensor in expected.items():
        info = found[name]
        weights = tensor.dtype == "weight" and info.dtype == torch.bfloat16
        wanted = tensor.dtype if isinstance(tensor.dtype, torch.dtype) else info.dtype if weights else dtype
        shape = info.shape if tensor.shape is None and len(info.shape) == 1 else tensor.shape
        if info.shape != shape or info.dtype != wanted:
            described = "1-D" if shape is None else shape
            raise SchemaError(f"tensor {name}: expected {described} {wanted}, found {shown(info.shape)} {info.dtype}")


def _check_whitening(tensors: Mapping[str, Tensor], name: str) -> None:
    scale, variance, factors = (tensors[f"{name}{field}"] for field in ("scale", "variance", "factors"))
    # Beyond the root of the largest number, products of two values overflow.
    largest = math.sqrt(torch.finfo(scale.dtype).max)
    for field, tensor in (("scale", scale), ("variance", variance), ("mean", tensors[f"{name}mean"])):
        if tensor.numel() and float(tensor.abs().max()) > largest:
            raise SchemaError(f"tensor {name}{field} must be at most {largest:.3g}; found {float(tensor.abs().max())}")
    if float(scale.min()) * largest < 1:
        bound = "positive" if float(scale.min()) <= 0 else f"at least {1 / largest:.3g}"
        raise SchemaError(f"tensor {name}scale must be {bound}; found {float(scale.min())}")
    if variance.numel() and float(variance.min()) < 0:
        raise SchemaError(f"tensor {name}variance must be not negative; found {float(variance.min())}")
    norms = torch.linalg.vector_norm(factors, dim=0, dtype=torch.float64)
    odd = norms[((norms - 1).abs() > _ORTHONORMAL) & (norms != 0)]
    if len(odd):
        raise SchemaError(f"tensor {name}factors must have columns of norm 1, or 0; found {float(odd[0])}")


def _layouts(tensors: Mapping[str, Tensor], name: str, entry: Config, features: int) -> dict[str, PackedLayout]:
    """Returns the layouts of a block's layers, by name, none of them larger than the weights' tensors allow."""
    inputs = input_degrees(features)
    hidden = [tensors[f"{name}degrees_{k}"].long() for k in range(len(entry["hidden_features"]))]
    for k, degrees in enumerate(hidden):
        if bool((degrees[1:] < degrees[:-1]).any()) or int(degrees[0]) < 0 or int(degrees[-1]) > features:
            raise SchemaError(f"tensor {name}degrees_{k} must hold degrees in 0..{features}, sorted")
    names = [*(f"{name}hidden.{k}" for k in range(len(hidden))), f"{name}output"]
    units = [inputs, *hidden, inputs.repeat_interleave(2)]
    layouts = {}
    for layer, below, above in zip(names, units[:-1], units[1:], strict=True):
        last = layer == names[-1]
        seen = prefix(below, above, strict=last and entry["strict"])
        stored = tensors[f"{layer}.weight"].numel()
        if int(seen.sum()) > stored:
            raise SchemaError(f"tensor {layer}.weight must hold {int(seen.sum())} weights or more; found {stored}")
        layouts[layer] = PackedLayout(seen, below.numel(), group=2 if last else 1)
    return layouts
