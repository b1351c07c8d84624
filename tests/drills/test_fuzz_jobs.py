"""Thousands of wrong job files: each is a job that is saved as it is, or an error that a person understands."""

import random
import re
import signal
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.load import job_text, load_job, read_saved_job
from clm_dist.config.schema import field_names
from clm_dist.errors import ClmDistError
from tests.conftest import ROOT

GOOD = "name: a\ndata: {source: builtin}\nmodel: {path: gpt2}\n"
SECRET = "open-sesame"
"""In a variable of the environment, and in a file that is none of the job's."""
# fmt: off
AWKWARD = [
    "0", "-1", "1", "-0", "-0.0", "0.5", "1e5", "1e308", "1e309", "-1e309", "5e-324", ".nan", ".inf", "-.inf",
    "NaN", "Infinity", "2147483648", "4294967296", "9" * 19, "9" * 400, "9" * 5000, "0x1F", "0o17", "017", "0b11",
    "1_000", "1:30", "yes", "no", "on", "off", "y", "true", "True", '"true"', "null", "~", "", '""', '" "',
    "2001-01-01", "12:30:45", "[]", "{}", "[1]", "[[]]", "[null]", "[a, b]", "{a: 1}", "{1: 2}", "{null: 1}",
    "{[1]: 2}", "{{a: 1}: 2}", "{a: {a: {}}}", "? a", "- a", "&a 1", "&a [*a]", "*a",
    "!!python/object:os.system ls", "!!python/name:os.system", "!!binary aGk=", "!!binary '*'", "!!set {a, b}",
    "!!omap [a: 1]", "!!pairs [a: 1]", "!!int x", "!!int ''", "!!float x", "!!float ''", "!!bool x", "!!null x",
    "!!timestamp 2001-99-99", "!!timestamp x", "!!str 1", "!!str [1]", "!!map x", "!!seq x", "!local x", "!<x> y",
    "<<", "{<<: 1}", "{<<: {a: 1}}", "{<<: [1]}", "=", "${FUZZ_SECRET}", "${oc.env:FUZZ_SECRET}", "$FUZZ_SECRET",
    "~/x", "~nobody-such/x", "../../etc/passwd", "/dev/zero", "/", ".", "a\\0b", '"a\\0b"', '"\\x1b[31m"',
    '"\\ud800"', '"\\U0010ffff"', '"\\u202e"', '"\\x85"', "é", "日本", '"a\\nb"', "|\n  a\n  b", ">-\n  a", "'", '"',
    "a: b", "#", "@", "`", "%", "x" * 300, "x" * 100_000, "/" + "x" * 300, "s3://", "s3://b/k", "://",
    "http://[::1", "auto", "max", "epoch", "[1, 2]", "[2, 1]", "[0, 0]", "[-1, 5]", "[1, 2, 3]", "[.nan, 1]",
    "[1e400]", "[" * 500 + "]" * 500, "{a: " * 300 + "1" + "}" * 300, "[" * 5000, "{}{}", "--- a", "...", "\t",
    "\x00", "\x07", "\ufeff", "\udc80",
]
# fmt: on


class HangError(Exception):
    """A job file took a minute."""


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., bool]]:
    """Loads a job, and fails where neither a job nor a good error comes; returns whether it is a job."""
    monkeypatch.setenv("FUZZ_SECRET", SECRET)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "foreign").write_text(f"password: {SECRET}\n")
    (tmp_path / "base.yaml").write_text(GOOD)
    path, saved = tmp_path / "job.yaml", tmp_path / "saved.yaml"

    def hangs(*_: Any) -> None:
        raise HangError

    def load(text: str | bytes, *settings: str) -> bool:
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))
        signal.alarm(60)
        case = f"{text[:2000]!r} {[setting[:300] for setting in settings]}"
        try:
            config = load_job(path, settings).config
            saved.write_text(job_text(config), encoding="utf-8")
            assert read_saved_job(saved) == config, case
            assert load_job(saved).config == config, case
        except ClmDistError as error:
            said = str(error)
            assert error.exit_code == 2, case
            for line in said.split("\n"):
                assert re.match(rf"{re.escape(str(path))}|--set |{re.escape(str(tmp_path))}/", line), (case, said)
                assert len(line) < 1500, (case, said)
            assert said.count("\n") < 12, (case, said)
            assert not re.search(
                r"Traceback|object at 0x|<class|<function|pydantic|Undefined|re\.compile|ErrorDetails", said
            ), said
            assert SECRET not in said, case
            assert said.isprintable() or all(c.isprintable() or c == "\n" for c in said), (case, said)
            return False
        except Exception as error:
            pytest.fail(f"{type(error).__name__}: {str(error)[:500]}\n{case}", pytrace=not isinstance(error, HangError))
        finally:
            signal.alarm(0)
        assert SECRET not in saved.read_text(encoding="utf-8"), case
        return True

    before = signal.signal(signal.SIGALRM, hangs)
    yield load
    signal.signal(signal.SIGALRM, before)


