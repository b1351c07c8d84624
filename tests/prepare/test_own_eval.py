"""Records of their own for evaluation: files, a split of a directory or of a data set, or another slice."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.errors import ClmDistError, ConfigError, DataError
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.prepare import pipeline
from clm_dist.prepare.encode import Effort
from clm_dist.prepare.own_eval import eval_data, named_as_eval
from clm_dist.pretrained.tokenizer import load_tokenizer
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.support.stores import find_store, prepare

SMALL = ("data.block_size=4", "data.id=null")


def write(path: Path, numbers: Sequence[int], name: str = "t") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": f"{name} {i} and more."}) + "\n" for i in numbers))
    return path


def texts_of(store: Path, split: str) -> list[str]:
    """The documents in a split's blocks, but for the last, whose tail is dropped."""
    blocks = Blocks(store, split)
    ids = blocks[np.arange(len(blocks))].reshape(-1)
    return str(load_tokenizer(store / "tokenizer").decode(ids)).split("<|endoftext|>")[:-1]


def expected(numbers: Sequence[int], name: str = "t") -> list[str]:
    return [f"{name} {i} and more." for i in numbers]


def assert_splits(store: Path, train: Sequence[str], evaluated: Sequence[str]) -> None:
    """Each split has its records, in their order, up to the tail that no block holds."""
    splits = Manifest.read(store / "manifest.json").splits
    assert (splits["train"].num_records, splits["eval"].num_records) == (len(train), len(evaluated))
    for name, texts in (("train", train), ("eval", evaluated)):
        found = texts_of(store, name)
        assert len(texts) - 2 <= len(found)
        assert found == list(texts[: len(found)])


def error_of(job: JobConfig, stores: Path) -> ClmDistError:
    with pytest.raises(ClmDistError) as caught:
        prepare(job, stores, Silent())
    return caught.value


class Notes(Silent):
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_files_of_their_own_are_the_eval_split(make_job: MakeJob, tmp_path: Path) -> None:
    train, other = write(tmp_path / "a.jsonl", range(30)), write(tmp_path / "b.jsonl", range(10), "e")
    job = make_job(*SMALL, f"data.path={train}", f"data.eval_path={other}")
    store = prepare(job, tmp_path, Silent())
    assert_splits(store, expected(range(30)), expected(range(10), "e"))
    manifest = Manifest.read(store / "manifest.json")
    assert manifest.origin == f"data.path {train} (train); eval: data.eval_path {other} (train)"
    # The tokenizer is trained on the train split alone: no merge is of the eval split's words.
    copy = shutil.copy(train, tmp_path / "copy.jsonl")
    alone = prepare(make_job(*SMALL, f"data.path={train}", f"data.eval_path={copy}"), tmp_path, Silent())
    assert (alone / "tokenizer" / "tokenizer.json").read_bytes() == (store / "tokenizer/tokenizer.json").read_bytes()
    # Other eval records make another store, the same ones elsewhere the same.
    copy = Path(shutil.copyfile(other, tmp_path / "c.jsonl"))
    assert find_store(make_job(*SMALL, f"data.path={train}", f"data.eval_path=[{copy}]"), tmp_path) == store
    write(other, range(11), "e")
    assert find_store(job, tmp_path) is None


@pytest.mark.parametrize(
    ("split", "eval_split", "train", "evaluated"),
    [
        ("train[:30]", "train[30:]", range(30), range(30, 40)),
        ("train[25%:]", "train[:25%]", range(10, 40), range(10)),
        ("train[-30:]", "train[:-30]", range(10, 40), range(10)),
    ],
)
@pytest.mark.parametrize("size", [60, 1 << 20])
def test_slices_of_one_file_are_the_splits(
    make_job: MakeJob, tmp_path: Path, split: str, eval_split: str, train: range, evaluated: range, size: int
) -> None:
    path = write(tmp_path / "a.jsonl", range(40))
    job = make_job(*SMALL, f"data.path={path}", f"data.split='{split}'", f"data.eval_split='{eval_split}'")
    store = prepare(job, tmp_path, Silent(), Effort(2, size))
    assert_splits(store, expected(train), expected(evaluated))
    assert Manifest.read(store / "manifest.json").splits["train"].num_duplicates == 0


def test_what_both_splits_have_is_removed_from_train(make_job: MakeJob, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(40))
    slices = (f"data.path={path}", "data.split='train[:80%]'", "data.eval_split='train[50%:]'")
    store = prepare(make_job(*SMALL, *slices, "data.deduplicate=true"), tmp_path, Silent())
    found = texts_of(store, "train")
    assert found == expected(range(20))[: len(found)]
    train = Manifest.read(store / "manifest.json").splits["train"]
    assert (train.num_records, train.num_documents, train.num_duplicates) == (32, 20, 12)


def write_directory(directory: Path) -> Path:
    write(directory / "train-a.jsonl", range(20))
    write(directory / "train-b.jsonl", range(20, 30))
    write(directory / "validation.jsonl", range(10), "e")
    write(directory / "test.jsonl", range(5), "x")
    (directory / "notes.pdf").write_text("")
    return directory


