"""fastmaf: masked autoregressive flows at image size, with exact and fast sampling."""

from __future__ import annotations

from pathlib import Path as _Path

__version__ = "0.1.0"

# An installation has kernels/ within this folder, a clone beside it; this lets `import fastmaf` work in a clone's root.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from fastmaf import optim
from fastmaf.convert import LeakyMaskError, from_published
from fastmaf.degrees import ConnectivityWarning
from fastmaf.flows import MAF, Flow
from fastmaf.io.checkpoint import SavedFlow, load, load_with_extras
from fastmaf.io.tensor_file import CheckpointError
from fastmaf.kernels.backends import BackendUnavailableError, use_backend
from fastmaf.kernels.launch_table import use_precision
from fastmaf.nn import MADE, MaskedLinear
from fastmaf.torch_defaults import torch_defaults
from fastmaf.training.cuda_graphs import ReplayedLogProb
from fastmaf.training.loss_checks import NonFiniteLossError
from fastmaf.training.memory_estimate import memory_estimate
from fastmaf.training.step import Guards, StepReport, TrainingStep
from fastmaf.transforms import (
    AffineAutoregressive,
    GaussianWhitening,
    LocalAutoregressive,
    Logit,
    NotInvertibleError,
    Permutation,
    Transform,
)

__all__ = [
    "MADE",
    "MAF",
    "AffineAutoregressive",
    "BackendUnavailableError",
    "CheckpointError",
    "ConnectivityWarning",
    "Detector",
    "Flow",
    "GaussianWhitening",
    "Guards",
    "LeakyMaskError",
    "LocalAutoregressive",
    "Logit",
    "MaskedLinear",
    "NonFiniteLossError",
    "NotInvertibleError",
    "Permutation",
    "ReplayedLogProb",
    "SavedFlow",
    "StepReport",
    "TrainingStep",
    "Transform",
    "from_published",
    "load",
    "load_with_extras",
    "memory_estimate",
    "optim",
    "torch_defaults",
    "use_backend",
    "use_precision",
]

from_reference = from_published  # the earlier name

_LAZY = {"Detector": "fastmaf.inspection.detector"}  # imports scikit-learn, SciPy and Pillow


def __getattr__(name: str) -> object:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