def nested(field: str, value: str, *, flow: bool) -> str:
    """A field with a value, as lines of a job file."""
    *sections, name = field.split(".")
    if flow:
        return "".join(f"{section}: {{" for section in sections) + f"{name}: {value}" + "}" * len(sections) + "\n"
    lines = [f"{'  ' * depth}{section}:" for depth, section in enumerate(sections)]
    return "\n".join([*lines, f"{'  ' * len(sections)}{name}: {value}"]) + "\n"


def places() -> list[str]:
    """Every field, and every section."""
    fields = list(field_names())
    sections = {field.rpartition(".")[0] for field in fields} - {""}
    return [*fields, *sorted(sections), "extends"]


NUM_CASES = pytest.mark.parametrize("num_cases", [5, pytest.param(100, marks=pytest.mark.long)])


@NUM_CASES
@pytest.mark.parametrize("how", ["block", "flow", "set"])
def test_awkward_values_of_every_field(check: Callable[..., bool], how: str, num_cases: int) -> None:
    chance, accepted = random.Random(f"{how} {num_cases}"), 0
    for place in places():
        for value in chance.sample(AWKWARD, num_cases):
            if how == "set":
                accepted += check(GOOD, f"{place}={value}")
                continue
            # In place of what the good job has in that section.
            section = place.partition(".")[0]
            others = "".join(line for line in GOOD.splitlines(keepends=True) if not line.startswith(f"{section}:"))
            accepted += check(others + nested(place, value, flow=how == "flow"))
    assert accepted > 20


def mutations(text: str, chance: random.Random) -> Iterator[Callable[[], str | bytes]]:
    """Ways to spoil a job file."""
    lines = text.splitlines(keepends=True)
    number = chance.randrange(len(lines))
    line = lines[number]

    def with_line(new: str) -> str:
        return "".join([*lines[:number], new, *lines[number + 1 :]])

    def flipped() -> bytes:
        data = bytearray(text.encode())
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        return bytes(data)

    key, colon, value = line.partition(":")
    yield lambda: with_line("")
    yield lambda: with_line(line * 2)
    yield lambda: with_line(line[: chance.randrange(len(line))] + "\n")
    yield lambda: with_line(line[: chance.randrange(len(line))])
    yield lambda: with_line(" " * chance.randint(1, 4) + line)
    yield lambda: with_line(line.lstrip())
    yield lambda: with_line(f"{key}: {chance.choice(AWKWARD)}\n")
    yield lambda: with_line(f"{key[:-1]}{chance.choice(string.printable)}{colon}{value}")
    yield lambda: with_line(f"{chance.choice(AWKWARD)}{colon}{value}")
    yield lambda: text[: chance.randrange(len(text))]
    yield lambda: text[chance.randrange(len(text)) :]
    yield flipped
    at = chance.randrange(len(text))
    yield lambda: text[:at] + chance.choice([*"{}[]:,&*!|>'\"%@`#-?\n\t\x00\ufeff", "<<: ", "--- ", "\r"]) + text[at:]
    yield lambda: text[:at] + text[at + chance.randint(1, 20) :]
    yield lambda: f"extends: {chance.choice(['base.yaml', 'foreign', 'job.yaml', '.', '/dev/null', *AWKWARD])}\n{text}"


@NUM_CASES
def test_spoilt_job_files(check: Callable[..., bool], num_cases: int) -> None:
    chance = random.Random(num_cases)
    texts = [path.read_text() for path in sorted((ROOT / "jobs").glob("*.yaml"))]
    full = job_text(load_job(ROOT / "jobs" / "eli5-full.yaml").config)
    accepted, outcomes = 0, 0
    for _ in range(num_cases * 30):
        for text in (*texts, full) if chance.random() < 0.1 else texts:
            make = chance.choice(list(mutations(text, chance)))
            accepted += check(make())
            outcomes += 1
    assert 0 < accepted < outcomes


@NUM_CASES
def test_settings_of_all_kinds(check: Callable[..., bool], num_cases: int) -> None:
    chance = random.Random(num_cases)
    fields: Sequence[str] = places()
    for _ in range(num_cases * 150):
        field = chance.choice(fields)
        spoilt = chance.choice(
            [
                *(field, field[:-1], f"{field}.x", f".{field}", f"{field}.", f"{field}\n", field.upper()),
                *(field.replace(".", ".."), "", "x", "é", "__class__", "model.config.a.b", "data.text.a", "a" * 1000),
            ]
        )
        values = [
            f"{spoilt}={chance.choice(AWKWARD)}",
            spoilt,
            f"{spoilt}={chance.choice(AWKWARD)}={chance.choice(AWKWARD)}",
        ]
        check(GOOD, *chance.sample(values, chance.randint(1, 3)))
