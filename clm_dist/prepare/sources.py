"""A job's records: where they come from, and which of them the job takes."""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from clm_dist.config.data import DataConfig, overlap
from clm_dist.errors import ConfigError, first_line
from clm_dist.files.hub_errors import describe_full_disk, describe_hub_error, downloading
from clm_dist.prepare.builtin import load_builtin
from clm_dist.prepare.data_file import DataFile
from clm_dist.prepare.fields import check_fields, select_fields
from clm_dist.prepare.files import find_files
from clm_dist.prepare.identity import is_directory
from clm_dist.prepare.own_eval import eval_data, named_as_eval, naming
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.partitions import all_partitions, infer_schema
from clm_dist.prepare.plugin import open_records, read_tables
from clm_dist.prepare.tables import table_partitions

_STREAMED_RECORDS = 1000


@dataclass(frozen=True)
class Source:
    """A job's records in partitions, and the rows of them that the job takes."""

    where: str
    data: DataConfig
    """How the records are read."""
    partitions: Callable[[int], Iterator[Partition]]
    """Reads the source from its beginning at each call, in partitions of about the given number of bytes."""
    num_bytes: int | None
    """Size of the source; None if its end is not known."""
    slice: "Slice"
    left_out: Sequence[str] = ()
    """Files of directories that are not read, in words."""
    is_eval: bool = False
    """Whether these are the records of an eval split of its own."""
    files: Sequence[str] = ()
    """Names of the files that the records are in."""

    def narrowed(self, num_records: Sequence[int], size: int) -> "Source":
        """The same rows without the partitions before them.

        Args:
            num_records: how many records each partition of `size` bytes has.
        """
        rows = self.slice.of_total(sum(num_records)) if self.slice.is_relative else self.slice
        ends = list(accumulate(num_records))
        left_out = bisect_right(ends, rows.start)
        before = ends[left_out - 1] if left_out else 0
        rows = replace(rows, start=rows.start - before, stop=None if rows.stop is None else rows.stop - before)
        return replace(self, partitions=lambda _: islice(self.partitions(size), left_out, None), slice=rows)


@dataclass(frozen=True)
class Slice:
    """The rows that a split such as `train[10%:20%]` takes."""

    spec: str
    start: int = 0
    stop: int | None = None
    """None takes all to the end."""
    is_relative: bool = False
    """Whether start and stop are not known before all records are counted."""

    @classmethod
    def of_split(cls, spec: str) -> "Slice":
        """Raises ConfigError where it is no slice of one split."""
        one, other = (_to_rows(spec, total) for total in (2**40, 2**41))
        start, stop = one
        end = stop == 2**40 and other[1] == 2**41
        relative = other[0] != start or not (end or other[1] == stop)
        return cls(spec, start, None if end else stop, relative)

    def of_total(self, num_records: int) -> "Slice":
        """The rows once their number is known."""
        start, stop = _to_rows(self.spec, num_records)
        return replace(self, start=start, stop=stop, is_relative=False)


def _to_rows(spec: str, num_records: int) -> tuple[int, int]:
    if re.fullmatch(r"\w+(\.\w+)*", spec):
        # A whole split, as `datasets` spells it; importing that takes longer than preparing a small corpus.
        return 0, num_records
    from datasets.arrow_reader import ReadInstruction

    try:
        (rows,) = ReadInstruction.from_spec(spec).to_absolute({spec.partition("[")[0]: num_records})
    except (ValueError, AssertionError) as error:
        problem = "parts cannot be added up" if "+" in spec else first_line(error)
        raise ConfigError(
            f"data.split {spec}: {problem}; write one split or a slice of it: train, train[:5000] or train[10%:20%]",
            field="data.split",
        ) from None
    return rows.from_ or 0, num_records if rows.to is None else rows.to


def open_sources(data: DataConfig) -> Iterator[Source]:
    """The records of a job's data, and those of its eval split where it has its own.

    Raises:
        ConfigError, DataError: see `open_source`; the error names the fields of the split that it is of.
        ConfigError: records of a file are in both.
    """
    train = open_source(data)
    yield train
    if (of_eval := eval_data(data)) is not None:
        with naming(data, of_eval=True):
            source = open_source(of_eval)
        if data.eval_path is not None and not data.deduplicate:
            _check_apart(train, source)
        # Of a path that both splits are read from it is said once.
        left_out = source.left_out if data.eval_path is not None else ()
        yield replace(source, where=named_as_eval(source.where, data), left_out=left_out, is_eval=True)


def _check_apart(train: Source, evaluated: Source) -> None:
    """Raise an error if a file is in both, unless it may be that slices keep its records apart."""
    names = {os.path.realpath(name): name for name in train.files}
    both = sorted(names[path] for path in map(os.path.realpath, evaluated.files) if path in names)
    slices = [f"train{''.join(source.data.split.partition('[')[1:])}" for source in (train, evaluated)]
    are_the_same = len(both) == len(train.files) == len(evaluated.files)
    if both and ("train" in slices or are_the_same) and overlap(*slices):
        more = f" and {len(both) - 1:,} more" if len(both) > 1 else ""
        raise ConfigError(
            f"{both[0]}{more} would be trained on and evaluated: data.path and data.eval_path name it; name files of "
            "their own, or set data.deduplicate to true, which takes the eval split's documents out of the train split",
            field="data.eval_path",
        )


