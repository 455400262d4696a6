"""Schemas of the bases of flows in model files, and what a schema consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import torch

from fastmaf.io.schema import Flag, Record, SchemaError, Whole

FEATURES = Whole(1, 2**28)

Config: TypeAlias = Mapping[str, Any]


class Expected(NamedTuple):
    """A tensor that a configuration requires.

    Attributes:
        shape: None for packed weights, whose length follows from the degrees.
        dtype: a dtype, ``"flow"`` for the dtype of the flow, or ``"weight"`` for that of the packed weights.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | Literal["flow", "weight"] = "flow"


class Kind(NamedTuple):
    """The schema of one type of transform or base.

    Attributes:
        schema: that of its configuration, without the entry ``"type"``.
        tensors: a function from the configuration and the number of features to the required tensors by name. Raises
            SchemaError if entries contradict each other.
    """

    schema: Record
    tensors: Callable[[Config, int], dict[str, Expected]]


def vectors(*names: str) -> Callable[[Config, int], dict[str, Expected]]:
    """Returns a function that expects vectors of one number for each dimension."""
    return lambda config, features: {name: Expected((features,)) for name in names}


def _low_rank(config: Config, features: int) -> dict[str, Expected]:
    if (rank := config["rank"]) > features:
        raise SchemaError(f"rank: expected at most {features}, the features; found {rank}")
    return {**vectors("loc", "log_scale")(config, features), "factors": Expected((features, rank))}


def _mixture(config: Config, features: int) -> dict[str, Expected]:
    components = config["components"]
    matrix = Expected((components, features))
    return {"logits": Expected((components,)), "loc": matrix, "log_scale": matrix}


_TRAINABLE = Record({"features": FEATURES, "trainable": Flag()})
BASE_KINDS: dict[str, Kind] = {
    "standard_normal": Kind(Record({"features": FEATURES}), vectors()),
    "diagonal_gaussian": Kind(_TRAINABLE, vectors("loc", "log_scale")),
    "low_rank_gaussian": Kind(Record({"features": FEATURES, "rank": Whole(1)}), _low_rank),
    "student_t": Kind(_TRAINABLE, vectors("loc", "log_scale", "log_df")),
    "gaussian_mixture": Kind(Record({"features": FEATURES, "components": Whole(1, 2**20)}), _mixture),
}
