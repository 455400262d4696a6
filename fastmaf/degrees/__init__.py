"""Degrees of the units of a MADE, which determine the masks.

Inputs have the degrees 1..D in the order in which they are generated. A hidden unit of degree m sees the units of
degree <= m in the layer below; the output of degree d sees the hidden units of degree < d. Units are sorted by degree,
a relabelling that leaves the function unchanged and makes every mask a staircase.

References:
    Germain, Gregor, Murray and Larochelle 2015, MADE: Masked Autoencoder for Distribution Estimation, section 3.
"""

from __future__ import annotations

from fastmaf.degrees.hidden import DegreeKind, check_features, hidden_degrees, input_degrees, layer_sizes
from fastmaf.degrees.masks import Connectivity, ConnectivityWarning, connectivity, prefix, warn_if_disconnected
from fastmaf.degrees.orders import OrderKind, check_permutation, orders

__all__ = [
    "Connectivity",
    "ConnectivityWarning",
    "DegreeKind",
    "OrderKind",
    "check_features",
    "check_permutation",
    "connectivity",
    "hidden_degrees",
    "input_degrees",
    "layer_sizes",
    "orders",
    "prefix",
    "warn_if_disconnected",
]
