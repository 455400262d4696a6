"""The ``fastmaf`` command. Help and usage errors do not import torch: only the body of a command does."""

import sys

from fastmaf.extras import MissingExtraError, require

__all__ = ["main"]


def main() -> None:
    """Runs the command; without its packages one line names them, and only ``doctor`` runs."""
    try:
        require("cli", "the command fastmaf")
    except MissingExtraError as error:
        if sys.argv[1:] != ["doctor"]:
            sys.exit(f"error: {error}")
        from fastmaf.doctor import report

        print(report())
        return
    from fastmaf.cli.app import main as run

    run()
