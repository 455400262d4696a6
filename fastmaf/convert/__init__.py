"""Models that were trained elsewhere, taken over with an equal density."""

from fastmaf.convert.published import LeakyMaskError, from_reference

__all__ = ["LeakyMaskError", "from_reference"]
