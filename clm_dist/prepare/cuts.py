"""Where text can be cut into partitions: after a line, or after the blank line that ends a paragraph.

A cut depends on the text around it alone, so partitions of any size together have each line, or paragraph, once.
"""

import re
from typing import Literal

import pyarrow as pa

Unit = Literal["line", "paragraph"]

_READ_AHEAD = 1 << 16
# What str.isspace takes for white space, as UTF-8, but for the line feed.
_SPACE = (
    rb"(?:[\t\x0b\x0c\r\x1c-\x1f ]|\xc2[\x85\xa0]|\xe1\x9a\x80|"
    rb"\xe2\x80[\x80-\x8a\xa8\xa9\xaf]|\xe2\x81\x9f|\xe3\x80\x80)"
)
_SPACES = re.compile(_SPACE + rb"*")
_BLANK_LINE = re.compile(rb"\n" + _SPACE + rb"*\n")
"""A line of white space, with the end of the line before it."""
_BLANK_LINES = re.compile(rb"\n(?:" + _SPACE + rb"*\n)+")
_LONGEST_SPACE = 3


def stretch_of(opened: pa.NativeFile, start: int, stop: int, unit: Unit) -> tuple[int, int]:
    """Begin and end of the lines or paragraphs of a file that count for its bytes [start, stop).

    They lie between two cuts. The cut for a byte is where the first line begins at that byte or after it, or where
    the first blank line ends that begins there: the greater the byte, the greater the cut, or it is the same.
    """
    begin = _cut_at(opened, start, unit, stop)
    if begin is None:
        return stop, stop
    end = _cut_at(opened, stop, unit)
    assert end is not None
    return begin, end


def _cut_at(opened: pa.NativeFile, place: int, unit: Unit, limit: int | None = None) -> int | None:
    """The cut for a byte; None where that for the byte `limit` is the same."""
    if not place:
        return 0
    # The byte before says whether a line begins here, or one goes on that began before.
    line = _line_end(opened, place - 1)
    if limit is not None and line >= limit:
        return None
    return line if unit == "line" else _blank_line_end(opened, line, limit)


def _line_end(opened: pa.NativeFile, place: int) -> int:
    """Where the line ends that the byte at `place` is in."""
    opened.seek(place)
    while chunk := opened.read(_READ_AHEAD):
        end = chunk.find(b"\n") + 1
        place += end or len(chunk)
        if end:
            break
    return place


def _blank_line_end(opened: pa.NativeFile, place: int, limit: int | None) -> int | None:
    """Where the first blank line ends that begins at `place`, a line's beginning, or after it; else the file's end.

    Returns None where it would begin at the byte `limit` or after it.
    """
    first, held = place - 1, b""
    opened.seek(first)
    while chunk := opened.read(_READ_AHEAD):
        held += chunk
        if found := _BLANK_LINE.search(held):
            begin = first + found.start() + 1
            return first + found.end() if limit is None or begin < limit else None
        # A blank line may have begun; of others, however long, nothing is held.
        kept = held.rfind(b"\n")
        spaces = _SPACES.match(held, kept + 1)
        assert spaces
        if kept < 0 or spaces.end() < len(held) - _LONGEST_SPACE:
            kept = len(held)
        first, held = first + kept, held[kept:]
        if limit is not None and first + 1 >= limit:
            return None
    return first + len(held)


def last_cut(content: bytes, unit: Unit, start: int = 0) -> int:
    """The end of the last whole line or paragraph of a content; 0 where it has none.

    Args:
        start: where to begin; the cuts before it are known, and the last line feed before it is not behind it.
    """
    if unit == "line":
        return content.rfind(b"\n", start) + 1
    end = 0
    for found in _BLANK_LINE.finditer(content, start):
        end = found.end()
    return end


def paragraphs_of(text: bytes) -> list[bytes]:
    """The stretches of lines between blank lines, without the end of their last line; a line ends with a line feed."""
    return [paragraph for paragraph in _BLANK_LINES.split(b"\n\n" + text + b"\n\n") if paragraph]
