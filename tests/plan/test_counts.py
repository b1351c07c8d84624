"""The number of blocks: known where they are prepared, else estimated with an interval in which they lie."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.ipc
import pyarrow.json
import pyarrow.parquet
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Manifest
from clm_dist.files.stores import Stores
from clm_dist.plan import counts as counting
from clm_dist.plan import sampling
from clm_dist.plan.counts import Counts, count_blocks
from clm_dist.prepare.sources import Source, open_sources
from tests.conftest import MakeJob

Prepared = Callable[[JobConfig], Path]


def _count(job: JobConfig, stores: Path) -> Counts:
    return count_blocks(job, Stores.at(str(stores), str(stores)))


def _blocks(store: Path) -> dict[str, int]:
    splits = Manifest.read(store / "manifest.json").splits
    return {name: split.num_blocks for name, split in splits.items()}


def _assert_holds(counts: Counts, store: Path, within: float = 0.1) -> None:
    known = _blocks(store)
    for name, count in (("train", counts.train), ("eval", counts.eval)):
        assert count.low <= known[name] <= count.high, name
    assert counts.train.blocks == pytest.approx(known["train"], rel=within)


def test_prepared_blocks_are_counted_in_their_store(make_job: MakeJob, prepared: Prepared, stores: Path) -> None:
    job = make_job()
    store = prepared(job)
    counts = _count(job, stores)
    assert counts.is_exact
    assert {"train": counts.train.blocks, "eval": counts.eval.blocks} == _blocks(store)
    assert counts.train.low == counts.train.high
    assert str(store) in counts.how
    assert counts.vocabulary == 300


def test_large_files_are_not_read_to_see_whether_they_are_prepared(
    make_job: MakeJob, prepared: Prepared, stores: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(make_job())
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus.read_bytes())
    job = make_job(f"data.path={copy}")
    monkeypatch.setattr(counting, "_MOST_HASHED", 0)
    assert not _count(job, stores).is_prepared
    monkeypatch.setattr(counting, "_MOST_HASHED", 2**20)
    assert _count(job, stores).is_prepared


def test_nothing_is_written_where_there_is_no_store(make_job: MakeJob, tmp_path: Path) -> None:
    assert _count(make_job(), tmp_path / "none").is_exact
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("settings", [(), ("data.split=train[50%:]", "data.deduplicate=true")], ids=["all", "half"])
def test_of_a_small_source_the_blocks_are_counted(
    make_job: MakeJob, prepared: Prepared, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    job = make_job(*settings)
    counts = _count(job, tmp_path / "none")
    assert {"train": counts.train.blocks, "eval": counts.eval.blocks} == _blocks(prepared(job))
    assert counts.is_exact
    assert "thrown away" in counts.how


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 MB of records whose lengths differ a thousandfold, and grow along the file."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    path = tmp_path_factory.mktemp("large") / "large.jsonl"
    with path.open("w") as file:
        for number in range(3000):
            length = 1 + (number * 7919) % 400 + number // 10
            start = (number * 104729) % (len(words) - 800)
            file.write(json.dumps({"topic": f"t{number}", "text": " ".join(words[start : start + length])}) + "\n")
    return path


@pytest.mark.parametrize(
    "settings", [(), ("data.split=train[1000:2500]",), ("data.split=train[:40%]",)], ids=["all", "rows", "percent"]
)
def test_of_a_large_source_a_sample_is_read(
    make_job: MakeJob,
    prepared: Prepared,
    tmp_path: Path,
    large: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: tuple[str, ...],
) -> None:
    monkeypatch.setattr(counting, "_SMALL_BYTES", 1 << 20)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 14)
    job = make_job(f"data.path={large}", *settings)
    counts = _count(job, tmp_path / "none")
    assert not counts.is_exact
    # Records are longer in the end, which the parts know of.
    _assert_holds(counts, prepared(job), within=0.15)
    assert any("trained on the sample" in note for note in counts.notes)


def test_an_eval_split_of_its_own_is_counted_for_itself(
    make_job: MakeJob, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.jsonl"
    records = ({"topic": f"e{i}", "text": f"Other words, number {i}. " * 8} for i in range(20))
    other.write_text("".join(json.dumps(record) + "\n" for record in records))
    job = make_job(f"data.eval_path={other}")
    monkeypatch.setattr(counting, "_SMALL_BYTES", 0)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 8)
    counts = _count(job, tmp_path / "none")
    assert not counts.is_exact
    _assert_holds(counts, prepared(job))


def test_what_is_compressed_is_read_from_its_beginning(
    make_job: MakeJob, tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "large.jsonl.gz"
    packed.write_bytes(gzip.compress(large.read_bytes()))
    monkeypatch.setattr(counting, "_SMALL_BYTES", 1 << 20)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 12)
    monkeypatch.setattr(sampling, "MOST_READ", 1 << 18)
    counts = _count(make_job(f"data.path={packed}"), tmp_path / "none")
    assert any("is from its beginning" in note for note in counts.notes)


def test_a_stream_without_an_end_needs_a_number_of_rows(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_sizes(data: DataConfig) -> Iterator[Source]:
        return (replace(one, num_bytes=None) for one in open_sources(data))

    monkeypatch.setattr("clm_dist.plan.counts.open_sources", without_sizes)
    with pytest.raises(ConfigError, match="no size that is known before all of it is read; take rows"):
        _count(make_job(), tmp_path / "none")
    monkeypatch.setattr(sampling, "MOST_READ", 1 << 12)
    counts = _count(make_job("data.split=train[:20]"), tmp_path / "none")
    assert 0 < counts.train.low <= counts.train.blocks


@pytest.mark.parametrize("is_small", [True, False])
def test_real_records_are_counted_or_lie_in_the_interval(
    make_job: MakeJob, tmp_path: Path, shared: Path, monkeypatch: pytest.MonkeyPatch, is_small: bool
) -> None:
    """ELI5 with GPT-2's tokenizer, in blocks of 128: 5,000 questions, and all of 5,411."""
    path = tmp_path / "eli5.jsonl"
    path.write_bytes(gzip.decompress((shared / "data/eli5/eli5_category_test.jsonl.gz").read_bytes()))
    if not is_small:
        monkeypatch.setattr(counting, "_SMALL_BYTES", 1 << 20)
    job = make_job(
        f"data.path={path}",
        "data.id=q_id",
        "data.text=answers.text",
        f"data.split=train{'[:5000]' if is_small else ''}",
        "data.eval_fraction=0.2",
        "data.block_size=128",
        "data.grouping=guide",
        "data.append_eos=false",
        "tokenizer.train=null",
        f"tokenizer.path={shared / 'models/gpt2-tokenizer'}",
        "model.config.n_positions=128",
    )
    counts = _count(job, tmp_path / "none")
    if is_small:
        assert (counts.train.blocks, counts.eval.blocks) == (10628, 2398)
    else:
        assert counts.train.low <= 11470 <= counts.train.high
        assert counts.eval.low <= 2746 <= counts.eval.high
        assert counts.train.high < 1.15 * counts.train.low


