"""The state of an interrupted ``fastmaf inspect fit``, with which ``--resume`` goes on.

It is a folder beside the model: one file for each flow of a finished stage, and ``state.json``, which names them and is
replaced last. A state that replaces another has files of other names, so that one of both is complete at any moment.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

import fastmaf
from fastmaf.inspection.fit_stages import Stage, Stages
from fastmaf.inspection.recipe import Recipe
from fastmaf.io.atomic import written_atomically
from fastmaf.io.safe_json import parse, shown
from fastmaf.io.schema import Anything, ListOf, MapOf, Number, Record, Text, Whole
from fastmaf.training.interrupts import interruptible

STATE_FOLDER = "fit_state"
_STATE_FILE = "state.json"
_STAGE = Record({"name": Text(), "flows": Whole(0, 64), "record": MapOf(Anything())})
_STATE = Record(
    {"run": MapOf(Anything()), "stages": ListOf(_STAGE)},
    optional={
        "seconds": MapOf(Number(low=0.0)),
        "files": Text(),  # part of the names of its files; not written by earlier versions
    },
)
_FILES = re.compile("[0-9a-f]{8}")
_FLOW_FILE = re.compile(r"stage-(?:([0-9a-f]{8})-)?\d+-\d+\.safetensors")


def run_of(
    recipe: Recipe,
    sizes: Sequence[int],
    groups: Sequence[str] | None,
    every_fold: bool,
    images: Sequence[Tensor],
    *,
    kind: str = "object",
    features: str | None = None,
) -> dict[str, Any]:
    """Returns what a run to be resumed must have in common with the interrupted one, JSON types.

    Args:
        recipe: the settings.
        sizes: the sizes to be fitted.
        groups: of the images, or None.
        every_fold: whether blocks are trained without each fold.
        images: the pixels that the models are fitted to.
        kind: of the models; it decides at which size files are read.
        features: the network whose features are used, too.
    """
    pixels = hashlib.sha256()
    for tensor in images:
        pixels.update(repr(tuple(tensor.shape)).encode())
        pixels.update(tensor.contiguous().numpy().data)
    named = None if groups is None else hashlib.sha256(json.dumps(list(groups)).encode()).hexdigest()
    settings = {**asdict(recipe), "size": list(sizes), "keep_folds": every_fold, "kind": kind}
    settings |= {"features": features, "rank": recipe.factors}  # which "auto" is, may differ between versions
    found = {**settings, "groups": named, "images": pixels.hexdigest(), "fastmaf": fastmaf.__version__}
    return dict(json.loads(json.dumps(found)))


def has_state(out: Path) -> bool:
    """Returns whether a run's folder holds an interrupted fit."""
    return (out / STATE_FOLDER / _STATE_FILE).is_file()


@fastmaf.torch_defaults()
def save_state(out: Path, run: Mapping[str, Any], stages: Stages) -> None:
    """Writes finished stages into a run's folder, in place of those of an earlier interrupted fit.

    Ctrl-C meanwhile is ignored once. If the process dies, the earlier state is there, or the new one.

    Raises:
        OSError: a file cannot be written, as on a full disk; the earlier state is kept.
    """
    folder, files = out / STATE_FOLDER, secrets.token_hex(4)
    with interruptible():
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        try:
            for i, (name, stage) in enumerate(stages.done.items()):
                for k, flow in enumerate(stage.flows):
                    flow.save(folder / _flow_file(files, i, k))
                entries.append({"name": name, "flows": len(stage.flows), "record": stage.record})
            state = {"run": run, "stages": entries, "seconds": stages.seconds, "files": files}
            with written_atomically(folder / _STATE_FILE) as file:
                file.write(json.dumps(state).encode())
        finally:  # of the earlier state or, after an error, of this one: on a full disk that frees their space
            _remove_flows_of_others(folder)


@fastmaf.torch_defaults()
def load_state(out: Path, run: Mapping[str, Any]) -> Stages:
    """Returns the finished stages of an interrupted fit.

    Raises:
        ValueError: there is none, or it is one of other settings, images or another version of fastmaf.
        fastmaf.CheckpointError: a file is damaged or missing.
    """
    folder = out / STATE_FOLDER
    if not has_state(out):
        raise ValueError(f"cannot resume {out}: expected a fit that was interrupted; found no {folder / _STATE_FILE}")
    try:
        state = parse((folder / _STATE_FILE).read_text("utf-8"), _STATE_FILE, finite=False)
        _STATE.check(state, _STATE_FILE)
        named = state.get("files", "")
        if named and not _FILES.fullmatch(named):
            raise ValueError(f"{_STATE_FILE}.files: expected eight hexadecimal digits; found {shown(named)}")
    except ValueError as error:
        raise fastmaf.CheckpointError(f"{folder / _STATE_FILE}: {error}") from error
    if different := _differences(state["run"], run):
        raise ValueError(
            f"cannot resume {out}: {different}. Resume with what it was begun with, choose another --out, or fit "
            "without --resume"
        )
    done = {}
    for i, entry in enumerate(state["stages"]):
        files = [folder / _flow_file(named, i, k) for k in range(entry["flows"])]
        for file in files:
            if not file.is_file():
                raise fastmaf.CheckpointError(f"{file}: missing in the state of an interrupted fit")
        flows = tuple(fastmaf.load(file).eval() for file in files)
        done[entry["name"]] = Stage(flows, entry["record"])
    return Stages(done, state.get("seconds", {}), str(folder / _STATE_FILE))


def remove_state(out: Path) -> None:
    """Removes the state of an interrupted fit, if there is one; other files in its folder are kept."""
    folder = out / STATE_FOLDER
    (folder / _STATE_FILE).unlink(missing_ok=True)  # first: without it the others are no state
    _remove_flows_of_others(folder)


def _remove_flows_of_others(folder: Path) -> None:
    """Removes the flows that the state in a folder does not name, and the folder if it is empty then."""
    state = folder / _STATE_FILE
    named: Any = ""  # none of them
    if state.is_file():
        with suppress(ValueError):  # damaged
            found = parse(state.read_text("utf-8"), _STATE_FILE, finite=False)
            named = found.get("files") if isinstance(found, dict) else ""
    for file in folder.glob("stage-*.safetensors"):
        match = _FLOW_FILE.fullmatch(file.name)
        if match and match[1] != named:
            file.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _flow_file(files: str, stage: int, k: int) -> str:
    return f"stage-{files}-{stage}-{k}.safetensors" if files else f"stage-{stage}-{k}.safetensors"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Returns how two runs differ, or an empty text."""
    unlike = [name for name in now if before.get(name, now) != now[name]]
    texts = [f"{name} was {shown(before.get(name))}, now {shown(now[name])}" for name in unlike if name not in _HASHED]
    texts += [f"the {name} are others" for name in unlike if name in _HASHED]
    return "; ".join(texts)


_HASHED = ("images", "groups")
