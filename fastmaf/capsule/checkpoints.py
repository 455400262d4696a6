"""The two files of a training run: the model, and what resuming needs beside it.

Both name the step that they belong to. The new state is written under another name first, then the model is replaced,
then
the state: a process that dies at any moment leaves a model and a state of the same step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

import fastmaf

MODEL_FILE, STATE_FILE = "model.safetensors", "training_state.safetensors"
_NEXT_STATE_FILE = "training_state.next.safetensors"


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
    fastmaf.write_tensors(moments, out / _NEXT_STATE_FILE, {"state": json.dumps(state)})
    flow.save(out / MODEL_FILE, {"training": json.dumps(about)})
    os.replace(out / _NEXT_STATE_FILE, out / STATE_FILE)


def set_aside(out: Path, *names: str) -> None:
    """Renames the model of an earlier run, and files ``names``, to ``*.previous.*``; its state is of no more use."""
    for file in (out / MODEL_FILE, *(out / name for name in names)):
        if file.exists():
            os.replace(file, file.with_name(previous_of(file.name)))
    for name in (STATE_FILE, _NEXT_STATE_FILE):
        (out / name).unlink(missing_ok=True)


def previous_of(name: str) -> str:
    """The name under which a file of an earlier run is set aside."""
    return str(Path(name).with_suffix(f".previous{Path(name).suffix}"))


def load_state(out: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the moments and the state of a run.

    Raises:
        FileNotFoundError: there is no checkpoint in ``out``.
        fastmaf.CheckpointError: its files are damaged, or belong to different steps.
    """
    states = [out / name for name in (STATE_FILE, _NEXT_STATE_FILE) if (out / name).is_file()]
    absent = MODEL_FILE if not (out / MODEL_FILE).is_file() else STATE_FILE if not states else None
    if absent:
        raise FileNotFoundError(
            f"nothing to resume in {out}: expected {MODEL_FILE} and {STATE_FILE}, and {absent} is not there"
        )
    step_of_model = training_of(out / MODEL_FILE).get("steps")
    for file in states:
        _, metadata = fastmaf.read_tensors(file, tensors=False)
        state: dict[str, Any] = json.loads(metadata.get("state", "{}"))
        if state and state["steps"] == step_of_model:
            return (fastmaf.read_tensors(file)[0] if tensors else {}), state
    raise fastmaf.CheckpointError(
        f"{out / STATE_FILE} does not belong to {out / MODEL_FILE}, which is from step {step_of_model}: one of them "
        f"was "
        "replaced. The model is usable; training cannot go on from it (choose another --out)"
    )


def training_of(model: Path) -> dict[str, Any]:
    """Returns what a model file says of its training; empty for a model that ``fastmaf train`` did not write."""
    _, metadata = fastmaf.read_tensors(model, tensors=False)
    found: dict[str, Any] = json.loads(metadata.get("training", "{}"))
    return found
