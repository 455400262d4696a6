"""Numbers in sentences, and files in errors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


def count(n: int, noun: str) -> str:
    """Formats a number and a noun: "1 image", "1,203 images", "2 batches"."""
    plural = "es" if noun.endswith("tch") else "s"
    return f"{n:,} {noun}{'' if n == 1 else plural}"


def ordinal(n: int) -> str:
    """Formats a position: "1st", "2nd", "3rd", "11th", "112th", "1,001st"."""
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n:,}{suffix}"


def percent(share: float) -> str:
    """Formats a share of one with three digits: "5%", "4.92%"."""
    return f"{100 * share:.3g}%"


def some(names: Sequence[str], limit: int = 3) -> str:
    """Lists the first names, and how many there are besides: "a, b, c and 4 more"."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


@contextmanager
def errors_of(file: object, *kinds: type[Exception]) -> Iterator[None]:
    """Raises errors of some kinds again with a file at the beginning of their text: "model.safetensors: ..."."""
    try:
        yield
    except kinds as error:
        raise type(error)(f"{file}: {error}") from error