def test_a_split_of_a_directory_is_the_eval_split(make_job: MakeJob, tmp_path: Path) -> None:
    directory, notes = write_directory(tmp_path / "in"), Notes()
    settings = (*SMALL, f"data.path={directory}")
    store = prepare(make_job(*settings, "data.eval_split=validation"), tmp_path, notes)
    assert_splits(store, expected(range(30)), expected(range(10), "e"))
    left_out = [note for note in notes.notes if note.startswith("Not read")]
    unread = f"Not read, in {directory}: 1 file *.pdf, which is not read, 1 file of the split test"
    assert left_out == [unread]
    sliced = prepare(make_job(*settings, "data.eval_split='validation[5:]'"), tmp_path, Silent())
    assert_splits(sliced, expected(range(30)), expected(range(5, 10), "e"))
    # A directory of its own has splits of its own.
    notes = Notes()
    other = write(tmp_path / "other" / "a.jsonl", range(8), "o").parent
    write(other / "test.jsonl", range(6), "p")
    store = prepare(make_job(*settings, f"data.eval_path={other}"), tmp_path, notes)
    assert_splits(store, expected(range(30)), expected(range(8), "o"))
    assert f"Not read, in {other}: 1 file of the split test" in notes.notes
    picked = prepare(make_job(*settings, f"data.eval_path={other}", "data.eval_split=test"), tmp_path, Silent())
    assert_splits(picked, expected(range(30)), expected(range(6), "p"))


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_a_split_of_a_data_set_is_the_eval_split(
    make_job: MakeJob, tmp_path: Path, streaming: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    directory = tmp_path / "in"
    write(directory / "train.jsonl", range(30))
    write(directory / "validation.jsonl", range(10), "e")
    source = ("data.source=hub", f"data.dataset={directory}", f"data.streaming={streaming}", "data.path=null")

    def job(*settings: str) -> JobConfig:
        return make_job(*SMALL, *source, *settings)

    store = prepare(job("data.eval_split='validation[2:]'", "data.split='train[:20]'"), tmp_path, Silent())
    assert_splits(store, expected(range(20)), expected(range(2, 10), "e"))
    where = f"the data set {directory}"
    origin = f"{where} (train[:20]); eval: {where} (validation[2:])"
    assert Manifest.read(store / "manifest.json").origin == origin
    error = error_of(job("data.eval_split=nothing"), tmp_path)
    assert "check data.config, data.eval_split and the data set's files" in str(error)
    if streaming == "true":
        error = error_of(job("data.eval_split='validation[50%:]'"), tmp_path)
        assert str(error).startswith("data.eval_split validation[50%:] counts from the end or in percent")
        assert error.field == "data.eval_split"
    else:
        prepare(job("data.eval_split='train[-10%:]'", "data.split='train[:90%]'"), tmp_path, Silent())


def test_the_built_in_corpus_can_be_sliced(make_job: MakeJob, tmp_path: Path) -> None:
    settings = ("data.source=builtin", "data.path=null", "data.split='train[:8]'", "data.eval_split='train[8:12]'")
    splits = Manifest.read(prepare(make_job(*settings), tmp_path, Silent()) / "manifest.json").splits
    assert (splits["train"].num_records, splits["eval"].num_records) == (8, 4)
    error = error_of(make_job(*settings, "data.eval_split=test"), tmp_path)
    assert str(error) == "data.eval_split test: the built-in corpus has one split, train"


def test_the_shards_do_not_depend_on_tasks_partitions_or_kills(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, other = write(tmp_path / "a.jsonl", range(300)), write(tmp_path / "b.jsonl", range(200), "e")
    settings = (*SMALL, f"data.path={train}", f"data.eval_path={other}", "data.split='train[10%:]'")
    job = make_job(*settings, "data.eval_split='train[-150:]'")
    whole = Manifest.read(prepare(job, tmp_path / "0", Silent()) / "manifest.json")
    for number, (tasks, size, engine) in enumerate([(1, 500, "gigatoken"), (64, 900, "tokenizers")], 1):
        job_of_engine = make_job(*settings, "data.eval_split='train[-150:]'", f"tokenizer.engine={engine}")
        store = prepare(job_of_engine, tmp_path / str(number), Silent(), Effort(tasks, size))
        assert Manifest.read(store / "manifest.json").splits == whole.splits
    made: list[str] = []

    class Killed(Silent):
        def log(self, text: str) -> None:
            made.append(text)
            if text.startswith("eval partition 3"):
                raise KeyboardInterrupt

    class Log(Silent):
        def log(self, text: str) -> None:
            made.append(text)

    with pytest.raises(KeyboardInterrupt):
        prepare(job, tmp_path / "3", Killed(), Effort(1, 500))
    before = len(made)
    made.clear()
    store = prepare(job, tmp_path / "3", Log(), Effort(1, 500))
    assert Manifest.read(store / "manifest.json").splits == whole.splits
    assert before > 15
    assert all(line.startswith("eval partition") for line in made)


def test_other_ids_of_the_fast_engine_in_the_eval_split_are_never_taken(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clm_dist.prepare.engines import EngineError

    train, other = write(tmp_path / "a.jsonl", range(30)), write(tmp_path / "b.jsonl", range(20), "e")
    job = make_job(*SMALL, f"data.path={train}", f"data.eval_path={other}")
    check = "clm_dist.prepare.encoded.check_engine"

    def differs(engine: Any, encoding: Any, sample: Any) -> None:
        if sample[0].as_py().startswith("e"):
            raise EngineError("it does not give the ids")

    monkeypatch.setattr(check, differs)
    store = prepare(job, tmp_path, Silent())
    assert Manifest.read(store / "manifest.json").engine == "tokenizers"
    assert_splits(store, expected(range(30)), expected(range(20), "e"))


def test_errors_name_the_fields_of_the_eval_split(make_job: MakeJob, tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", range(30))
    broken, empty = tmp_path / "broken.jsonl", tmp_path / "empty.jsonl"
    broken.write_text('{"text": "one"}\n{"text": \n')
    empty.write_text("")
    (tmp_path / "bodies.jsonl").write_text('{"body": "one"}\n')
    write(tmp_path / "tests" / "test.jsonl", range(9))

    def error(*settings: str) -> ClmDistError:
        return error_of(make_job(*SMALL, f"data.path={train}", *settings), tmp_path)

    for settings, field, problem in (
        ((f"data.eval_path={tmp_path}/none",), "data.eval_path", f"data.eval_path {tmp_path}/none matches no file"),
        ((f"data.eval_path={broken}",), "data.eval_path", f"{broken}:2: not a JSON record"),
        ((f"data.eval_path={empty}",), "data.eval_path", f"data.eval_path {empty} (train) has no records"),
        ((f"data.eval_path={tmp_path}/bodies.jsonl",), "data.text", "data.text text is not in "),
        (
            (f"data.eval_path={tmp_path}/tests",),
            "data.eval_split",
            "data.eval_split train: the files have the splits test",
        ),
        (("data.eval_split=validation",), "data.eval_split", "data.eval_split validation: the files have one split"),
        (
            ("data.split='train[:9]'", "data.eval_split='train[50:]'"),
            "data.eval_split",
            "data.eval_split train[50:] has no records",
        ),
        (
            ("data.split='train[9:]'", "data.eval_split='train[:2]+train[4:]'"),
            "data.eval_split",
            "eval_split train[:2]+train[4:]: parts",
        ),
        (("data.eval_split='train[5:]'", "data.split='train[:1:]'"), "data.split", "data.split train[:1:]: "),
        (
            ("data.split='train[1:]'", "data.eval_split='train[:1]'", "data.block_size=32"),
            "data.block_size",
            "the eval split has ",
        ),
    ):
        found = error(*settings)
        assert problem in str(found), settings
        assert found.field == field, settings
        assert "eval_fraction" not in str(found)


def test_names_inside_of_files_names_stay() -> None:
    data = DataConfig(source="files", path="a", eval_path="b", eval_split="c")
    text = "data.path x: /d/data.path/data.split.txt, take it out of data.path; data.split."
    assert named_as_eval(text, data) == (
        "data.eval_path x: /d/data.path/data.split.txt, take it out of data.eval_path; data.eval_split."
    )
    only_split = DataConfig(source="files", path="a", eval_split="c")
    assert named_as_eval("data.path, data.split", only_split) == "data.path, data.eval_split"


def test_a_share_of_the_records_has_no_data_of_its_own() -> None:
    assert eval_data(DataConfig(source="files", path="a")) is None


def test_the_id_is_not_read(make_job: MakeJob, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(40))
    settings = (f"data.path={path}", "data.split='train[:30]'", "data.split_method=hash", "data.id=nowhere")
    assert prepare(make_job(*settings, "data.eval_split='train[30:]'", "data.block_size=4"), tmp_path, Silent())
    assert isinstance(error_of(make_job(*settings), tmp_path), DataError)


def test_what_changes_in_the_eval_files_changes_the_data_of_a_run(make_job: MakeJob, tmp_path: Path) -> None:
    from clm_dist.files.stores import Stores

    train, other = write(tmp_path / "a.jsonl", range(30)), write(tmp_path / "b.jsonl", range(10))
    job = make_job(*SMALL, f"data.path={train}", f"data.eval_path={other}")
    first = pipeline.resolve(job, Stores(tmp_path)).store.fingerprint
    write(other, range(12))
    assert pipeline.resolve(job, Stores(tmp_path)).store.fingerprint != first
    other.unlink()
    with pytest.raises(ConfigError, match=r"data.eval_path .* matches no file"):
        pipeline.resolve(job, Stores(tmp_path))
