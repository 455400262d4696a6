"""The two files of a training run: the model, and what resuming needs beside it.

Both name the checkpoint that they belong to. The new state is written under another name first, then the model is
replaced, then the state: a process that dies at any moment leaves a model and a state of the same checkpoint.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import fastmaf
from fastmaf.io.atomic import keep_previous, replace

MODEL_FILE, STATE_FILE = "model.safetensors", "training_state.safetensors"
_NEXT_STATE_FILE = "training_state.next.safetensors"


def save_state(
    out: Path,
    flow: fastmaf.Flow,
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    keep: Sequence[str] = (),
) -> None:
    """Writes both files of a run.

    Args:
        out: the run's folder.
        flow: the model.
        moments: the optimiser's tensors by name.
        state: counters and log, plain JSON types.
        about: what the model file should say of its training, plain JSON types.
        keep: files of an earlier run to keep as ``*.previous.*``, before the model is replaced.

    Raises:
        OSError: a file cannot be written, as on a full disk; the model and the state before stay.
    """
    checkpoint = secrets.token_hex(8)
    fastmaf.write_tensors(moments, out / _NEXT_STATE_FILE, {"state": json.dumps({**state, "checkpoint": checkpoint})})
    try:
        for name in keep:
            keep_previous(out / name)
        flow.save(out / MODEL_FILE, {"training": json.dumps({**about, "checkpoint": checkpoint})})
    except BaseException:
        if not (out / MODEL_FILE).is_file() or training_of(out / MODEL_FILE).get("checkpoint") != checkpoint:
            (out / _NEXT_STATE_FILE).unlink(missing_ok=True)  # on a full disk its room is needed
        raise
    replace(out / _NEXT_STATE_FILE, out / STATE_FILE)


def remove_state(out: Path) -> None:
    """Removes the training state from a folder whose model another kind of training has replaced."""
    for name in (STATE_FILE, _NEXT_STATE_FILE):
        (out / name).unlink(missing_ok=True)


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
    about = training_of(out / MODEL_FILE)
    for file in states:
        _, metadata = fastmaf.read_tensors(file, tensors=False)
        state: dict[str, Any] = json.loads(metadata.get("state", "{}"))
        # Files of earlier versions name no checkpoint; their steps have to do.
        if state and all(state.get(key) == about.get(key) for key in ("steps", "checkpoint")):
            return (fastmaf.read_tensors(file)[0] if tensors else {}), state
    raise fastmaf.CheckpointError(
        f"{out / STATE_FILE} does not belong to {out / MODEL_FILE}, which is from step {about.get('steps')}: one of "
        "them was replaced. The model is usable; training cannot go on from it (choose another --out)"
    )


def refuse_unfinished(out: Path) -> None:
    """Refuses to start a new run in a folder that holds an unfinished one.

    Raises:
        ValueError: it does; says how many epochs are done.
    """
    if not ((out / STATE_FILE).exists() and (out / MODEL_FILE).exists()):
        return
    state = load_state(out, tensors=False)[1]
    if state["epochs_done"] < state["config"]["epochs"]:
        raise ValueError(
            f"{out} holds an unfinished run ({state['epochs_done']} of {state['config']['epochs']} epochs): "
            "go on with --resume, choose another --out, or delete it"
        )


def training_of(model: Path) -> dict[str, Any]:
    """Returns what a model file says of its training; empty for a model that ``fastmaf train`` did not write."""
    _, metadata = fastmaf.read_tensors(model, tensors=False)
    found: dict[str, Any] = json.loads(metadata.get("training", "{}"))
    return found
