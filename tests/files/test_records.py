"""The records of a run are of the types that are declared, whoever wrote them."""

import json
import math
import struct
import tracemalloc
from pathlib import Path
from random import Random
from typing import Any, get_args, get_type_hints
from unittest.mock import Mock

import pytest

from clm_dist.errors import ConfigError
from clm_dist.files import records
from clm_dist.files.record_types import Record
from clm_dist.files.records import RecordReader, append_records, read_records, replace_records
from clm_dist.files.run_dir import RunDir
from clm_dist.submit.training import Training
from clm_dist.train.recorder import outlives_start

TYPES = {kind: of for of in get_args(Record) for kind in get_args(get_type_hints(of)["kind"])}


def test_every_record_of_a_run_has_the_fields_of_its_type(finished_run: RunDir) -> None:
    seen = set()
    for record in read_records(finished_run.metrics):
        of = TYPES[record["kind"]]
        assert of.__required_keys__ <= record.keys() <= of.__required_keys__ | of.__optional_keys__, record["kind"]
        seen.add(record["kind"])
    assert seen == {"start", "phase", "step", "eval", "verify", "checkpoint", "final"}


def test_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first: Record = {"kind": "phase", "step": 0, "phase": "Training"}
    second: Record = {"kind": "rollback", "step": 7, "to": 4}
    append_records(path, [first])
    append_records(path, [second])
    assert list(read_records(path)) == [first, second]
    replace_records(path, [second])
    assert path.read_text() == json.dumps(second) + "\n"


@pytest.mark.parametrize(
    "line",
    [b"", b"[]", b'{"kind": "step"}', b'{"step": 1}', b'{"kind": "st', b'{"kind": "st{"kind": "step", "step": 1}'],
)
def test_a_line_that_is_no_record_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "phase", "step": 0, "phase": "Training"}\n' + line + b"\n")
    with pytest.raises(ConfigError, match=f"^{path}:2: not a record of a run; remove this line$"):
        list(read_records(path))


def test_numbers_and_texts_are_read_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    random = Random(0)
    bits = (random.getrandbits(64).to_bytes(8, "little") for _ in range(20_000))
    numbers = [number for (number,) in map(struct.Struct("<d").unpack, bits) if math.isfinite(number)]
    record: Any = {
        "kind": "failure",
        "step": 2**63,
        "numbers": [*numbers, *(random.random() * 10**k for k in range(-20, 20)), 5e-324, 1.7976931348623157e308, -0.0],
        "not a file name": "\udcff",
    }
    append_records(path, [record, record | {"not a file name": "\U0001f600\u2028"}])
    read: list[Any] = list(read_records(path))
    assert read[0] == record
    assert str(read[1]) == str(record | {"not a file name": "\U0001f600\u2028"})


def test_a_reader_gives_what_is_new_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    one: Record = {"kind": "phase", "step": 0, "phase": "Training"}
    two: Record = {"kind": "rollback", "step": 7, "to": 4}
    reader = RecordReader(path)
    assert reader.new() == ([], False)
    append_records(path, [one, two])
    assert reader.new() == ([one, two], True)
    assert RecordReader(path, from_end=True).new() == ([], False)
    line = json.dumps(two) + "\n"
    for part, expected in ((line[:9], []), (line[9:], [two])):
        with path.open("a") as file:
            file.write(part)
        assert reader.new() == (expected, False)
    replace_records(path, [two])
    assert reader.new() == ([two], True)


@pytest.mark.parametrize("fragment", [b'{"kind": "st', b"\0" * 100_000], ids=["cut", "zeros"])
def test_records_are_added_after_the_last_whole_line(
    fragment: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    one: Record = {"kind": "phase", "step": 0, "phase": "Training"}
    two: Record = {"kind": "rollback", "step": 7, "to": 4}
    append_records(path, [one])
    with path.open("ab") as file:
        file.write(fragment)
    follower = RecordReader(path, from_end=True)
    assert list(read_records(path)) == [one]
    append_records(path, [two])
    assert list(read_records(path)) == [one, two]
    assert follower.new() == ([two], False)
    assert f"{path} ends in the middle of a record, whose {len(fragment)} bytes are cut off" in caplog.text


def test_a_file_of_one_record_that_was_cut_begins_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"kind": "st')
    append_records(path, [{"kind": "rollback", "step": 7, "to": 4}])
    assert [record["kind"] for record in read_records(path)] == ["rollback"]


def test_only_the_last_steps_of_a_long_run_are_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    start: Any = {"kind": "start", "step": 0}
    steps: list[Any] = [{"kind": "step", "step": step} for step in range(1, 101)]
    failure: Any = {"kind": "failure", "step": 50}
    append_records(path, [start, *steps[:50], failure, *steps[50:]])
    parse = Mock(side_effect=records._parse_record)
    monkeypatch.setattr(records, "_parse_record", parse)
    assert list(read_records(path, last_steps=0)) == [start, failure]
    assert list(read_records(path, last_steps=2)) == [start, failure, *steps[-2:]]
    assert parse.call_count == 2 + 4
    path.write_bytes(path.read_bytes() + b"spilt\n")
    with pytest.raises(ConfigError, match=r"metrics.jsonl:103: not a record"):
        list(read_records(path, last_steps=0))


def test_a_file_that_was_written_anew_is_read_from_its_last_start(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    starts: list[Any] = [{"kind": "start", "step": 0}, {"kind": "start", "step": 1}]
    step: Any = {"kind": "step", "step": 1}
    after: Any = {"kind": "step", "step": 2}
    append_records(path, [starts[0], step])
    reader = RecordReader(path, from_end=True)
    replace_records(path, [starts[0], step, starts[1]])
    assert reader.new() == ([starts[1]], True)
    append_records(path, [after])
    assert reader.new() == ([after], False)


def test_a_long_run_is_read_in_constant_memory(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = json.dumps({"kind": "step", "step": 1, "loss": 1.5, "seconds": 0.1, "text": "x" * 200}) + "\n"
    path.write_text('{"kind": "start", "step": 0, "num_steps": 9}\n' + line * 20_000)
    tracemalloc.start()
    try:
        assert Training.of_records(read_records(path)) == Training(1, 9, 1.5, 0.8)
        replace_records(path, [], keep=outlives_start(1))
        assert RecordReader(path, from_end=True).new() == ([], False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 4
