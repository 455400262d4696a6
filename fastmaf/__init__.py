"""fastmaf: masked autoregressive flows at image size, with exact and fast sampling."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# An installation has kernels/ within this folder, a clone beside it; this lets `import fastmaf` work in a clone's root.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

if TYPE_CHECKING:
    from fastmaf import optim as optim
    from fastmaf.bases import Base as Base
    from fastmaf.bases import DiagonalGaussian as DiagonalGaussian
    from fastmaf.bases import GaussianMixture as GaussianMixture
    from fastmaf.bases import LowRankGaussian as LowRankGaussian
    from fastmaf.bases import StandardNormal as StandardNormal
    from fastmaf.bases import StudentT as StudentT
    from fastmaf.convert import LeakyMaskError as LeakyMaskError
    from fastmaf.convert import NotConvertibleError as NotConvertibleError
    from fastmaf.convert import accelerate as accelerate
    from fastmaf.convert import from_nflows as from_nflows
    from fastmaf.convert import from_normflows as from_normflows
    from fastmaf.convert import from_published as from_published
    from fastmaf.convert import from_zuko as from_zuko
    from fastmaf.convert import to_nflows as to_nflows
    from fastmaf.convert import to_zuko as to_zuko
    from fastmaf.defaults import deterministic as deterministic
    from fastmaf.defaults import torch_defaults as torch_defaults
    from fastmaf.degrees import ConnectivityWarning as ConnectivityWarning
    from fastmaf.flows import IAF as IAF
    from fastmaf.flows import MAF as MAF
    from fastmaf.flows import Flow as Flow
    from fastmaf.flows import FlowDistribution as FlowDistribution
    from fastmaf.io.checkpoint import SavedFlow as SavedFlow
    from fastmaf.io.checkpoint import load as load
    from fastmaf.io.checkpoint import load_with_extras as load_with_extras
    from fastmaf.io.tensor_file import CheckpointError as CheckpointError
    from fastmaf.kernels.affine_output.affine_map import AffineMap as AffineMap
    from fastmaf.kernels.dispatch import BackendUnavailableError as BackendUnavailableError
    from fastmaf.kernels.dispatch import use_backend as use_backend
    from fastmaf.kernels.triton_common.launch_table import use_precision as use_precision
    from fastmaf.nn import MADE as MADE
    from fastmaf.nn import MaskedLinear as MaskedLinear
    from fastmaf.training.cuda_graphs import ReplayedLogProb as ReplayedLogProb
    from fastmaf.training.exchange import ProcessesDifferError as ProcessesDifferError
    from fastmaf.training.failures import ProcessFailedError as ProcessFailedError
    from fastmaf.training.guards import Guards as Guards
    from fastmaf.training.guards import NonFiniteLossError as NonFiniteLossError
    from fastmaf.training.memory_estimate import memory_estimate as memory_estimate
    from fastmaf.training.step import StepReport as StepReport
    from fastmaf.training.step import TrainingStep as TrainingStep
    from fastmaf.transforms import ActNorm as ActNorm
    from fastmaf.transforms import AffineAutoregressive as AffineAutoregressive
    from fastmaf.transforms import BatchNorm as BatchNorm
    from fastmaf.transforms import ElementwiseAffine as ElementwiseAffine
    from fastmaf.transforms import FallbackWarning as FallbackWarning
    from fastmaf.transforms import GaussianWhitening as GaussianWhitening
    from fastmaf.transforms import Inverted as Inverted
    from fastmaf.transforms import LocalAutoregressive as LocalAutoregressive
    from fastmaf.transforms import Logit as Logit
    from fastmaf.transforms import MonotonicRQS as MonotonicRQS
    from fastmaf.transforms import NotInvertibleError as NotInvertibleError
    from fastmaf.transforms import Permutation as Permutation
    from fastmaf.transforms import SplineMap as SplineMap
    from fastmaf.transforms import Transform as Transform

_NAMES_OF = {
    "fastmaf.bases": (
        "Base",
        "DiagonalGaussian",
        "GaussianMixture",
        "LowRankGaussian",
        "StandardNormal",
        "StudentT",
    ),
    "fastmaf.convert": (
        "LeakyMaskError",
        "NotConvertibleError",
        "accelerate",
        "from_nflows",
        "from_normflows",
        "from_published",
        "from_reference",
        "from_zuko",
        "to_nflows",
        "to_zuko",
    ),
    "fastmaf.defaults": ("deterministic", "torch_defaults"),
    "fastmaf.degrees": ("ConnectivityWarning",),
    "fastmaf.flows": ("Flow", "FlowDistribution", "IAF", "MAF"),
    "fastmaf.inspection.detector": ("Detector",),
    "fastmaf.io.checkpoint": ("SavedFlow", "load", "load_with_extras"),
    "fastmaf.io.tensor_file": ("CheckpointError",),
    "fastmaf.kernels.affine_output.affine_map": ("AffineMap",),
    "fastmaf.kernels.dispatch": ("BackendUnavailableError", "use_backend"),
    "fastmaf.kernels.triton_common.launch_table": ("use_precision",),
    "fastmaf.nn": ("MADE", "MaskedLinear"),
    "fastmaf.training.cuda_graphs": ("ReplayedLogProb",),
    "fastmaf.training.exchange": ("ProcessesDifferError",),
    "fastmaf.training.failures": ("ProcessFailedError",),
    "fastmaf.training.guards": ("Guards", "NonFiniteLossError"),
    "fastmaf.training.memory_estimate": ("memory_estimate",),
    "fastmaf.training.step": ("StepReport", "TrainingStep"),
    "fastmaf.transforms": (
        "ActNorm",
        "AffineAutoregressive",
        "BatchNorm",
        "ElementwiseAffine",
        "FallbackWarning",
        "GaussianWhitening",
        "Inverted",
        "LocalAutoregressive",
        "Logit",
        "MonotonicRQS",
        "NotInvertibleError",
        "Permutation",
        "SplineMap",
        "Transform",
    ),
}
"""The public names by module, imported with torch when a name is first used: the command line needs neither."""

_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
_MODULES = ("bases", "convert", "degrees", "flows", "io", "kernels", "naive", "nn", "optim", "training", "transforms")
__all__ = sorted({*_MODULE_OF, "optim"} - {"from_reference"})  # its name in earlier versions still works


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    elif name in _MODULES:
        value = import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
