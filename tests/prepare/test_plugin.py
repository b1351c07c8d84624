"""Records that another, installed package reads."""

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.files.blocks import Manifest
from clm_dist.files.stores import Stores
from clm_dist.prepare import pipeline
from clm_dist.progress import Silent
from tests.conftest import ROOT, MakeJob, WriteJob
from tests.support.plugins import install_package

Install = Callable[..., None]
PLUGIN = ("data.source=plugin", "data.path=null", "data.plugin=sqlite")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package of one module with entry points; what is imported of it is forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    installed = []

    def install(module: str, code: str, entry: str) -> None:
        install_package(tmp_path / "site", module, code, "clm_dist.sources", sqlite=entry)
        installed.append(module)

    yield install
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def documented() -> str:
    """The module of the worked example."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.S)
    (code,) = (block for block in blocks if "class Table" in block)
    return str(code)


@pytest.fixture
def database(tmp_path: Path, corpus: Path) -> Path:
    records = [json.loads(line) for line in corpus.read_text().splitlines()]
    with sqlite3.connect(tmp_path / "answers.db") as opened:
        opened.execute("create table documents (id text, split text, text text, place integer)")
        rows = [(f"{place:03}", "train", record["text"], place) for place, record in enumerate(records)]
        opened.executemany("insert into documents values (?, ?, ?, ?)", rows)
        opened.executemany(
            "insert into documents values (?, ?, ?, ?)", [(row[0], "other", row[2].upper(), row[3]) for row in rows[:9]]
        )
    return tmp_path / "answers.db"


def test_a_plugin_s_records_give_the_blocks_of_a_file_with_them(
    install: Install, documented: str, database: Path, make_job: MakeJob, prepared: Callable[[JobConfig], Path]
) -> None:
    install("documented_source", documented, "Table")
    options = f"data.options={{file: {database}}}"
    for settings in (
        (),
        ("data.split=train[5:30]",),
        ("data.split=train[20%:80%]",),
        ("data.split=train[:30]", "data.eval_split=train[30:]"),
    ):
        ours, theirs = prepared(make_job(*PLUGIN, options, *settings)), prepared(make_job(*settings))
        assert [path.read_bytes() for path in sorted(ours.glob("*/*.arrow"))] == [
            path.read_bytes() for path in sorted(theirs.glob("*/*.arrow"))
        ]
    assert "data.plugin sqlite" in Manifest.read(ours / "manifest.json").origin
    other = Manifest.read(prepared(make_job(*PLUGIN, options, "data.split=other")) / "manifest.json")
    assert sum(split.num_records for split in other.splits.values()) == 9


def test_a_store_is_of_the_identity_of_the_records(
    install: Install, documented: str, database: Path, make_job: MakeJob, tmp_path: Path
) -> None:
    install("identified_source", documented, "Table")
    job = make_job(*PLUGIN, f"data.options={{file: {database}}}")
    stores = Stores(tmp_path / "stores")
    before = pipeline.resolve(job, stores).store.fingerprint
    assert pipeline.resolve(job, stores).store.fingerprint == before
    with sqlite3.connect(database) as opened:
        opened.execute("insert into documents values ('900', 'train', 'one more text', 900)")
    assert pipeline.resolve(job, stores).store.fingerprint != before


WRONG = """
import pyarrow as pa
class Raises:
    def __init__(self, options, split): raise KeyError("file")
class NoIdentity:
    def __init__(self, options, split): pass
    def tables(self): return []
class Rows:
    identity = "1"
    def __init__(self, options, split): pass
    def tables(self): return [{"text": "a"}]
class Fails:
    identity = "1"
    def __init__(self, options, split): pass
    def tables(self):
        yield pa.table({"text": ["a text that is long enough"]})
        raise OSError("the server is gone")
class NoText:
    identity = "1"
    def __init__(self, options, split): pass
    def tables(self): yield pa.table({"body": ["a"]})
"""


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        ("Raises", DataError, "data.plugin sqlite fails: KeyError: 'file'; see data.options"),
        ("NoIdentity", ConfigError, "returns NoIdentity, which has no text `identity`"),
        ("Rows", DataError, "data.plugin sqlite gives dict, not pyarrow.Table"),
        ("Fails", DataError, "data.plugin sqlite fails: OSError: the server is gone"),
        ("NoText", DataError, "data.text text is not in data.plugin sqlite; its fields are: body"),
        ("Missing", ConfigError, "data.plugin sqlite of wrong_source cannot be loaded (wrong_source:Missing)"),
    ],
)
def test_a_plugin_that_is_wrong_is_named(
    entry: str, error: type[Exception], message: str, install: Install, make_job: MakeJob, tmp_path: Path
) -> None:
    install("wrong_source", WRONG, entry)
    with pytest.raises(error, match=re.escape(message)):
        pipeline.prepare(make_job(*PLUGIN), Stores(tmp_path / "stores"), Silent())


def test_only_what_is_installed_is_found(
    install: Install, documented: str, make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sqlite.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.chdir(tmp_path)
    message = r"data.plugin sqlite is offered by no installed package \(entry points clm_dist.sources: none\)"
    with pytest.raises(ConfigError, match=message) as caught:
        pipeline.resolve(make_job(*PLUGIN), Stores(tmp_path / "stores"))
    assert caught.value.field == "data.plugin"
    install("first_source", documented, "Table")
    install("second_source", documented, "Table")
    with pytest.raises(ConfigError, match=r"offered by first.source and second.source; uninstall one of them"):
        pipeline.resolve(make_job(*PLUGIN), Stores(tmp_path / "stores"))


def test_a_plugin_is_for_its_source(make_job: MakeJob) -> None:
    for settings, message in (
        (("data.source=plugin", "data.path=null"), "data.source is plugin, so data.plugin must name one"),
        (("data.plugin=sqlite",), "data.plugin is for data.source plugin, not files; set it to null"),
        (("data.options={a: 1}",), "data.options is for data.source plugin, not files; set it to null"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make_job(*settings)


MOVING = """
import pyarrow as pa
class Moving:
    opened = 0
    def __init__(self, options, split):
        Moving.opened += 1
        self.identity = str(Moving.opened)
    def tables(self): yield pa.table({"text": ["some text that is long enough for blocks " * 9] * 40})
"""


def test_records_that_change_while_they_are_read_are_not_taken_for_those_before(
    install: Install, make_job: MakeJob, tmp_path: Path
) -> None:
    install("moving_source", MOVING, "Moving")
    with pytest.raises(DataError, match="changed while they were read: its identity is another; run again"):
        pipeline.prepare(make_job(*PLUGIN), Stores(tmp_path / "stores"), Silent())


def test_what_lies_in_the_working_directory_is_not_installed(tmp_path: Path, write_job: WriteJob) -> None:
    install_package(tmp_path, "evil", "raise SystemExit('it was imported')", "clm_dist.sources", sqlite="Evil")
    job = write_job(*PLUGIN)
    # `-m` puts the working directory first.
    said = subprocess.run(
        [sys.executable, "-m", "clm_dist", "prepare", str(job), "--store", str(tmp_path / "stores")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 2, said.stderr
    assert "offered by no installed package (entry points clm_dist.sources: none)" in said.stderr
