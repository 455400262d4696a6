"""Synthetic defects on good images of any object, to select scores and constants without defective images.

They are generic: lines, spots, stains, patches that are erased, pasted, displaced or rough, and dents, from barely
visible to obvious. They show how scores compare, not how many real defects a score will find.

References:
    Li et al., "CutPaste: self-supervised learning for anomaly detection and localization", CVPR 2021, for pasted
    patches; Zavrtanik et al., "DRÆM", ICCV 2021, for defects drawn onto normals in general.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_closing
from torch import Tensor

from fastmaf.inspection.synthetic_defects.brushes import BRUSHES
from fastmaf.inspection.synthetic_defects.canvas import Array, Canvas

KINDS = tuple(BRUSHES)

_VISIBLE = 2  # a mask covers pixels that differ by more than this many grey levels
_TRIES = 12


class SyntheticDefects(NamedTuple):
    """Images with one synthetic defect each.

    Attributes:
        pixels: uint8 [n, 3, h, w].
        masks: bool [n, h, w], the visible pixels of the defect; never empty.
        kinds: the kind of each defect.
    """

    pixels: Tensor
    masks: Tensor
    kinds: tuple[str, ...]


def draw_defects(pixels: Tensor, *, kinds: Sequence[str] = KINDS, seed: int = 0) -> SyntheticDefects:
    """Draws one defect onto each image, of random kinds that are as equally frequent as possible.

    Sizes are relative to the square root of the image's area, strengths to the local contrast: 6 to 80 grey levels for
    lines and spots, less for wider defects. Nearly all defects lie on the object. A defect that is barely visible (no
    colour changed by 4 levels, or too few pixels by more than 2) is drawn again, stronger each time. The same images,
    kinds and seed give the same defects.

    Args:
        pixels: good images, uint8 [n, 3, h, w], h and w at least 8.
        kinds: which kinds to draw, of ``KINDS``.
        seed: any non-negative integer.

    Returns:
        The images with their defects. A mask covers pixels where any colour differs by more than 2 grey levels from the
        good image, with gaps of one pixel closed. On an image without structure, where nothing can be displaced,
        pasted or erased, a spot is drawn instead, and its kind is ``"spot"``.

    Raises:
        ValueError: ``pixels``, ``kinds`` or ``seed`` is invalid.
    """
    if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixels must be uint8 [n, 3, h, w]; found {pixels.dtype} {list(pixels.shape)}")
    if min(pixels.shape[2:]) < 8:
        raise ValueError(f"pixels must be images of at least 8 x 8; found {pixels.shape[2]} x {pixels.shape[3]}")
    unknown = [kind for kind in kinds if kind not in BRUSHES]
    if unknown or not kinds:
        raise ValueError(f"kinds must be one or more of {', '.join(KINDS)}; found {', '.join(unknown) or 'none'}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0; found {seed}")
    clean = pixels.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    n = len(clean)
    order = np.random.default_rng(seed)
    chosen = np.resize(order.permutation(len(kinds)), n)  # which kinds occur once more than others is random, too
    order.shuffle(chosen)
    drawn, names = np.empty_like(clean), []
    for i in range(n):
        drawn[i], name = _drawn(clean, i, kinds[chosen[i]], np.random.default_rng([seed, i]))
        names.append(name)
    masks = _masks(clean, drawn)
    images = torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()
    return SyntheticDefects(images, torch.from_numpy(masks), tuple(names))


def _drawn(clean: Array, i: int, kind: str, rng: np.random.Generator) -> tuple[Array, str]:
    """Returns one image with a defect, uint8 [h, w, 3], and the kind of the defect."""
    image = clean[i].astype(np.float32)
    min_pixels = max(1, round(3 * Canvas(image, image, rng, 1.0).unit ** 2))
    for attempt in range(2 * _TRIES):
        if attempt == _TRIES:
            kind = "spot"
        donor = clean[int(rng.integers(len(clean)))].astype(np.float32)
        changed = BRUSHES[kind](Canvas(image, donor, rng, boost=1.2**attempt))
        changed = np.rint(np.clip(changed, 0, 255)).astype(np.uint8)
        difference = _difference(clean[i], changed)
        if (difference > _VISIBLE).sum() >= min_pixels and difference.max() >= 2 * _VISIBLE:
            return changed, kind
    raise RuntimeError(f"no visible defect could be drawn onto image {i}")


def _difference(clean: Array, drawn: Array) -> Array:
    """Returns the largest difference over the colours, uint8 [..., 3] twice -> uint8 [...]."""
    return (np.maximum(clean, drawn) - np.minimum(clean, drawn)).max(axis=-1)


def _masks(clean: Array, drawn: Array) -> Array:
    """Returns where images differ, with gaps of one pixel closed; uint8 [n, h, w, 3] twice -> bool [n, h, w]."""
    # The padding lets the mask grow over the edge before it shrinks again.
    visible = np.pad(_difference(clean, drawn) > _VISIBLE, ((0, 0), (1, 1), (1, 1)))
    return np.ascontiguousarray(binary_closing(visible, np.ones((1, 3, 3)))[:, 1:-1, 1:-1])
