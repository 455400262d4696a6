"""The two files of a training run: the model, and the training state that is needed to resume it.

Both contain the identifier of their checkpoint. The new state is first written under another name, then the model is
replaced, then the state: a process that dies at any moment leaves a model and a state of the same checkpoint.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastmaf
from fastmaf.io.atomic import keep_previous, replace
from fastmaf.io.packed_weights import masked_layers, streamed_rows, weight_of_rows
from fastmaf.io.safe_json import parse, shown
from fastmaf.io.schema import Anything, Flag, ListOf, MapOf, Maybe, Number, OneOf, Record, Text, Whole
from fastmaf.io.tensor_file import read_tensors, write_tensors
from fastmaf.tiles import tiles_to_panels
from fastmaf.training.random_state import ORDER, RANDOM

MODEL_FILE, STATE_FILE = "model.safetensors", "training_state.safetensors"
_NEXT_STATE_FILE = "training_state.next.safetensors"

_MOMENTS = ("exp_avg", "exp_avg_sq")
_ROWS = "rows"  # moments of packed weights are stored as model files store the weights; earlier versions had tiles
_STEPS = Whole(high=2**62)
_NAMES = ListOf(Text())
_NLL = Number(finite=False)
_ROW = Record(
    {
        "epoch": Whole(1),
        "nll": _NLL,
        "val_nll": Maybe(_NLL),
        "bits_per_dim": _NLL,
        "seconds": Number(low=0),
        "skipped_steps": Whole(),
    },
    others=Anything(),
)
_STATE = Record(
    {
        "config": Record({"epochs": Whole(1)}, others=Anything()),
        "epochs_done": Whole(),
        "steps": _STEPS,
        "files": _NAMES,
        "guards": Record({"steps": _STEPS, "usual_nll": Maybe(Number()), "warming": Flag()}),
        "log": ListOf(_ROW),
    },
    optional={  # not written by earlier versions
        "checkpoint": Text(),
        "packed": OneOf((_ROWS,)),
        "contents": MapOf(Record({"bytes": Whole(high=2**62), "sha256": Text()})),
        "epoch_so_far": Record(
            {"batches": Whole(), "total_nll": Number(), "skipped": Whole(), "seconds": Number(low=0)}
        ),
    },
    others=Anything(),
)
_TRAINING = Record(
    optional={"epochs_done": Whole(), "steps": _STEPS, "held_out": _NAMES, "checkpoint": Text()}, others=Anything()
)


def save_state(
    out: Path,
    flow: fastmaf.Flow,
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    *,
    random: Mapping[str, Tensor] | None = None,
    order: Tensor | None = None,
    keep: Sequence[str] = (),
) -> None:
    """Writes both files of a run.

    Args:
        out: the run's folder.
        flow: the model.
        moments: the optimiser's tensors by name.
        random: the generators' states; see ``random_state``.
        order: the order of the data in the epoch that is not finished.
        state: counters and log, as JSON types.
        about: metadata on the training for the model file, as JSON types.
        keep: files of an earlier run to keep as ``*.previous.*`` before the model is replaced.

    Raises:
        OSError: a file cannot be written, as on a full disk; the previous model and state are kept.
    """
    checkpoint, next_state = secrets.token_hex(8), out / _NEXT_STATE_FILE
    rows = {
        moment: streamed_rows(moments[moment], layer, moment, next_state)
        for moment, layer in _packed_moments(flow)
        if moment in moments
    }
    record = {**state, "checkpoint": checkpoint, "packed": _ROWS}
    others = {**(random or {}), **({} if order is None else {ORDER: order})}
    write_tensors({**moments, **rows, **others}, next_state, {"state": json.dumps(record)})
    try:
        for name in keep:
            keep_previous(out / name)
        flow.save(out / MODEL_FILE, {"training": json.dumps({**about, "checkpoint": checkpoint})})
    except BaseException:
        if not (out / MODEL_FILE).is_file() or training_of(out / MODEL_FILE).get("checkpoint") != checkpoint:
            (out / _NEXT_STATE_FILE).unlink(missing_ok=True)  # frees its space on a full disk
        raise
    replace(out / _NEXT_STATE_FILE, out / STATE_FILE)


def _packed_moments(flow: fastmaf.Flow) -> Iterator[tuple[str, fastmaf.MaskedLinear]]:
    """Yields the names of the moments of packed weights, each with its layer."""
    for name, layer in masked_layers(flow).items():
        for key in _MOMENTS:
            yield f"{name}.weight/{key}", layer


def remove_state(out: Path) -> None:
    """Removes the training state from a folder whose model was replaced by another kind of training."""
    for name in (STATE_FILE, _NEXT_STATE_FILE):
        (out / name).unlink(missing_ok=True)


def load_state(out: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors (none unless ``tensors``) and the state of a run.

    The tensors are the optimiser's moments, the generators' states and the order of an unfinished epoch.

    Raises:
        FileNotFoundError: there is no checkpoint in ``out``.
        fastmaf.CheckpointError: its files are damaged, or belong to different checkpoints.
    """
    states = [out / name for name in (STATE_FILE, _NEXT_STATE_FILE) if (out / name).is_file()]
    absent = MODEL_FILE if not (out / MODEL_FILE).is_file() else STATE_FILE if not states else None
    if absent:
        raise FileNotFoundError(
            f"nothing to resume in {out}: expected {MODEL_FILE} and {STATE_FILE}, and {absent} is not there"
        )
    about = training_of(out / MODEL_FILE)
    for file in states:
        moments, metadata = read_tensors(file, tensors=tensors)
        state = _record(metadata, "state", _STATE, file, finite=False)  # validation NLLs may be infinite
        done, rows = state["epochs_done"], len(state["log"])
        if rows != done:
            raise fastmaf.CheckpointError(f"{file}: state.log: expected {done} rows, one an epoch; found {rows}")
        # Files of earlier versions have no identifier and are compared by their steps alone.
        if all(state.get(key) == about.get(key) for key in ("steps", "checkpoint")):
            return moments, state
    raise fastmaf.CheckpointError(
        f"{out / STATE_FILE} does not belong to {out / MODEL_FILE}, which is from step {about.get('steps')}: one of "
        "them was replaced. The model is usable, but its training cannot be resumed (choose another --out)"
    )


