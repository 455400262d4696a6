"""The published run repeated on images of capsules, and beside it an inspection model of the same images."""

from fastmaf.reproduction.run import Reproduction, reproduce

__all__ = ["Reproduction", "reproduce"]
