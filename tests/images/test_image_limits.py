"""Memory that reading a large image needs: a few bytes for each pixel of the file, for every kind of image."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]

# Each image is read in a new process, forked after the imports, as memory left by one would be reused by the next.
_MEASURE = """
import json, os, sys
from fastmaf.images.decode import load_frame
def read(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))
for path, small in json.loads(sys.argv[1]):
    for full in (False, True):
        if (child := os.fork()) == 0:
            load_frame(small, 4, keep_full=full)  # what is allocated once
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # the peak starts anew
            before = read("VmRSS")
            load_frame(path, 64, keep_full=full)
            print(read("VmHWM") - before, flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            sys.exit(path + " failed")
"""
_SIDE = 3000
_TURNED = Image.Exif()
_TURNED[0x0112] = 6
_LARGE: list[tuple[str, str, dict[str, Any]]] = [
    ("I;16", "grey16.png", {}),
    ("I;16", "lzw.tif", {"compression": "tiff_lzw"}),
    ("L", "grey.png", {}),
    ("RGB", "rgb.png", {}),
    ("RGB", "rgb.jpg", {}),
    ("RGB", "turned.jpg", {"exif": _TURNED}),
    ("RGB", "rgb.bmp", {}),
    ("RGB", "rgb.tif", {}),
    ("RGBA", "rgba.png", {}),
    ("LA", "la.png", {}),
    ("P", "palette.png", {"transparency": 0}),
    ("CMYK", "cmyk.jpg", {}),
    ("F", "float.tif", {}),
    ("I", "int.tif", {}),
]


def gradient(mode: str, side: int) -> Image.Image:
    grey = Image.linear_gradient("L").resize((side, side))
    if mode == "I;16":
        return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    if mode in ("F", "I"):
        white = 1 if mode == "F" else 65535
        return Image.fromarray((np.asarray(grey) / 255 * white).astype(f"{mode.lower()}4"))
    bands = len(Image.new(mode, (1, 1)).getbands())
    return Image.merge(mode, [grey] * bands) if bands > 1 else grey.convert(mode)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """The bytes at the peak of reading each of the large images, without and with ``keep_full``."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peaks are read from /proc")
    folder = tmp_path_factory.mktemp("large")
    for mode, name, options in _LARGE:
        gradient(mode, _SIDE).save(folder / name, **options)
        gradient(mode, 300).save(folder / f"small-{name}", **options)
    files = [(str(folder / name), str(folder / f"small-{name}")) for _, name, _ in _LARGE]
    command = [sys.executable, "-c", _MEASURE, json.dumps(files)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    values = list(map(int, run.stdout.split()))
    return {name: max(values[2 * i : 2 * i + 2]) for i, (_, name, _) in enumerate(_LARGE)}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for _, name, _ in _LARGE])
def test_eight_bytes_a_pixel_at_the_peak(peaks: dict[str, int], name: str) -> None:
    # A strip's worth of copies comes on top; at least the pixels themselves must have been there.
    assert 1 < peaks[name] / _SIDE**2 <= 9
