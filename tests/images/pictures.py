"""Pictures to write where a test wants them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def picture(path: Path, colour: tuple[int, int, int] = (200, 90, 40), size: int = 8) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


def capsule_set(root: Path) -> Path:
    """A set of three normal images and three test classes of two."""
    for i in range(3):
        picture(root / "train" / "good" / f"{i:03d}.png", (10 * i, 0, 0))
    for name in ("crack", "good", "poke"):
        for i in range(2):
            picture(root / "test" / name / f"{i:03d}.png")
    return root
