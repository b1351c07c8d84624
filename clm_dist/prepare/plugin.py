"""Records that an installed package reads: `data.source: plugin`."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import pyarrow as pa

from clm_dist.config.data import DataConfig
from clm_dist.errors import ClmDistError, ConfigError, DataError, first_line
from clm_dist.extensions import load_extension

GROUP = "clm_dist.sources"
_FIELD = "data.plugin"


class Records(Protocol):
    """What an entry point of the group `clm_dist.sources` returns when it is called with `data.options` and a split.

    The split is a name without a slice, such as `train`; clm-dist takes the rows of a slice itself.
    """

    identity: str
    """A text that changes whenever a record does, such as a version, a checksum or the time of the last change. Blocks
    that were made of the same identity are taken again."""

    def tables(self) -> Iterable[pa.Table]:
        """All records in their order, as Arrow tables of some thousand rows, the same at every call."""


def open_records(data: DataConfig) -> Records:
    """The records of a plugin.

    Raises:
        ConfigError: no installed package has it, or it is not as `Records` asks.
        DataError: it cannot open the records.
    """
    assert data.plugin
    plugin = load_extension(GROUP, data.plugin, field=_FIELD)
    with _naming(data):
        records: Records = plugin(dict(data.options or {}), data.split.partition("[")[0])
    if not isinstance(getattr(records, "identity", None), str) or not callable(getattr(records, "tables", None)):
        raise ConfigError(
            f"{_FIELD} {data.plugin} returns {type(records).__name__}, which has no text `identity` and no method "
            "`tables`; see docs/extend.md",
            field=_FIELD,
        )
    return records


def read_tables(records: Records, data: DataConfig) -> Iterator[pa.Table]:
    """Its tables. Raises DataError where it fails, or gives something else."""
    with _naming(data):
        tables = iter(records.tables())
    while True:
        with _naming(data):
            table = next(tables, None)
        if table is None:
            return
        if not isinstance(table, pa.Table):
            raise DataError(
                f"{_FIELD} {data.plugin} gives {type(table).__name__}, not pyarrow.Table; see docs/extend.md",
                field=_FIELD,
            )
        yield table


def plugin_identity(data: DataConfig) -> dict[str, Any]:
    """All that decides which records come, for a store's fingerprint."""
    return {"plugin": data.plugin, "options": data.options, "identity": open_records(data).identity}


class _naming:  # noqa: N801  # a context manager reads as a verb
    """Turns what a plugin raises into an error that names it."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, ClmDistError):
            raise DataError(
                f"{_FIELD} {self.data.plugin} fails: {type(error).__name__}: {first_line(error)}; see data.options",
                field=_FIELD,
            ) from error
