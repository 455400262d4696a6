"""Import of models from other libraries, with equal densities."""

from __future__ import annotations

from fastmaf.convert.published import LeakyMaskError, from_published

__all__ = ["LeakyMaskError", "from_published", "from_reference"]

from_reference = from_published  # its name in earlier versions
