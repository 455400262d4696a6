"""Validation of the tensors of a flow in a model file against its configuration."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from fastmaf.degrees import input_degrees, prefix
from fastmaf.io.base_kinds import Config, Expected
from fastmaf.io.flow_config import parts
from fastmaf.io.safe_json import shown
from fastmaf.io.schema import SchemaError
from fastmaf.io.tensor_file import TensorFile, TensorInfo
from fastmaf.kernels import PackedLayout
from fastmaf.kernels.float8 import FLOAT8, is_factor
from fastmaf.kernels.layout import decreases

EXTRA = "extra."  # prefix of the names of further tensors

# Limits how many numbers a flow may have in memory for those in its file. Layers of few rows are padded to 16 of them.
_GROWTH, _SMALL = 16, 2**24
_ORTHONORMAL = 1e-2  # tolerance of the norm of a factor, for float16


def flow_tensors(file: TensorFile, config: Config) -> dict[str, Tensor]:
    """Returns the tensors of the flow that a validated configuration describes, except for its packed weights.

    Packed weights are read into the flow once it is built, by ``fastmaf.io.packed_weights``; that they have at least as
    many numbers as their layers need is checked here. Those of transforms of users are returned as they are stored.

    Raises:
        ValueError: a tensor is missing or unexpected, or has another shape or dtype or invalid values.
        CheckpointError: the file was truncated.
    """
    infos = {name: info for name, info in file.tensors.items() if not name.startswith(EXTRA)}
    expected = {
        f"{place}{name}": tensor
        for place, entry, kind, _ in parts(config)
        if kind is not None
        for name, tensor in kind.tensors(entry, config["features"]).items()
    }
    _check_names(infos, expected, config)
    _check_shapes(infos, expected)
    tensors = {name: file.read(name) for name in infos if name not in expected or expected[name].dtype != "weight"}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise SchemaError(f"tensor {shown(name)} holds values that are not finite")
    stored = 0
    for place, entry, kind, _ in parts(config):
        if kind is not None:
            _check_logs(tensors, place)
        if entry["type"] == "gaussian_whitening":
            _check_whitening(tensors, place)
        elif entry["type"] == "batch_norm":
            if (least := float(tensors[f"{place}running_var"].min())) < 0:
                raise SchemaError(f"tensor {place}running_var must be not negative; found {least}")
        elif entry["type"] == "affine_autoregressive":
            _check_scales(tensors, f"{place}made.")
            stored += _packed_numel(infos, tensors, f"{place}made.", entry, config["features"])
    numel = sum(math.prod(info.shape) for info in infos.values())
    if stored > _GROWTH * numel + _SMALL:
        raise SchemaError(f"its {numel} numbers would take {stored} in memory: the degrees are not those of a flow")
    return tensors


def _check_names(infos: Mapping[str, TensorInfo], expected: Mapping[str, Expected], config: Config) -> None:
    # Registered classes of users validate their tensors themselves.
    of_users = tuple(part.place for part in parts(config) if part.kind is None)
    missing = sorted(expected.keys() - infos.keys())
    extra = sorted(name for name in infos.keys() - expected.keys() if not name.startswith(of_users))
    if missing or extra:
        raise SchemaError(
            f"tensor names do not fit the configuration: missing {shown(missing[:3]) if missing else 'none'}, "
            f"unexpected {shown(extra[:3]) if extra else 'none'}"
        )


def _check_shapes(infos: Mapping[str, TensorInfo], expected: Mapping[str, Expected]) -> None:
    """Checks shapes and dtypes; all floating-point tensors have the same dtype, except rounded weights."""
    floating = [infos[name].dtype for name, tensor in expected.items() if tensor.dtype == "flow"]
    dtype = floating[0] if floating else torch.float32
    if dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        first = next(name for name, tensor in expected.items() if tensor.dtype == "flow")
        raise SchemaError(f"tensor {first}: expected a floating-point dtype; found {dtype}")
    for name, tensor in expected.items():
        info = infos[name]
        weights = tensor.dtype == "weight" and info.dtype in (torch.bfloat16, FLOAT8)
        wanted = tensor.dtype if isinstance(tensor.dtype, torch.dtype) else info.dtype if weights else dtype
        shape = info.shape if tensor.shape is None and len(info.shape) == 1 else tensor.shape
        if info.shape != shape or info.dtype != wanted:
            described = "1-D" if shape is None else shape
            raise SchemaError(f"tensor {name}: expected {described} {wanted}, found {shown(info.shape)} {info.dtype}")


def _check_scales(tensors: Mapping[str, Tensor], name: str) -> None:
    for field, tensor in tensors.items():
        if field.startswith(name) and field.endswith(".weight_scale") and not is_factor(scale := float(tensor)):
            raise SchemaError(f"tensor {field} must be a power of two, the factor of float8 weights; found {scale}")


def _check_logs(tensors: Mapping[str, Tensor], place: str) -> None:
    """Checks that what is stored as its logarithm is in the range of the dtype."""
    for name in (f"{place}log_scale", f"{place}log_df"):
        if (tensor := tensors.get(name)) is not None and tensor.numel():
            most, largest = float(tensor.abs().max()), -math.log(torch.finfo(tensor.dtype).tiny)
            if most > largest:
                raise SchemaError(f"tensor {name} must be at most {largest:.3g} in size; found {most}")


def _check_whitening(tensors: Mapping[str, Tensor], name: str) -> None:
    scale, variance, factors = (tensors[f"{name}{field}"] for field in ("scale", "variance", "factors"))
    largest = math.sqrt(torch.finfo(scale.dtype).max)  # products of two larger values overflow
    for field, tensor in (("scale", scale), ("variance", variance), ("mean", tensors[f"{name}mean"])):
        if tensor.numel() and (most := float(tensor.abs().max())) > largest:
            raise SchemaError(f"tensor {name}{field} must be at most {largest:.3g}; found {most}")
    if (least := float(scale.min())) * largest < 1:
        bound = "positive" if least <= 0 else f"at least {1 / largest:.3g}"
        raise SchemaError(f"tensor {name}scale must be {bound}; found {least}")
    if variance.numel() and (least := float(variance.min())) < 0:
        raise SchemaError(f"tensor {name}variance must be not negative; found {least}")
    norms = torch.linalg.vector_norm(factors, dim=0, dtype=torch.float64)
    wrong = norms[((norms - 1).abs() > _ORTHONORMAL) & (norms != 0)]
    if len(wrong):
        raise SchemaError(f"tensor {name}factors must have columns of norm 1, or 0; found {float(wrong[0])}")


def _packed_numel(
    infos: Mapping[str, TensorInfo], tensors: Mapping[str, Tensor], name: str, entry: Config, features: int
) -> int:
    """Returns the size of the weights of a block in memory, having checked that the file has enough."""
    hidden = [tensors[f"{name}degrees_{k}"] for k in range(len(entry["hidden_features"]))]
    for k, degrees in enumerate(hidden):
        if decreases(degrees) or int(degrees[0]) < 0 or int(degrees[-1]) > features:
            raise SchemaError(f"tensor {name}degrees_{k} must hold degrees in 0..{features}, sorted")
    layers = [*(f"{name}hidden.{k}" for k in range(len(hidden))), f"{name}output"]
    sizes = _sizes(features, entry["strict"], tuple(degrees.numpy().tobytes() for degrees in hidden))
    for layer, (visible, _) in zip(layers, sizes, strict=True):
        (numel,) = infos[f"{layer}.weight"].shape
        if visible > numel:
            raise SchemaError(f"tensor {layer}.weight must hold {visible} weights or more; found {numel}")
    return sum(stored for _, stored in sizes)


@functools.lru_cache(maxsize=1)  # the blocks of most flows have the same degrees
def _sizes(features: int, strict: bool, hidden: tuple[bytes, ...]) -> list[tuple[int, int]]:
    """Returns how many weights of each layer are visible and stored, for the int32 degrees of the hidden layers."""
    inputs = input_degrees(features)
    degrees = [torch.frombuffer(bytearray(values), dtype=torch.int32).long() for values in hidden]
    sizes: list[tuple[int, int]] = []
    for below, above in pairwise([inputs, *degrees, inputs.repeat_interleave(2)]):
        layout = PackedLayout(prefix(below, above, strict=strict and len(sizes) == len(hidden)), below.numel())
        sizes.append((layout.visible, layout.numel))
    return sizes
