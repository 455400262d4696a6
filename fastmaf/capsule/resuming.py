"""Checks that a run to be resumed continues with the settings and images that it began with."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from fastmaf.capsule.config import TrainConfig
from fastmaf.images.dataset import ImageSet
from fastmaf.io.safe_json import shown
from fastmaf.io.wording import count, some

Contents: TypeAlias = dict[str, dict[str, Any]]
"""Size in bytes and SHA-256 of each file, by its name."""

_RENAMED = {"max_leap": "max_loss_jump"}  # settings of earlier versions
_RENAMED_VALUES = {("masks", "reference"): "published"}


def contents_of(images: ImageSet) -> Contents:
    """Returns sizes and hashes of files, by which files of the same name are told apart."""
    files = ((name, path.read_bytes()) for name, path in zip(images.names, images.paths, strict=True))
    return {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files}


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


def check_images(out: Path, state: Mapping[str, Any], files: Sequence[str], contents: Contents) -> str | None:
    """Checks that the images, held-out ones included, are those of the run to resume.

    Args:
        out: the run's folder.
        state: its saved state; earlier versions stored only the names of the training images.
        files: names of the images to train on.
        contents: contents of all images, held-out ones included.

    Returns:
        A note if contents could not be compared, else None.

    Raises:
        ValueError: images differ; the message names them.
    """
    before: Contents | None = state.get("contents")
    known = contents if before is None else before
    lacking, extra = sorted(known.keys() - contents.keys()), sorted(contents.keys() - known.keys())
    if lacking or extra or state["files"] != files:
        listed = [f"{what}: {some(names)}" for what, names in (("missing", lacking), ("new", extra)) if names]
        raise ValueError(
            f"cannot resume {out}: expected the {count(len(state['files']), 'image')} that it was trained on; found "
            f"{len(files)}, others or renamed" + (f" ({'; '.join(listed)})" if listed else "")
        )
    if before is None:
        return (
            "this run was begun by an earlier version, which did not record the contents of its images: only their "
            "names were compared"
        )
    changed = sorted(name for name in contents if contents[name] != before[name])
    if changed:
        raise ValueError(
            f"cannot resume {out}: {len(changed)} of {count(len(contents), 'image')} changed since it began: "
            f"{some([f'{name} ({_change(before[name], contents[name])})' for name in changed])}"
        )
    return None


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if before["bytes"] != now["bytes"]:
        return f"was {before['bytes']:,} bytes, now {now['bytes']:,}"
    return "of the same size, but with other contents"
