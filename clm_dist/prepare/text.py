"""Text as records with the one field `text`: a line, a paragraph or a file each (`data.records`)."""

import codecs
import re
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.compute

from clm_dist.errors import DataError
from clm_dist.prepare.cuts import Unit, paragraphs_of
from clm_dist.prepare.data_file import DataFile, reading
from clm_dist.prepare.json_lines import check_encoding, first_line_not_utf8, not_utf8
from clm_dist.prepare.partition import Partition

_LINE_ENDS = re.compile(rb"\r+(?=\n|\Z)")
# The length of a document is kept in 31 bits.
_MAX_BYTES = 2**31 - 1


def read_text(content: pa.Buffer, file: DataFile, unit: Unit, place: Callable[[int], str]) -> pa.Table:
    """A record for each line or paragraph of a content.

    Lines end with a line feed, and carriage returns before it are part of the end. A paragraph is its lines with a
    line feed between them.

    Args:
        place: a line of the content, by its number from 1, as messages name it.
    """
    text = _checked_text(without_marks(content.to_pybytes()), file, place)
    if unit == "paragraph":
        return _table(pa.array(paragraphs_of(_LINE_ENDS.sub(b"", text)), pa.large_binary()), file.name)
    whole = pa.array([text], pa.large_binary()).cast(pa.large_string())
    split = pa.compute.list_flatten(pa.compute.split_pattern(whole, "\n"))
    if not text or text.endswith(b"\n"):
        split = split[:-1]
    return _table(pa.compute.ascii_rtrim(split, "\r"), file.name)


def file_partitions(files: Sequence[DataFile], size: int) -> Iterator[Partition]:
    """Neighbouring files that hold about `size` bytes: a partition for each of many small files would take long."""
    held: list[DataFile] = []
    num_bytes = 0
    for number, file in enumerate(files, 1):
        held.append(file)
        # Of a compressed file, and some on the web, the size inside is not known.
        num_bytes += file.size if file.compression is None and file.size else size
        if num_bytes >= size or number == len(files):
            others = f" and {len(held) - 1:,} more" if len(held) > 1 else ""
            yield Partition(f"{held[0].name}{others}", num_bytes, files=tuple(held))
            held, num_bytes = [], 0


def read_files(files: Sequence[DataFile]) -> pa.Table:
    """A record for each file, with its line breaks as they are."""
    return pa.concat_tables(_read_file(file) for file in files)


def _read_file(file: DataFile) -> pa.Table:
    with reading(file):
        content = file.content().removeprefix(codecs.BOM_UTF8)
        text = _checked_text(content, file, lambda number: f"{file.name}:{number}")
        return _table(pa.array([text], pa.large_binary()), file.name)


def without_marks(content: bytes) -> bytes:
    """The content without the byte order marks that stay where files with one were joined."""
    return content.replace(b"\n" + codecs.BOM_UTF8, b"\n").removeprefix(codecs.BOM_UTF8)


def _checked_text(text: bytes, file: DataFile, place: Callable[[int], str]) -> bytes:
    """A text that is UTF-8."""
    check_encoding(text, file.name, file.encoding)
    try:
        text.decode()
    except UnicodeDecodeError:
        raise not_utf8(place(first_line_not_utf8(pa.BufferReader(text)) or 1)) from None
    return text


def _table(texts: pa.Array, where: str) -> pa.Table:
    longest = pa.compute.max(pa.compute.binary_length(texts)).as_py() or 0
    if longest > _MAX_BYTES:
        raise DataError(
            f"{where}: a record of {longest:,} bytes is too large; cut it, or set data.records to paragraph or line",
            field="data.path",
        )
    return pa.table({"text": texts.cast(pa.large_string())})
