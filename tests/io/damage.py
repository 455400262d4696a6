"""Model files with one wrong value, and how they are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fastmaf
from tests.io.model_files import RAW, Parts, set_at, use


def changed(content: bytes, key: str, place: tuple[Any, ...], value: Any) -> bytes:
    """Returns a file with another value in the JSON of its metadata."""
    parts = Parts.of(content)
    text = json.dumps(set_at(json.loads(parts.header["__metadata__"][key]), place, value))
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    parts.header["__metadata__"][key] = text
    return parts.joined()


def refused(kind: str, folder: Path, content: bytes) -> str:
    """Loads a file and returns the message, less the folder; it names the file, is short and holds no control signs."""
    with pytest.raises(fastmaf.CheckpointError) as caught:
        use(kind, folder, content)
    message = str(caught.value)
    assert str(folder) in message and ".safetensors" in message
    assert len(message) < 1000 and message.isprintable(), message
    return message.replace(str(folder), "")