def refuse_unfinished(out: Path) -> None:
    """Checks that a folder does not hold an unfinished run, before a new one is started in it.

    Raises:
        ValueError: it does.
    """
    if not ((out / STATE_FILE).exists() and (out / MODEL_FILE).exists()):
        return
    state = load_state(out, tensors=False)[1]
    done, epochs = state["epochs_done"], state["config"]["epochs"]
    if done < epochs:
        raise ValueError(
            f"{out} holds an unfinished run ({done} of {epochs} epochs): continue it with --resume (fastmaf "
            "capsule train), choose another --out, or delete it"
        )


def moments_by_parameter(
    out: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any], flow: fastmaf.Flow
) -> dict[int, dict[str, Tensor]]:
    """Returns the optimiser's state by index of the parameter, from what ``load_state`` returned.

    Raises:
        fastmaf.CheckpointError: a tensor is missing, unexpected, or does not match its parameter.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != ORDER and not name.startswith(RANDOM)}
    if not tensors:  # all steps were skipped
        return {}

    def refuse(problem: str) -> fastmaf.CheckpointError:
        return fastmaf.CheckpointError(f"{out / STATE_FILE}: tensor {problem}")

    parameters = dict(flow.named_parameters())
    for name, layer in _packed_moments(flow):
        if name in tensors:
            try:
                if state.get("packed") == _ROWS:
                    tensors[name] = weight_of_rows(name, tensors[name], layer)
                else:
                    tensors[name] = tiles_to_panels(tensors[name], layer.layout, name)
            except ValueError as error:
                raise fastmaf.CheckpointError(f"{out / STATE_FILE}: {error}") from None
    expected = {f"{name}/{key}": (p.shape, p.dtype) for name, p in parameters.items() for key in _MOMENTS}
    expected |= {f"{name}/step": (torch.Size(()), torch.float32) for name in parameters}
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise refuse(f"{shown(odd[0])} is missing or unexpected")
    for name, (shape, dtype) in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != dtype:
            found = f"{shown(tuple(tensor.shape))} {tensor.dtype}"
            raise refuse(f"{name}: expected {tuple(shape)} {dtype}; found {found}")
        signed = name.endswith("/exp_avg")  # steps and second moments are not
        if not bool((torch.isfinite(tensor) & (tensor >= (-math.inf if signed else 0))).all()):
            raise refuse(f"{name}: expected finite numbers{'' if signed else ' that are not negative'}; found others")
    names = ("step", *_MOMENTS)
    return {i: {key: tensors[f"{name}/{key}"] for key in names} for i, name in enumerate(parameters)}


def training_of(model: Path) -> dict[str, Any]:
    """Returns the metadata on the training in a model file; see ``training_in``."""
    return training_in(read_tensors(model, tensors=False)[1], model)


def training_in(metadata: Mapping[str, str], model: Path) -> dict[str, Any]:
    """Returns the training entry of a file's metadata; empty if ``fastmaf capsule train`` did not write it.

    Raises:
        fastmaf.CheckpointError: the entry is invalid.
    """
    return _record(metadata, "training", _TRAINING, model)


def _record(
    metadata: Mapping[str, str], key: str, schema: Record, file: Path, *, finite: bool = True
) -> dict[str, Any]:
    try:
        record: dict[str, Any] = parse(metadata.get(key, "{}"), key, finite=finite)
        schema.check(record, key)
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{file}: {error}") from error
    return record
