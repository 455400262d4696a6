"""The pictures of ``fastmaf inspect score``: overlays and anomaly maps, one of each per image."""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fastmaf.images.decode import Frame
from fastmaf.inspection.interface import AnomalyModel
from fastmaf.inspection.map_images import to_frame, write_map, write_overlay
from fastmaf.io.marks import MAP, OVERLAY
from fastmaf.io.outputs import Output, picture


@dataclass
class Pictures:
    """Where the pictures of each image go.

    Attributes:
        overlays: folder for overlays of the anomaly maps, in the size of each image.
        maps: folder for the anomaly maps as numbers, in the size of each image.
        map_suffix: ``".png"`` (16 bits) or ``".tiff"`` (32-bit floating point).
        keep_existing: new names are none of pictures that are there, such as those of the run that is resumed.
    """

    overlays: Path | None = None
    maps: Path | None = None
    map_suffix: str = ".png"
    keep_existing: bool = False
    _names: dict[Path, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)

    @property
    def are_wanted(self) -> bool:
        """Whether there is any folder."""
        return self.overlays is not None or self.maps is not None

    def name(self, files: Sequence[Path]) -> None:
        """Names the pictures of files: by their stem, with the folders above it if several share one."""
        stems = Counter(file.stem.lower() for file in files)
        for file in files:
            if file in self._names:
                continue
            parts = [part for part in file.with_suffix("").parts if part not in (file.anchor, "..", ".")]
            name = _shortened(file.stem if stems[file.stem.lower()] == 1 else "_".join(parts[-3:]))
            unique, k = name, 2
            while unique.lower() in self._taken or (self.keep_existing and self._is_there(unique)):
                unique, k = f"{name}_{k}", k + 1
            self._taken.add(unique.lower())
            self._names[file] = unique

    def _is_there(self, name: str) -> bool:
        folders = ((self.overlays, ".png"), (self.maps, self.map_suffix))
        return any(os.path.lexists(folder / f"{name}{suffix}") for folder, suffix in folders if folder is not None)

    def outputs(self, files: Iterable[Path]) -> Iterator[Output]:
        """Yields the pictures of named files."""
        overlay, anomaly_map = picture(OVERLAY, "an overlay of an anomaly map"), picture(MAP, "an anomaly map")
        for name in map(self._names.__getitem__, files):
            if self.overlays is not None:
                yield Output(self.overlays / f"{name}.png", overlay)
            if self.maps is not None:
                yield Output(self.maps / f"{name}{self.map_suffix}", anomaly_map)

    def write(self, frame: Frame, anomaly_map: np.ndarray, score: float, model: AnomalyModel) -> None:
        """Writes the pictures of a named image, which must have been read at full resolution."""
        assert frame.full is not None
        resized, name = to_frame(anomaly_map, (frame.height, frame.width)), self._names[frame.path]
        if self.overlays is not None:
            full = np.ascontiguousarray(frame.full.permute(1, 2, 0).numpy())
            verdict = {"score": score, "threshold": model.calibration.threshold}
            write_overlay(self.overlays / f"{name}.png", full, resized, *model.map_levels, **verdict)
        if self.maps is not None:
            write_map(self.maps / f"{name}{self.map_suffix}", resized)


def _shortened(name: str, longest: int = 200) -> str:
    """Returns a name short enough for a number and a suffix in the 255 bytes that file systems allow."""
    encoded = os.fsencode(name)
    if len(encoded) <= longest:
        return name
    return f"{encoded[: longest - 9].decode('utf-8', 'ignore')}-{zlib.crc32(encoded):08x}"
