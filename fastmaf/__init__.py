"""fastmaf: masked autoregressive flows at image size, with exact and fast sampling."""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# An installation has kernels/ within this folder, a clone beside it; this lets `import fastmaf` work in a clone's root.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

if TYPE_CHECKING:
    from fastmaf import optim
    from fastmaf.convert import LeakyMaskError, from_published
    from fastmaf.defaults import torch_defaults
    from fastmaf.degrees import ConnectivityWarning
    from fastmaf.flows import MAF, Flow
    from fastmaf.io.checkpoint import SavedFlow, load, load_with_extras
    from fastmaf.io.tensor_file import CheckpointError
    from fastmaf.kernels.dispatch import BackendUnavailableError, use_backend
    from fastmaf.kernels.triton_common.launch_table import use_precision
    from fastmaf.nn import MADE, MaskedLinear
    from fastmaf.training.cuda_graphs import ReplayedLogProb
    from fastmaf.training.guards import Guards, NonFiniteLossError
    from fastmaf.training.memory_estimate import memory_estimate
    from fastmaf.training.step import StepReport, TrainingStep
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

_MODULE_OF = {
    "AffineAutoregressive": "fastmaf.transforms",
    "BackendUnavailableError": "fastmaf.kernels.dispatch",
    "CheckpointError": "fastmaf.io.tensor_file",
    "ConnectivityWarning": "fastmaf.degrees",
    "Detector": "fastmaf.inspection.detector",
    "Flow": "fastmaf.flows",
    "GaussianWhitening": "fastmaf.transforms",
    "Guards": "fastmaf.training.guards",
    "LeakyMaskError": "fastmaf.convert",
    "LocalAutoregressive": "fastmaf.transforms",
    "Logit": "fastmaf.transforms",
    "MADE": "fastmaf.nn",
    "MAF": "fastmaf.flows",
    "MaskedLinear": "fastmaf.nn",
    "NonFiniteLossError": "fastmaf.training.guards",
    "NotInvertibleError": "fastmaf.transforms",
    "Permutation": "fastmaf.transforms",
    "ReplayedLogProb": "fastmaf.training.cuda_graphs",
    "SavedFlow": "fastmaf.io.checkpoint",
    "StepReport": "fastmaf.training.step",
    "TrainingStep": "fastmaf.training.step",
    "Transform": "fastmaf.transforms",
    "from_published": "fastmaf.convert",
    "from_reference": "fastmaf.convert",
    "load": "fastmaf.io.checkpoint",
    "load_with_extras": "fastmaf.io.checkpoint",
    "memory_estimate": "fastmaf.training.memory_estimate",
    "torch_defaults": "fastmaf.defaults",
    "use_backend": "fastmaf.kernels.dispatch",
    "use_precision": "fastmaf.kernels.triton_common.launch_table",
}
"""The module of each public name, imported with torch when the name is first used: the command line needs neither."""


_MODULES = ("convert", "degrees", "flows", "io", "kernels", "naive", "nn", "optim", "training", "transforms")


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
