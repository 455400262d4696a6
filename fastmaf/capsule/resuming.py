"""Checks that a run to be resumed continues with the settings and images that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fastmaf.capsule.config import TrainConfig
from fastmaf.images.listing import count
from fastmaf.io.safe_json import shown

Contents: TypeAlias = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 of each file, by its name."""

_RENAMED = {"max_leap": "max_loss_jump"}  # settings of earlier versions
_RENAMED_VALUES = {("masks", "reference"): "published"}


@dataclass(frozen=True)
class TrainedOn:
    """The images of a run: the names of those to train on, and the contents of all, held-out ones included."""

    files: list[str]
    contents: Contents


def contents_of(names: Sequence[str], paths: Sequence[Path]) -> Contents:
    """Returns sizes and hashes of files, by which files of the same name are told apart."""
    contents: Contents = {}
    for name, path in zip(names, paths, strict=True):
        data = path.read_bytes()
        contents[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return contents


def check_settings(out: Path, state: Mapping[str, Any], config: TrainConfig) -> None:
    """Checks that all settings except ``epochs`` are those of the run to resume.

    Raises:
        ValueError: settings differ; the message names them.
    """
    before = {_RENAMED.get(k, k): _RENAMED_VALUES.get((k, str(v)), v) for k, v in state["config"].items()}
    now = json.loads(json.dumps(asdict(config)))
    different = [k for k in now if k != "epochs" and before.get(k) != now[k]]
    if different:
        changes = ", ".join(f"{k}: was {shown(before.get(k))}, now {shown(now[k])}" for k in different)
        raise ValueError(
            f"cannot resume {out} with other settings ({changes}): use the original ones, or choose another --out"
        )


def check_images(out: Path, state: Mapping[str, Any], now: TrainedOn) -> str | None:
    """Checks that the images, held-out ones included, are those of the run to resume.

    Args:
        out: the run's folder.
        state: its saved state; earlier versions stored only the names of the training images.
        now: the images of the data folder.

    Returns:
        A note if contents could not be compared, else None.

    Raises:
        ValueError: images differ; the message names them.
    """
    before: Contents | None = state.get("contents")
    contents = now.contents
    lacking = extra = list[str]()
    if before is not None:
        lacking, extra = sorted(before.keys() - contents.keys()), sorted(contents.keys() - before.keys())
    if lacking or extra or state["files"] != now.files:
        listed = [f"{what}: {_listed(names)}" for what, names in (("missing", lacking), ("new", extra)) if names]
        raise ValueError(
            f"cannot resume {out}: it was trained on {count(len(state['files']), 'image')}, the data now hold "
            f"{len(now.files)} others or renamed ones for training" + (f" ({'; '.join(listed)})" if listed else "")
        )
    if before is None:
        return (
            "the state of this run was written by an earlier version, without the contents of its images: only their "
            "names were compared"
        )
    changed = [name for name in contents if contents[name] != before[name]]
    if changed:
        raise ValueError(
            f"cannot resume {out}: {len(changed)} of {count(len(contents), 'image')} changed since it began: "
            f"{_listed([f'{name} ({_change(before[name], contents[name])})' for name in changed])}"
        )
    return None


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["bytes"] != now["bytes"]:
        return f"was {before['bytes']:,} bytes, now {now['bytes']:,}"
    return "of the same size, but with other contents"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
