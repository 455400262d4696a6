"""The ``fastmaf`` command. Help and usage errors do not import torch: only the body of a command does."""

from fastmaf.cli.app import main

__all__ = ["main"]
