"""Names of files and classes, which may hold anything, as they are shown and as they are written into a CSV."""

from __future__ import annotations

import re
import unicodedata

# Characters that reorder the line around them: "gnp.exe" may be shown as "exe.png".
_REORDERING = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_FORMULA = re.compile(r"(?:^|;)\s*[=+\-@'\uff1d\uff0b\uff0d\uff20]")  # the last four are full-width forms
_BREAKS = ("Cc", "Zl", "Zp")  # Unicode's categories of control characters and line separators
_ESCAPE = re.compile(r"\\(\\|x[0-9a-f]{2}|u[0-9a-f]{4})")


def visible(text: str, keep: str = "") -> str:
    r"""`text` with every character that cannot be printed, or would change what others look like, written out.

    A byte of a file name that is no UTF-8 (Python's surrogate escape) becomes \xff, a line break \x0a, a mark that
    reorders text \u202e. What remains can be encoded and stands in XML as in HTML, and a terminal obeys none of it.
    Characters of `keep` stay as they are.
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
    r"""A name as a CSV cell: one that a spreadsheet takes for a formula, or that breaks a line, is written as text.

    Such a name begins with ``= + - @`` or ``'``, holds one of these after a semicolon (which separates cells in some
    countries), or holds a control character or a line separator. Its cell is an apostrophe and the name, with each
    backslash doubled and each control character and semicolon as ``\xNN`` or ``\uNNNN``. Every other name is its own
    cell. ``from_cell`` gives the name back.

    Bytes that are no UTF-8 (Python's surrogate escapes) are such characters, too, unless ``keep_bytes``: for a stream
    that cannot hold them.
    """
    kinds = _BREAKS if keep_bytes else (*_BREAKS, "Cs")
    written_out = {c for c in name if unicodedata.category(c) in kinds}
    if not written_out and not _FORMULA.search(name):
        return name
    written_out.add(";")
    return "'" + "".join("\\\\" if c == "\\" else _escaped(c) if c in written_out else c for c in name)


def from_cell(cell: str) -> str:
    """The name that ``to_cell`` wrote: without the leading apostrophe, if there is one, and its escapes decoded."""
    return _ESCAPE.sub(_decoded, cell[1:]) if cell.startswith("'") else cell


def _decoded(escape: re.Match[str]) -> str:
    code = escape[1]
    return "\\" if code == "\\" else chr(int(code[1:], 16))
