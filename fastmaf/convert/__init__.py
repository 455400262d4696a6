"""Import of models from other libraries, with equal densities."""

from fastmaf.convert.published import LeakyMaskError, from_published

__all__ = ["LeakyMaskError", "from_published"]
