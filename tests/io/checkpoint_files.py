"""Model files of tests: read raw, changed by hand, and refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import fastmaf
from tests.core.helpers import shared_widths


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return load_file(path), dict(file.metadata())


def load(path: Path | str) -> fastmaf.MAF:
    """Loads a model of ``build``, in whose small layers panels share widths."""
    with shared_widths():
        return fastmaf.load(path)


def refused(path: Path, words: str, error: type[Exception] = fastmaf.CheckpointError) -> None:
    """Checks that loading fails with a message that names the file and, beside its path, matches ``words``."""
    with pytest.raises(error) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message, f"the message does not name the file: {message}"
    assert re.search(words, message.replace(str(path), "..."), re.DOTALL), (
        f"expected {words!r} in the message; found: {message}"
    )


def key_of(tensors: dict[str, Tensor], ending: str) -> str:
    return next(key for key in sorted(tensors) if key.endswith(ending))


def edit_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def edit(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        config = json.loads(metadata["fastmaf"])
        result = change(config)
        metadata["fastmaf"] = json.dumps(config if result is None else result)

    return edit


def set_tensor(
    ending: str, change: Callable[[Tensor], Tensor | None]
) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def edit(tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        key = key_of(tensors, ending)
        tensor = change(tensors.pop(key).clone())
        if tensor is not None:
            tensors[key] = tensor

    return edit


def poke(value: float, where: int = 0) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[where] = value
        return tensor

    return change