def open_source(data: DataConfig) -> Source:
    """The records of a job's data: those of `data.split`.

    Raises:
        ConfigError: the data set is not reachable, or has no such split.
        DataError: a path matches nothing, a file is broken, or a field is not there.
    """
    split = f" ({data.split})" if data.has_own_eval else ""
    if data.source == "builtin":
        if data.split.partition("[")[0] != "train":
            raise ConfigError(f"data.split {data.split}: the built-in corpus has one split, train", field="data.split")
        return _table_source(load_builtin(), data, f"the built-in corpus{split}", Slice.of_split(data.split))
    if data.source == "plugin":
        return _plugin_source(data, f"data.plugin {data.plugin}{split}")
    if data.source == "hub":
        where = f"the data set {data.dataset}{split}"
        if data.streaming:
            return _streamed_source(data, where)
        # `datasets` takes the slice itself.
        return _table_source(_load_hub(data), data, where, Slice(data.split))
    found = find_files(data)
    files = found.files
    schema = _schema_of(files, data)

    return Source(
        f"data.path {data.path}{split}",
        data,
        lambda size: all_partitions(files, data, size, schema),
        sum(file.size for file in files),
        Slice.of_split(data.split),
        found.left_out,
        files=[file.name for file in files],
    )


def _schema_of(files: list[DataFile], data: DataConfig) -> pa.Schema:
    """The types of the fields of JSON, from the first file that tells them; every file is held against them."""
    json_files = (file for file in files if file.kind == "json")
    schemas = (infer_schema(file, data) for file in json_files)
    found = next((schema for schema in schemas if schema is not None), None)
    return found or pa.schema([(path, pa.null()) for path in data.text_template.paths])


def _table_source(table: pa.Table, data: DataConfig, where: str, rows: Slice) -> Source:
    table = table.select(check_fields(table.schema, data, where))

    def tables() -> Iterator[pa.Table]:
        # One batch after the other: the table is mapped from files that may be larger than the memory.
        for batch in table.to_batches():
            yield select_fields(pa.Table.from_batches([batch]), data, where)

    return Source(where, data, lambda size: table_partitions(tables(), where, size), table.nbytes, rows)


def _plugin_source(data: DataConfig, where: str) -> Source:
    records = open_records(data)

    def tables() -> Iterator[pa.Table]:
        for table in read_tables(records, data):
            yield select_fields(table, data, where)

    rows = _rows_of_split(data)
    return Source(where, data, lambda size: table_partitions(tables(), where, size), None, rows)


def _rows_of_split(data: DataConfig) -> Slice:
    """The rows that a slice of a split of any name takes."""
    _, bracket, rest = data.split.partition("[")
    return replace(Slice.of_split(f"train{bracket}{rest}"), spec=data.split)


def _streamed_source(data: DataConfig, where: str) -> Source:
    rows = _rows_of_split(data)
    if rows.is_relative:
        raise ConfigError(
            f"data.split {data.split} counts from the end or in percent, and a data set that is streamed has no end "
            "that is known; name rows, such as train[:5000], or set data.streaming to false",
            field="data.split",
        )
    dataset = _load_hub_lazily(data, data.split.partition("[")[0])

    def tables() -> Iterator[pa.Table]:
        stream = dataset.with_format("arrow").iter(_STREAMED_RECORDS)
        while True:
            with _reaching(data):
                table = next(stream, None)
            if table is None:
                return
            yield select_fields(table, data, where)

    return Source(where, data, lambda size: table_partitions(tables(), where, size), None, rows)


class _reaching:  # noqa: N801  # a context manager reads as a verb
    """Turns what `datasets` raises into an error that says what to do."""

    def __init__(self, data: DataConfig) -> None:
        self.data = data

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        from datasets.exceptions import DatasetGenerationError

        dataset = self.data.dataset
        if error is not None and (full := describe_full_disk(error)):
            raise full from None
        if isinstance(error, (ValueError, RuntimeError, DatasetGenerationError)):
            # An unknown split or configuration, a data set that is a script, or a broken file.
            cause = error.__cause__ if isinstance(error, DatasetGenerationError) and error.__cause__ else error
            raise ConfigError(
                f"data.dataset {dataset}: {first_line(cause)}; check data.config, data.split and the data set's files",
                field="data.dataset",
            ) from None
        if isinstance(error, OSError):
            if is_directory(self.data):
                raise ConfigError(f"data.dataset {dataset}: {first_line(error)}", field="data.dataset") from None
            raise describe_hub_error(
                error,
                f"data.dataset {dataset} is not reachable on the Hub: {first_line(error)}; check the id, your network "
                "and `hf auth login`, or use local files with --set data.source=files --set data.path=...",
                field="data.dataset",
            ) from None


def _load_hub_lazily(data: DataConfig, split: str) -> Any:
    from datasets import load_dataset

    with _reaching(data):
        return load_dataset(data.dataset, data.config, split=split, revision=data.revision, streaming=True)


def _load_hub(data: DataConfig) -> pa.Table:
    from datasets import load_dataset

    with _reaching(data):
        dataset = downloading(load_dataset, data.dataset, data.config, split=data.split, revision=data.revision)
    # With no network the library takes whatever commit it read last.
    read = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if not is_directory(data) and re.fullmatch("[0-9a-f]{40}", data.revision or "") and read - {data.revision}:
        raise ConfigError(
            f"data.dataset {data.dataset}: the Hub is not reachable, and `datasets` gives commit {', '.join(read)}, "
            f"not {data.revision} as the job needs; set data.revision to that one, or prepare where there is a network",
            field="data.dataset",
        )
    return dataset.with_format("arrow")[:]
