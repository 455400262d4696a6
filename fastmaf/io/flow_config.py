"""The schema of a flow's configuration in a model file, and the tensors that it requires::

    {"version": 2, "class": "MAF", "features": D, "transforms": [{"type": ..., ...}, ...], "base": {"type": ..., ...}}

Without a ``"base"`` it is the standard normal distribution. The sizes of all tensors except packed weights follow from
the configuration, so that a file is checked before anything is built. Packed weights are stored row after row, the
visible weights alone. In files of version 1 they are in tiles, which an entry ``"tiles": {layer: [...]}`` states.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch

from fastmaf.io.base_kinds import BASE_KINDS, Config, Expected, Kind, vectors
from fastmaf.io.base_kinds import FEATURES as _FEATURES
from fastmaf.io.safe_json import parse, shown
from fastmaf.io.schema import (
    Anything,
    Field,
    Flag,
    ListOf,
    MapOf,
    Maybe,
    Number,
    OneOf,
    Record,
    SchemaError,
    Text,
    Whole,
)
from fastmaf.kernels.activations import ACTIVATIONS
from fastmaf.kernels.affine_output.affine_map import FORMS, SCALES
from fastmaf.kernels.float8 import FLOAT8

FORMAT_VERSION = 2
_VERSIONS = (1, 2)  # that can be read
KEY = "fastmaf"  # the key of the configuration in the metadata
_WHERE = "configuration"  # the beginning of paths in messages
TILES = f"{_WHERE}.tiles"


def _affine(config: Config, features: int) -> dict[str, Expected]:
    if config["soft_bound"] and config["log_scale_bound"] is None:
        raise SchemaError("log_scale_bound: expected a number, as soft_bound is true; found None")
    return _network(config, 2 * features)


def _network(config: Config, outputs: int) -> dict[str, Expected]:
    hidden, context = config["hidden_features"], config.get("context_features", 0)
    if config.get("residual") and (len(hidden) % 2 == 0 or len(set(hidden[::2])) > 1):
        raise SchemaError(
            "hidden_features: expected an odd number of sizes, the first, third, fifth, … equal, as residual is true; "
            f"found {shown(hidden)}"
        )
    if isinstance(config["activation"], list) and len(config["activation"]) != len(hidden):
        raise SchemaError(
            f"activation: expected one for each of {len(hidden)} layers; found {shown(config['activation'])}"
        )
    tensors: dict[str, Expected] = {}
    for k, units in enumerate(hidden):
        tensors[f"made.degrees_{k}"] = Expected((units,), torch.int32)
        tensors[f"made.hidden.{k}.weight"] = Expected(None, "weight")
        tensors[f"made.hidden.{k}.bias"] = Expected((units,))
    tensors |= {"made.output.weight": Expected(None, "weight"), "made.output.bias": Expected((outputs,))}
    if config.get("weight_dtype") == str(FLOAT8):
        weights = [name for name, tensor in tensors.items() if tensor.dtype == "weight"]
        tensors |= {f"{name}_scale": Expected((), torch.float32) for name in weights}
    for k, units in enumerate([*hidden, outputs] if context else []):
        tensors[f"made.context_layers.{k}.weight"] = Expected((units, context))
    return tensors


def _spline(config: Config, features: int) -> dict[str, Expected]:
    spline = config["spline"]
    return _network(config, (3 * spline["bins"] + (-1 if spline["tails"] else 1)) * features)


def _whitening(config: Config, features: int) -> dict[str, Expected]:
    rank = config["rank"]
    if rank > features:
        raise SchemaError(f"rank: expected at most {features}, the features; found {rank}")
    line, factors = Expected((features,)), Expected((features, rank))
    return {"mean": line, "scale": line, "factors": factors, "variance": Expected((rank,))}


def _act_norm(config: Config, features: int) -> dict[str, Expected]:
    return {**vectors("shift", "log_scale")(config, features), "initialized": Expected((), torch.bool)}


def _local(config: Config, features: int) -> dict[str, Expected]:
    (channels, height, width), patch, kernel = config["shape"], config["patch"], config["kernel"]
    if (numbers := channels * height * width) != features:
        raise SchemaError(f"shape: expected {features} numbers, the features; found {numbers} in {config['shape']}")
    if patch & (patch - 1) or height % patch or width % patch:
        raise SchemaError(f"patch: expected a power of two that divides {height} and {width}; found {patch}")
    if kernel % 2 == 0:
        raise SchemaError(f"kernel: expected an odd number; found {kernel}")
    degrees, window = channels * patch**2, (kernel, kernel)
    units = degrees * config["hidden"]
    return {
        "linear.weight": Expected((degrees, degrees, *window)),
        "first.weight": Expected((units, degrees, *window)),
        "first.bias": Expected((units,)),
        "second.weight": Expected((2 * degrees, units, *window)),
        "second.bias": Expected((2 * degrees,)),
    }


class _Activation(Field):
    """The name of an activation, or a list with one for each hidden layer."""

    def __init__(self) -> None:
        one = OneOf(ACTIVATIONS)
        super().__init__(
            f"{one.expected}, or a list of these",
            lambda value: one.accepts(value) or (isinstance(value, list) and all(map(one.accepts, value))),
        )


_TEXT = Text(10_000_000)  # a configuration of a hundred blocks of 12,288 dimensions has 200 kB
_NATS = Number(low=1e-30, high=1e30)  # within the range of float32

_NETWORK: dict[str, Field] = {
    "features": _FEATURES,
    "hidden_features": ListOf(_FEATURES, shortest=1, longest=1024),
    "activation": _Activation(),
}
_OF_NETWORKS: dict[str, Field] = {  # where they are not the default
    "weight_dtype": OneOf((str(torch.bfloat16), str(FLOAT8))),
    "residual": Flag(),
    "context_features": _FEATURES,
    "dropout": Number(above=0, below=1),
}
_MAP = Record(
    {
        "form": OneOf(FORMS),
        "scale": OneOf(SCALES),
        "limit": Maybe(Number(low=-1e30, high=1e30)),
        "epsilon": Number(low=0, high=1e30),
    }
)
_AFFINE = Record(
    {
        **_NETWORK,
        "strict": Flag(),
        "log_scale_bound": Maybe(_NATS),
        "soft_bound": Flag(),
    },
    optional={**_OF_NETWORKS, "affine_map": _MAP},
)
_SPLINE = Record(
    {
        **_NETWORK,
        "spline": Record(
            {
                "bins": Whole(1, 2**16),
                "low": Number(low=-1e30, high=1e30),
                "high": Number(low=-1e30, high=1e30),
                "tails": Flag(),
                "least": Number(above=0, below=1),
                "squash": Flag(),
            }
        ),
    },
    optional=_OF_NETWORKS,
)
_LOCAL = Record(
    {
        "shape": ListOf(_FEATURES, shortest=3, longest=3),
        "patch": Whole(1),
        "kernel": Whole(1, 2**16),
        "hidden": Whole(),
        "reverse": Flag(),
        "log_scale_bound": _NATS,
    }
)
_BATCH_NORM = Record({"features": _FEATURES, "eps": Number(low=1e-30, high=1e30), "momentum": Number(low=0, high=1)})
KINDS: dict[str, Kind] = {
    "permutation": Kind(Record(), lambda config, features: {"permutation": Expected((features,), torch.int64)}),
    "logit": Kind(Record({"features": _FEATURES, "alpha": Number(low=0, below=0.5)}), lambda config, features: {}),
    "affine_autoregressive": Kind(_AFFINE, _affine),
    "gaussian_whitening": Kind(Record({"features": _FEATURES, "rank": Whole()}), _whitening),
    "monotonic_rqs": Kind(_SPLINE, _spline),
    "elementwise_affine": Kind(Record({"features": _FEATURES}), vectors("shift", "log_scale")),
    "local_autoregressive": Kind(_LOCAL, _local),
    "act_norm": Kind(Record({"features": _FEATURES}), _act_norm),
    "batch_norm": Kind(_BATCH_NORM, vectors("shift", "log_scale", "running_mean", "running_var")),
}
_INVERTED = "inverted"  # the type of an entry that holds the one of another transform


class Part(NamedTuple):
    """A transform or the base of a flow, as a configuration describes it.

    Attributes:
        place: the beginning of the names of its tensors.
        entry: its configuration.
        kind: its schema; None for the classes of users.
        inverted: whether it is a transform within an inverted one.
    """

    place: str
    entry: Config
    kind: Kind | None
    inverted: bool = False


def parts(config: Config) -> Iterator[Part]:
    """Yields the transforms of a configuration, those within inverted ones in their place, and the base, if any."""
    for i, entry in enumerate(config["transforms"]):
        place, inverted = f"transforms.{i}.", entry["type"] == _INVERTED
        if inverted:
            place, entry = f"{place}transform.", entry["transform"]
        yield Part(place, entry, KINDS.get(entry["type"]), inverted)
    if (base := config.get("base")) is not None:
        yield Part("base.", base, BASE_KINDS.get(base["type"]))


def flow_config(metadata: Mapping[str, str], types: tuple[str, ...], bases: tuple[str, ...]) -> dict[str, Any]:
    """Returns the validated configuration in the metadata of a file whose transforms and base are of these types.

    Those of types that are not in ``KINDS`` or ``BASE_KINDS`` validate their configuration themselves.

    Raises:
        ValueError: there is no configuration, or it violates the schema.
    """
    if KEY not in metadata:
        raise SchemaError(
            f"a safetensors file, but not a fastmaf model: its metadata has no {KEY!r} entry (found "
            f"{shown(sorted(metadata)) if metadata else 'none'})"
        )
    _TEXT.check(metadata[KEY], _WHERE)
    config: dict[str, Any] = parse(metadata[KEY], _WHERE)
    version = config.get("version") if isinstance(config, dict) else None
    if type(version) is int and version not in _VERSIONS:
        known = " and ".join(map(str, _VERSIONS))
        raise SchemaError(f"format version {shown(version)}; this fastmaf reads versions {known}: update fastmaf")
    has_tiles = type(version) is int and version == 1
    schema = Record(
        {
            "version": Whole(),
            "class": OneOf(("MAF", "Flow", "IAF")),
            "features": _FEATURES,
            "transforms": ListOf(_one_of(types), longest=4096),
            **({"tiles": MapOf(ListOf(Anything()))} if has_tiles else {}),
        },
        # For "shared" see ``fastmaf.sharing.shared_parts``.
        optional={"shared": MapOf(Text()), "base": _one_of(bases)},
    )
    schema.check(config, _WHERE)
    inverted = Record({"type": OneOf((_INVERTED,)), "transform": _one_of(t for t in types if t != _INVERTED)})
    for i, entry in enumerate(config["transforms"]):
        if entry["type"] == _INVERTED:
            inverted.check(entry, f"{_WHERE}.transforms[{i}]")
    for part in parts(config):
        _check_part(part, config["features"])
    return config


def _one_of(types: Iterable[str]) -> Record:
    return Record({"type": OneOf(types)}, others=Anything())


def _check_part(part: Part, features: int) -> None:
    _, entry, kind, _ = part
    if kind is None:
        return
    where = re.sub(r"\.(\d+)", r"[\1]", f"{_WHERE}.{part.place[:-1]}")  # as messages name entries of a list
    kind.schema.check({key: value for key, value in entry.items() if key != "type"}, where)
    if entry.get("features", features) != features:
        raise SchemaError(f"{where}.features: expected {features}, the flow's; found {entry['features']}")
    try:
        kind.tensors(entry, features)
    except SchemaError as error:
        raise SchemaError(f"{where}.{error}") from None
