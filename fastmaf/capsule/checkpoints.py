"""The two files of a training run: the model, and what resuming needs beside it.

They are written one after the other, each atomically. The state names the number of epochs of the model it belongs to,
so that a crash between the two is noticed and not resumed from a mixture.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import fastmaf

MODEL_FILE, STATE_FILE = "model.safetensors", "training_state.safetensors"


def save_state(
    out: Path, flow: fastmaf.Flow, moments: Mapping[str, Tensor], state: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Writes both files of a run.

    Args:
        out: the run's folder.
        flow: the model.
        moments: the optimiser's tensors by name.
        state: counters and log, plain JSON types.
        about: what the model file should say of its training, plain JSON types.
    """
    flow.save(out / MODEL_FILE, {"training": json.dumps(about)})
    fastmaf.write_tensors(moments, out / STATE_FILE, {"state": json.dumps(state)})


def load_state(out: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the moments and the state of a run.

    Raises:
        FileNotFoundError: there is no checkpoint in ``out``.
        fastmaf.CheckpointError: its files are damaged, or belong to different epochs.
    """
    for name in (MODEL_FILE, STATE_FILE):
        if not (out / name).is_file():
            raise FileNotFoundError(
                f"nothing to resume in {out}: expected {MODEL_FILE} and {STATE_FILE}, and {name} is not there"
            )
    moments, metadata = fastmaf.read_tensors(out / STATE_FILE, tensors=tensors)
    if "state" not in metadata:
        raise fastmaf.CheckpointError(f"{out / STATE_FILE} is not the state of a training run")
    state: dict[str, Any] = json.loads(metadata["state"])
    of_model = training_of(out / MODEL_FILE).get("epochs_done")
    if of_model != state["epochs_done"]:
        raise fastmaf.CheckpointError(
            f"{out / MODEL_FILE} is from after epoch {of_model}, {STATE_FILE} from after epoch "
            f"{state['epochs_done']}: the run was cut off "
            "between the two. The model is usable; training cannot go on from it"
        )
    return moments, state


def training_of(model: Path) -> dict[str, Any]:
    """Returns what a model file says of its training; empty for a model that ``fastmaf train`` did not write."""
    _, metadata = fastmaf.read_tensors(model, tensors=False)
    found: dict[str, Any] = json.loads(metadata.get("training", "{}"))
    return found
