"""Files of another encoding than UTF-8, read as UTF-8 from their beginning to their end."""

import codecs
import io

import pyarrow as pa

from clm_dist.errors import DataError

_CHUNK_BYTES = 1 << 18
_MARKS = {
    codecs.BOM_UTF8: ("utf-8", "utf-8-sig"),
    codecs.BOM_UTF32_LE: ("utf-32", "utf-32-le"),
    codecs.BOM_UTF32_BE: ("utf-32", "utf-32-be"),
    codecs.BOM_UTF16_LE: ("utf-16", "utf-16-le"),
    codecs.BOM_UTF16_BE: ("utf-16", "utf-16-be"),
}
"""Encodings by the byte order marks that their files may begin with, the longer marks first."""


def decoded(opened: pa.NativeFile, encoding: str, where: str) -> pa.NativeFile:
    """The content of an opened file as UTF-8. Reading raises DataError for a byte that does not decode."""
    return pa.PythonFile(io.BufferedReader(_Decoder(opened, encoding, where), _CHUNK_BYTES), "r")


class _Decoder(io.RawIOBase):
    """A stream of UTF-8 from one of another encoding."""

    def __init__(self, source: pa.NativeFile, encoding: str, where: str) -> None:
        self._source = source
        self._encoding = encoding
        self._where = where
        self._decoder = codecs.getincrementaldecoder(encoding)()
        # None once the file is seen not to be UTF-8.
        self._as_utf8 = None if encoding.startswith("utf-8") else codecs.getincrementaldecoder("utf-8")()
        self._is_plain = True
        self._num_read = 0
        self._waiting = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "memoryview[int]") -> int:  # type: ignore[override]
        is_end = False
        while not self._waiting and not is_end:
            chunk = self._source.read(_CHUNK_BYTES)
            is_end = not chunk
            self._waiting = memoryview(self._decode(chunk, is_end))
        size = min(len(buffer), len(self._waiting))
        buffer[:size] = self._waiting[:size]
        self._waiting = self._waiting[size:]
        return size

    def _decode(self, chunk: bytes, is_end: bool) -> bytes:
        if not self._num_read:
            self._check_mark(chunk)
        self._num_read += len(chunk)
        self._check_not_utf8(chunk, is_end)
        try:
            return self._decoder.decode(chunk, is_end).encode()
        except UnicodeDecodeError as error:
            # The decoder keeps the bytes of a character that was cut before the chunk.
            place = self._num_read - len(error.object) + error.start
            raise self._wrong(f"byte {place:,} (0x{error.object[error.start]:02x}) does not decode as") from None
        except UnicodeEncodeError:
            raise self._wrong("holds half of a character in") from None
        except UnicodeError:
            if b"\0" not in chunk:
                raise self._is_utf8() from None
            # Of a character below 256 the low byte comes first, or last.
            order = "le" if chunk[1::2].count(0) >= chunk[::2].count(0) else "be"
            raise DataError(
                f"{self._where}: has no byte order mark, which {self._encoding} needs; set data.encoding to "
                f"{self._encoding}-{order}",
                field="data.encoding",
            ) from None

    def _check_not_utf8(self, chunk: bytes, is_end: bool) -> None:
        """Raise DataError at the end of a file that is UTF-8, which most encodings would take for other text.

        Text beyond ASCII in one of them is hardly ever valid as UTF-8, nor has text in UTF-16 or 32 no NUL byte.
        """
        if self._as_utf8 is None:
            return
        is_wide = self._encoding.startswith(("utf-16", "utf-32"))
        try:
            self._as_utf8.decode(chunk, is_end)
        except UnicodeDecodeError:
            self._as_utf8 = None
            return
        if is_wide and b"\0" in chunk:
            self._as_utf8 = None
            return
        self._is_plain = self._is_plain and chunk.isascii()
        if is_end and self._num_read and (is_wide or not self._is_plain):
            raise self._is_utf8()

    def _is_utf8(self) -> DataError:
        return DataError(
            f"{self._where}: is UTF-8, and would be other text as {self._encoding}; set data.encoding to null, or save "
            f"the file as {self._encoding}",
            field="data.encoding",
        )

    def _check_mark(self, chunk: bytes) -> None:
        """Raise DataError where a file begins with the mark of another encoding, which some would read as text."""
        names = next((names for mark, names in _MARKS.items() if chunk.startswith(mark)), None)
        if names and self._encoding not in names:
            raise DataError(
                f"{self._where}: begins with the byte order mark of {names[0]}, but data.encoding is {self._encoding}; "
                f"set it to {'null' if names[0] == 'utf-8' else names[0]}",
                field="data.encoding",
            )

    def _wrong(self, problem: str) -> DataError:
        return DataError(
            f"{self._where}: {problem} {self._encoding}; set data.encoding to the file's encoding, or mend the file",
            field="data.encoding",
        )

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()
