"""One file of data: its kind, its content, and what goes wrong while it is read."""

import errno
import gzip
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import fsspec
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from clm_dist.errors import REFUSED, ClmDistError, DataError, StorageError, first_line
from clm_dist.files.storage import describe_storage_error
from clm_dist.prepare.decoding import decoded
from clm_dist.prepare.json_lines import first_line_not_utf8, not_utf8

Kind = Literal["json", "csv", "parquet", "arrow", "text"]

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
FORMATS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_READ_BYTES = 1 << 24
_DAMAGE = (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error)


@dataclass(frozen=True)
class DataFile:
    """One file, by its path or URL."""

    name: str
    size: int
    """Bytes as it lies there, compressed or not."""
    is_text: bool = False
    """Whether it is read as text, whatever its suffix."""
    encoding: str | None = None
    """Of its text; None is UTF-8."""

    @property
    def suffixes(self) -> list[str]:
        return [suffix.lower() for suffix in Path(self.name.partition("?")[0]).suffixes]

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(self.suffixes[-1]) if self.suffixes else None

    @property
    def kind(self) -> Kind | None:
        return "text" if self.is_text else self.kind_by_suffix

    @property
    def kind_by_suffix(self) -> Kind | None:
        suffixes = [suffix for suffix in self.suffixes if suffix not in COMPRESSIONS]
        return FORMATS.get(suffixes[-1]) if suffixes else None

    @property
    def is_web(self) -> bool:
        return self.name.startswith(("http://", "https://"))

    @property
    def is_stream(self) -> bool:
        """Whether its text can only be read from its beginning."""
        return self.compression is not None or self.is_web or self.encoding is not None

    def open(self) -> pa.NativeFile:
        """The file, which can seek; but web servers give most files from the beginning only."""
        if not is_url(self.name):
            return pa.OSFile(self.name)
        options = {"block_size": 0} if self.is_web and self.kind != "parquet" else {}
        return pa.PythonFile(fsspec.open(self.name, **options).open(), "r")

    def stream(self) -> pa.NativeFile:
        """The content of the file, from its beginning, decompressed and as UTF-8."""
        return self.content_of(self.open())

    def content(self) -> bytes:
        """The whole content of the file, decompressed and as UTF-8."""
        with self.stream() as stream:
            # Reading all at once asks a stream for its size, which some have to be read twice for.
            return b"".join(iter(lambda: stream.read(_READ_BYTES), b""))

    def content_of(self, opened: pa.NativeFile) -> pa.NativeFile:
        """The content of the opened file."""
        content = self._decompressed(opened)
        return decoded(content, self.encoding, self.name) if self.encoding else content

    def _decompressed(self, opened: pa.NativeFile) -> pa.NativeFile:
        if self.compression == "gzip":
            # Arrow takes the zeros that tapes and some tools pad with for damage.
            return pa.PythonFile(gzip.GzipFile(fileobj=opened), "r")
        if self.compression == "xz":
            return pa.PythonFile(lzma.LZMAFile(opened), "r")
        return pa.CompressedInputStream(opened, self.compression) if self.compression else opened


def is_url(path: str) -> bool:
    return "://" in path


class reading:  # noqa: N801  # a context manager reads as a verb
    """Turns what goes wrong while a file is read into an error that names the file."""

    def __init__(self, file: DataFile) -> None:
        self.file = file

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, UnicodeDecodeError) or (isinstance(error, pa.ArrowException) and "UTF8" in str(error)):
            number = None
            if self.file.kind in ("csv", "text"):
                with self.file.stream() as stream:
                    number = first_line_not_utf8(stream)
            where = f"{self.file.name}:{number}" if number else self.file.name
            raise not_utf8(where, is_text=self.file.kind not in ("parquet", "arrow")) from None
        if not isinstance(error, Exception) or isinstance(error, ClmDistError):
            return
        problem = f"{self.file.name}: cannot be read"
        mend = "mend the file or take it out of data.path"
        # Where compressed bytes are damaged or missing, Arrow raises an OSError without a number.
        is_short = isinstance(error, _DAMAGE) or (type(error) is OSError and error.errno is None)
        of_format = is_short or isinstance(error, pa.ArrowException)
        if is_url(self.file.name) and is_short:
            # The connection may have ended early, so what is done so far is kept.
            problem = f"{problem}: {first_line(error)}; run the same command again, or {mend}"
            raise StorageError(problem, field="data.path") from None
        if is_url(self.file.name) and not of_format:
            raise describe_storage_error(error, problem, field="data.path") from None
        if of_format or (isinstance(error, OSError) and error.errno in (errno.ENOENT, *REFUSED)):
            raise DataError(f"{problem}: {first_line(error)}; {mend}", field="data.path") from None
        if isinstance(error, OSError):
            problem = f"{problem}: {first_line(error)}; {mend}, or run the same command again"
            raise StorageError(problem, field="data.path") from None
