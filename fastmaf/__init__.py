"""fastmaf: masked autoregressive flows at image size, with exact and fast sampling."""

from __future__ import annotations

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the kernels stand beside this folder instead of inside it, where an installation puts them: look there
# too, so that `import fastmaf` works from a clone's root.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from fastmaf import optim
from fastmaf.convert import LeakyMaskError, from_reference
from fastmaf.degrees import ConnectivityWarning
from fastmaf.flows import MAF, Flow
from fastmaf.io.checkpoint import (
    CheckpointError,
    SavedFlow,
    load,
    load_with_extras,
    read_extras,
    read_tensors,
    write_tensors,
)
from fastmaf.kernels.dispatch import BackendUnavailableError, use_backend
from fastmaf.kernels.triton_common.launch_table import use_precision
from fastmaf.nn import MADE, MaskedLinear
from fastmaf.torch_defaults import torch_defaults
from fastmaf.training.blas import allocate_work_buffers
from fastmaf.training.cuda_graphs import ReplayedLogProb
from fastmaf.training.loss_checks import NonFiniteLossError
from fastmaf.training.memory_estimate import memory_estimate
from fastmaf.training.step import Guards, StepReport, TrainingStep
from fastmaf.transforms import AffineAutoregressive, Logit, NotInvertibleError, Permutation, Transform
from fastmaf.transforms.local import LocalAutoregressive
from fastmaf.transforms.whitening import GaussianWhitening

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
    "allocate_work_buffers",
    "from_reference",
    "load",
    "load_with_extras",
    "memory_estimate",
    "optim",
    "read_extras",
    "read_tensors",
    "torch_defaults",
    "use_backend",
    "use_precision",
    "write_tensors",
]

_LAZY = {"Detector": "fastmaf.inspection.detector"}  # scikit-learn and the inspection are imported by who asks for them


def __getattr__(name: str) -> object:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
