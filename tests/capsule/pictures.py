"""A picture to write where a test wants one."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def picture(path: Path, colour: tuple[int, int, int] = (200, 90, 40), size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path