def _tables(directory: Path, large: Path) -> dict[str, str]:
    """The records of a file in other formats, by the setting that names it."""
    table = pa.json.read_json(large)
    wide = table.append_column("more", pa.array(["not read " * 20] * len(table)))
    pa.parquet.write_table(wide, directory / "one.parquet")
    pa.parquet.write_table(table, directory / "many.parquet", row_group_size=100)
    pa.csv.write_csv(wide, directory / "wide.csv")
    with pa.OSFile(str(directory / "same.arrow"), "wb") as file:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        with pa.ipc.new_file(file, table.schema, options=options) as writer:
            writer.write_table(table, max_chunksize=200)
    (directory / "same.jsonl.gz").write_bytes(gzip.compress(large.read_bytes()))
    return {file.name: f"data.path={file}" for file in directory.iterdir()}


def test_the_format_of_a_source_changes_nothing(
    make_job: MakeJob, prepared: Prepared, tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes of files are not those of what is read of them: compressed, or with columns that no job names."""
    monkeypatch.setattr(counting, "_SMALL_BYTES", 1 << 18)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 14)
    store = prepared(make_job(f"data.path={large}"))
    (tmp_path / "tables").mkdir()
    for name, setting in _tables(tmp_path / "tables", large).items():
        counts = _count(make_job(setting), tmp_path / "none")
        assert not counts.is_exact, name
        _assert_holds(counts, store)


def test_documents_that_are_larger_than_pieces_are_counted(
    make_job: MakeJob, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_SMALL_BYTES", 0)
    monkeypatch.setattr(sampling, "CHUNK_BYTES", 1 << 8)
    from pydoc_data.topics import topics

    books = tmp_path / "books.jsonl"
    texts = [" ".join(" ".join(topics.values()).split())[50_000 * n : 50_000 * (n + 1)] for n in range(8)]
    books.write_text("".join(json.dumps({"topic": f"b{n}", "text": text}) + "\n" for n, text in enumerate(texts)))
    job = make_job(f"data.path={books}", "data.eval_fraction=0.5")
    _assert_holds(_count(job, tmp_path / "none"), prepared(job), within=0.5)
