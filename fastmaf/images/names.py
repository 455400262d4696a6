"""Safe display of file and class names, which may hold any character, in text and in CSV files."""

from __future__ import annotations

import re
import unicodedata

# Characters that reorder the text around them: "gnp.exe" may be displayed as "exe.png".
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMULA = re.compile(r"(?:^|;)\s*[=+\-@'\uff1d\uff0b\uff0d\uff20]")  # the last four are full-width forms
_BREAKS = ("Cc", "Zl", "Zp")  # Unicode's categories of control characters and line separators
_ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4})")


def visible(text: str, keep: str = "") -> str:
    r"""Escapes all characters that cannot be printed or that change the display of others, except those in ``keep``.

    An undecodable byte of a file name (Python's surrogate escape) becomes \xff, a line break \x0a, a mark that reorders
    text \u202e. The result can be encoded, is valid in XML and HTML, and contains no terminal control codes.
    """
    return text if text.isprintable() else "".join(c if c in keep else _visible(c) for c in text)


def _visible(character: str) -> str:
    n = ord(character)
    if 0xDC80 <= n <= 0xDCFF:  # surrogateescape: the byte n - 0xDC00
        return f"\\x{n - 0xDC00:02x}"
    kind = unicodedata.category(character)
    if kind in ("Cc", "Cs", "Zl", "Zp") or character in _REORDERING or n & 0xFFFE == 0xFFFE:
        return _escaped(character)
    return character


def _escaped(character: str) -> str:
    n = ord(character)
    return f"\\x{n:02x}" if n < 0x100 else f"\\u{n:04x}"


def to_cell(name: str, *, keep_bytes: bool = True) -> str:
    r"""Returns a name as a CSV cell that no spreadsheet interprets as a formula and that breaks no line.

    A name that begins with ``= + - @`` or ``'``, holds one of these after a semicolon (the separator in some locales),
    or holds a control character or line separator is written as an apostrophe and the name, with backslashes doubled
    and control characters and semicolons escaped as ``\xNN`` or ``\uNNNN``. Every other name is its own cell.
    ``from_cell`` is the inverse.

    Without ``keep_bytes``, undecodable bytes (Python's surrogate escapes) are escaped too, for streams that cannot hold
    them.
    """
    kinds = _BREAKS if keep_bytes else (*_BREAKS, "Cs")
    written_out = {c for c in name if unicodedata.category(c) in kinds or _is_lone_surrogate(c)}
    if not written_out and not _FORMULA.search(name):
        return name
    written_out.add(";")
    return "'" + "".join("\\\\" if c == "\\" else _escaped(c) if c in written_out else c for c in name)


def _is_lone_surrogate(character: str) -> bool:
    """Returns whether a character is half a pair, as in names on Windows, that stands for no undecodable byte."""
    return "\ud800" <= character <= "\udfff" and not "\udc80" <= character <= "\udcff"


def from_cell(cell: str) -> str:
    """Returns the name that ``to_cell`` wrote as this cell."""
    return _ESCAPE.sub(_decoded, cell[1:]) if cell.startswith("'") else cell


def _decoded(escape: re.Match[str]) -> str:
    code = escape[1]
    return "\\" if code == "\\" else chr(int(code[1:], 16))
