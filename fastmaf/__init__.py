"""fastmaf: masked autoregressive flows at image size, with exact and fast sampling."""

from __future__ import annotations

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the kernels stand beside this folder instead of inside it, where an installation puts them: look there
# too, so that `import fastmaf` works from a clone's root.
if not (_Path(__file__).parent / "kernels").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

from fastmaf import optim
from fastmaf.checkpoint import CheckpointError, load, read_tensors, write_tensors
from fastmaf.convert import LeakyMaskError, from_reference
from fastmaf.degrees import ConnectivityWarning
from fastmaf.flows import MAF, Flow
from fastmaf.graphs import ReplayedLogProb
from fastmaf.kernels.backends import BackendUnavailableError, use_backend
from fastmaf.kernels.launch_table import use_precision
from fastmaf.memory import memory_estimate
from fastmaf.nn import MADE, MaskedLinear
from fastmaf.training import Guards, NonFiniteLossError, StepReport, TrainingStep
from fastmaf.transforms import AffineAutoregressive, NotInvertibleError, Permutation, Transform

__all__ = [
    "MADE",
    "MAF",
    "AffineAutoregressive",
    "BackendUnavailableError",
    "CheckpointError",
    "ConnectivityWarning",
    "Flow",
    "Guards",
    "LeakyMaskError",
    "MaskedLinear",
    "NonFiniteLossError",
    "NotInvertibleError",
    "Permutation",
    "ReplayedLogProb",
    "StepReport",
    "TrainingStep",
    "Transform",
    "from_reference",
    "load",
    "memory_estimate",
    "optim",
    "read_tensors",
    "use_backend",
    "use_precision",
    "write_tensors",
]
