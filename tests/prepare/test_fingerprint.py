"""Every field of `data` and `tokenizer` that can change a byte of the store changes its fingerprint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.config.data import DataConfig, TokenizerConfig
from clm_dist.config.job import JobConfig
from clm_dist.config.schema import field_names
from clm_dist.files.stores import Stores
from clm_dist.prepare import pipeline
from tests.conftest import MakeJob
from tests.support.plugins import install_package

HUB = ("data.source=hub", "data.path=null", "data.dataset=alice/texts")
PLUGIN = ("data.source=plugin", "data.path=null", "data.plugin=one")
HASH = ("data.split_method=hash",)
SCORED = ("data.score=answers.score", "data.min_score=1")
CSV, JSON = ("data.path=A.csv",), ("data.path=A.json",)
CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "data.source": ((), "data.source=builtin"),
    "data.dataset": (HUB, "data.dataset=alice/others"),
    "data.config": (HUB, "data.config=en"),
    "data.revision": (HUB, "data.revision=abc"),
    "data.path": ((), "data.path=OTHER_CORPUS"),
    "data.plugin": (PLUGIN, "data.plugin=other"),
    "data.options": (PLUGIN, "data.options={table: b}"),
    "data.records": ((), "data.records=line"),
    "data.delimiter": ((*CSV, "data.delimiter=';'"), "data.delimiter='|'"),
    "data.field": ((*JSON, "data.field=data"), "data.field=rows"),
    "data.encoding": (("data.encoding=latin-1",), "data.encoding=cp1252"),
    "data.split": ((), "data.split='train[:40]'"),
    "data.text": ((), "data.text=topic"),
    "data.join": ((), "data.join=null"),
    "data.score": (SCORED, "data.score=answers.votes"),
    "data.min_score": (SCORED, "data.min_score=2"),
    "data.deduplicate": ((), "data.deduplicate=true"),
    "data.id": (HASH, "data.id=null"),
    "data.eval_path": ((), "data.eval_path=OTHER_CORPUS"),
    "data.eval_split": (("data.eval_path=OTHER_CORPUS",), "data.eval_split='train[:9]'"),
    "data.eval_fraction": ((), "data.eval_fraction=0.3"),
    "data.split_method": ((), "data.split_method=hash"),
    "data.seed": ((), "data.seed=1"),
    "data.block_size": ((), "data.block_size=16"),
    "data.grouping": ((), "data.grouping=guide"),
    "data.append_eos": ((), "data.append_eos=false"),
    "tokenizer.path": (("tokenizer.train=null", "tokenizer.path=TOKENIZER"), "tokenizer.path=OTHER_TOKENIZER"),
    "tokenizer.train.vocab_size": ((), "tokenizer.train.vocab_size=301"),
}
"""Settings of a job by the field that is changed, and the change."""
SAME = {
    # The records are the same, however they arrive.
    "data.streaming": (HUB, "data.streaming=true"),
    # The loss and the attention read the ends of documents; the blocks hold them in any case.
    "data.document_mask": ((), "data.document_mask=true"),
    # An engine is only taken where it gives the ids of the reference tokenizer.
    "tokenizer.engine": ((), "tokenizer.engine=tokenizers"),
}
"""Fields that cannot change a byte."""

Fingerprint = Callable[..., str]


@pytest.fixture
def files(make_job: MakeJob, corpus: Path, prepared: Callable[[JobConfig], Path], tmp_path: Path) -> dict[str, Path]:
    """What the words in capitals stand for."""
    other_corpus = tmp_path / "other.jsonl"
    other_corpus.write_text(corpus.read_text().replace("e", "E", 1))
    tokenizer = prepared(make_job()) / "tokenizer"
    other = Path(shutil.copytree(tokenizer, tmp_path / "tokenizer"))
    values = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps(values | {"add_prefix_space": True}))
    shaped = {f"A.{suffix}": tmp_path / f"A.{suffix}" for suffix in ("csv", "json")}
    for path in shaped.values():
        path.write_text("")
    return shaped | {"OTHER_CORPUS": other_corpus, "OTHER_TOKENIZER": other, "TOKENIZER": tokenizer}


@pytest.fixture
def fingerprint_of(
    make_job: MakeJob, files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Fingerprint:
    """The name of the store of a job with settings."""
    code = "class Records:\n identity = '1'\n def __init__(self, options, split): ...\n def tables(self): return []\n"
    install_package(tmp_path / "site", "two_sources", code, "clm_dist.sources", one="Records", other="Records")
    monkeypatch.syspath_prepend(tmp_path / "site")

    def find(*settings: str) -> str:
        filled = []
        for setting in settings:
            field, _, value = setting.partition("=")
            filled.append(f"{field}={files.get(value, value)}")
        job = make_job(*filled)
        return pipeline.resolve(job, Stores(tmp_path)).store.fingerprint

    return find


def test_every_field_is_in_a_table() -> None:
    fields = {*field_names(DataConfig, "data."), *field_names(TokenizerConfig, "tokenizer.")}
    assert not CHANGES.keys() & SAME.keys()
    assert CHANGES.keys() | SAME.keys() == fields, "a new field needs an entry: can it change a byte of the store?"


@pytest.mark.parametrize("field", CHANGES)
def test_a_field_that_can_change_a_byte_changes_the_fingerprint(field: str, fingerprint_of: Fingerprint) -> None:
    base, change = CHANGES[field]
    assert change.startswith(f"{field}=")
    assert fingerprint_of(*base, change) != fingerprint_of(*base)


def test_a_template_that_is_filled_item_by_item_is_no_longer_what_it_was(make_job: MakeJob, tmp_path: Path) -> None:
    # Before, its stores held the items of one field after those of the other.
    def marked(text: str, join: str = "' '") -> bool:
        job = make_job(f"data.text='{text}'", f"data.join={join}")
        return "items" in pipeline.resolve(job, Stores(tmp_path)).identity["data"]

    assert marked("{messages.role}: {messages.content}")
    assert not marked("{messages.role}: {messages.content}", "null")
    assert not any(map(marked, ("messages.content", "{title}: {answers.text}", "{a}{b}", "{a.b}{a.b}")))


def test_a_split_of_its_own_for_evaluation_leaves_nothing_to_the_fields_that_divide(
    fingerprint_of: Fingerprint,
) -> None:
    own = ("data.split='train[:30]'", "data.eval_split='train[30:]'")
    unused = ("data.eval_fraction=0.5", "data.split_method=hash", "data.seed=1", "data.id=none")
    assert {fingerprint_of(*own, change) for change in unused} == {fingerprint_of(*own)}
    assert fingerprint_of(*own, "data.path=OTHER_CORPUS") != fingerprint_of(*own)


def test_other_names_of_an_encoding_are_the_same(fingerprint_of: Fingerprint) -> None:
    assert fingerprint_of("data.encoding=UTF8") == fingerprint_of()
    assert fingerprint_of("data.encoding=latin-1") == fingerprint_of("data.encoding=ISO-8859-1") != fingerprint_of()


@pytest.mark.parametrize("field", SAME)
def test_a_field_that_cannot_change_a_byte_leaves_the_fingerprint(field: str, fingerprint_of: Fingerprint) -> None:
    base, change = SAME[field]
    assert change.startswith(f"{field}=")
    assert fingerprint_of(*base, change) == fingerprint_of(*base)
