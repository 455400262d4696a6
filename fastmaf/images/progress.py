"""Progress of long work, and notes in between, on standard error.

It is here, and not in ``fastmaf.io``, as the core of fastmaf does without tqdm.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from fastmaf.images.names import visible
from fastmaf.io.wording import count

_T = TypeVar("_T")
_QUIET_SECONDS = 2.0
_open: list[Progress] = []  # those that write lines, the outermost first


class Progress:
    """A progress bar on a terminal, and lines in a log.

    On a terminal it is tqdm's bar. On any other stream it is one line at each tenth of the work, such as::

        fitting: 30% (12 of 40 models), 25 s

    Nothing is written in the first two seconds, so that short work leaves no line, and nothing by work within other
    work that already reports. Without a total, the lines come after 2, 4, 8, 16, ... seconds, and at the end. A stream
    that is missing, closed or broken is no error.

    Args:
        description: the work, such as ``"fitting"``.
        unit: what is counted, in the singular.
        total: number of units, if it is known.
        initial: number of units done before.
        leave: keep the finished bar on the terminal.
        show: False to show nothing.
        stream: where to write; by default ``sys.stderr``.
        clock: returns seconds; for tests.

    Example:
        >>> with Progress("fitting", "model", total=40) as bar:
        ...     bar.update()
    """

    def __init__(
        self,
        description: str,
        unit: str,
        *,
        total: int | None = None,
        initial: int = 0,
        leave: bool = False,
        show: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.unit, self.total, self.done, self.status = description, unit, total, initial, ""
        self._leave, self._show, self._stream, self._clock = leave, show, stream, clock
        self._bar: tqdm[Any] | None = None
        self._writes_lines = False

    def __enter__(self) -> Progress:
        stream = sys.stderr if self._stream is None else self._stream
        if not self._show or stream is None:
            return self
        if _is_terminal(stream):
            self._bar = tqdm(
                desc=self.description,
                unit=self.unit,
                total=self.total,
                initial=self.done,
                leave=self._leave,
                file=stream,
                dynamic_ncols=True,
            )
            return self
        self._writes_lines = True
        self._began, self._next_seconds, self._next_count = self._clock(), _QUIET_SECONDS, self._tenth_after(self.done)
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._writes_lines:
            seconds = self._clock() - self._began
            if not self.total and seconds >= _QUIET_SECONDS:
                self._write(seconds)
            _open.remove(self)
        self._bar, self._writes_lines = None, False

    def update(self, n: int = 1) -> None:
        """Counts ``n`` more units."""
        self.done += n
        if self._bar is not None:
            self._bar.update(n)
        elif self._writes_lines and self.done >= self._next_count:
            self._next_count = self._tenth_after(self.done)
            seconds = self._clock() - self._began
            if seconds >= self._next_seconds:
                if not self.total:
                    self._next_seconds = 2 * seconds
                self._write(seconds)

    def set_status(self, text: str) -> None:
        """Shows a text behind the figures, such as the current loss."""
        self.status = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def set_description(self, text: str) -> None:
        """Replaces the description of the work."""
        self.description = text
        if self._bar is not None:
            self._bar.set_description_str(text)

    def _tenth_after(self, done: int) -> float:
        """Returns the count at which the next tenth of the work is done; without a total, the next count."""
        if not self.total:
            return done + 1
        return max((10 * done // self.total + 1) * self.total / 10, done + 1)

    def _write(self, seconds: float) -> None:
        if _open[0] is not self:
            return
        done = count(self.done, self.unit)
        if self.total:
            share = 100 * self.done // self.total
            done = f"{share}% ({self.done:,} of {count(self.total, self.unit)})"
        status = f"; {self.status}" if self.status else ""
        _write_line(f"{self.description}: {done}, {_duration(seconds)}{status}", self._stream)


def track(items: Iterable[_T], description: str, unit: str, **options: Any) -> Iterator[_T]:
    """Yields items and shows the ``Progress`` of whoever works on them; ``options`` are its arguments.

    Example:
        >>> [number**2 for number in track(range(3), "squaring", "number")]
        [0, 1, 4]
    """
    total = len(items) if isinstance(items, Sized) else None
    with Progress(description, unit, **{"total": total, **options}) as bar:
        for item in items:
            yield item
            bar.update()


def note(text: str, stream: TextIO | None = None) -> None:
    """Writes a line to standard error, above the bars of a terminal; control characters are escaped.

    A stream that is missing, closed or broken is no error.
    """
    _write_line(visible(text), stream)


def _write_line(text: str, stream: TextIO | None) -> None:
    stream = sys.stderr if stream is None else stream
    if stream is None:
        return
    try:
        tqdm.write(text, file=stream)
        stream.flush()
    except (OSError, ValueError, AttributeError):  # broken, closed, or no real file
        pass


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except (OSError, ValueError, AttributeError):
        return False


def _duration(seconds: float) -> str:
    """Formats seconds: "25 s", "3 min 05 s", "2 h 07 min"."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
