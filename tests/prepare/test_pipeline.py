"""Text to blocks: what the guide gives, what a kill leaves, what too little text says."""

import json
import shutil
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from clm_dist.config.data import DataConfig
from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError, DataError, StorageError
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.shards import token_dtype
from clm_dist.files.stores import Stores
from clm_dist.prepare import data_file, pipeline, splits
from clm_dist.prepare.encode import Effort
from clm_dist.prepare.encoded import Encoded, Recipe, encode_partition, write_encoded
from clm_dist.prepare.encoding import Encoding, completed
from clm_dist.prepare.engines import Gigatoken, Reference
from clm_dist.prepare.partition import Partition
from clm_dist.prepare.partitions import read_partition
from clm_dist.prepare.sources import open_source
from clm_dist.prepare.token_bytes import token_sizes
from clm_dist.pretrained.tokenizer import load_tokenizer, locate_tokenizer
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.support.disks import mounted
from tests.support.reading import EMPTY_FILES
from tests.support.stores import find_store, prepare


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,500 records: several partitions in a split."""
    generator = np.random.default_rng(0)
    words = [f"word{i}" for i in range(50)]
    path = tmp_path_factory.mktemp("data") / "records.jsonl"
    with path.open("w") as file:
        for i in range(2500):
            text = [" ".join(generator.choice(words, size=generator.integers(1, 12))) for _ in range(3)]
            file.write(json.dumps({"id": f"r{i}", "answers": {"text": text if i % 100 else []}}) + "\n")
    return path


@pytest.fixture
def make(make_job: MakeJob, records: Path) -> MakeJob:
    def job(*settings: str) -> JobConfig:
        source = (f"data.path={records}", "data.source=files", "data.text=answers.text", "data.id=id")
        return make_job(*source, "data.split=train", "tokenizer.train.vocab_size=400", *settings)

    return job


def blocks_of(store: Path, split: str) -> Any:
    blocks = Blocks(store, split)
    return blocks[np.arange(len(blocks))]


def test_guide_grouping_gives_the_blocks_of_the_guide(
    make: MakeJob, stores: Path, records: Path, tmp_path: Path
) -> None:
    """The guide's steps with `datasets`, beside ours."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    job = make("data.grouping=guide", "data.append_eos=false", "data.block_size=32")
    store = prepare(job, stores, Silent())
    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
    eli5 = load_dataset("json", data_files=str(records), split="train", cache_dir=str(tmp_path))
    eli5 = eli5.train_test_split(test_size=0.2, seed=42).flatten()
    tokenized = eli5.map(
        lambda examples: tokenizer([" ".join(x) for x in examples["answers.text"]]),
        batched=True,
        remove_columns=eli5["train"].column_names,
    )

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(batch["input_ids"]))
        return {"input_ids": [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]}

    # `datasets.map` hands over 1,000 records at a time, and what is left of each batch is gone.
    theirs = tokenized.map(cut, batched=True, remove_columns=tokenized["train"].column_names)
    assert np.array_equal(blocks_of(store, "train"), np.array(theirs["train"]["input_ids"]))
    assert np.array_equal(blocks_of(store, "eval"), np.array(theirs["test"]["input_ids"]))


def test_carry_loses_one_tail_a_split_and_the_counts_add_up(make: MakeJob, stores: Path) -> None:
    store = prepare(make(), stores, Silent())
    manifest = Manifest.read(store / "manifest.json")
    for name, split in manifest.splits.items():
        assert split.num_tokens == split.num_blocks * 32 + split.num_dropped_tokens
        assert split.num_dropped_tokens < 32
        assert split.num_records == split.num_documents + split.num_skipped["empty"]
        assert sum(shard.num_blocks for shard in split.shards) == split.num_blocks == len(Blocks(store, name))
    assert sum(split.num_records for split in manifest.splits.values()) == 2500
    assert sum(split.num_skipped["empty"] for split in manifest.splits.values()) == 25
    assert (manifest.engine, manifest.dtype, manifest.fingerprint) == ("gigatoken", "uint16", store.name)


def text_bytes_of(store: Path, split: str = "eval") -> tuple[int, int, int]:
    """Bytes that the blocks predict, with and without the document mask, and what they would be token by token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
    predicted, masked = np.load(store / split / "bytes.npy").sum(axis=0)
    ids = blocks_of(store, split)[:, 1:]
    pieces = sum(len(tokenizer.decode([i]).encode()) for i in ids.reshape(-1) if i != tokenizer.eos_token_id)
    return int(predicted), int(masked), pieces


def test_documents_end_with_eos_and_are_counted(make: MakeJob, stores: Path) -> None:
    from transformers import AutoTokenizer

    store = prepare(make("data.split='train[:200]'", "data.block_size=2"), stores, Silent())
    split = Manifest.read(store / "manifest.json").splits["train"]
    ids = blocks_of(store, "train")
    eos = AutoTokenizer.from_pretrained(store / "tokenizer").eos_token_id
    assert abs(int((ids == eos).sum()) - split.num_documents) <= 1
    assert split.num_document_ends == int((ids[:, :-1] == eos).sum())
    assert sum(split.document_lengths.values()) == split.num_documents


def test_the_bytes_of_the_eval_blocks_are_exact(make: MakeJob, stores: Path) -> None:
    store = prepare(make("data.block_size=7"), stores, Silent())
    predicted, masked, pieces = text_bytes_of(store)
    assert predicted == pieces
    ids = blocks_of(store, "eval")
    tokenizer = __import__("transformers").AutoTokenizer.from_pretrained(store / "tokenizer")
    firsts = ids[:, 1:][ids[:, :-1] == tokenizer.eos_token_id]
    assert predicted - masked == sum(len(tokenizer.decode([i]).encode()) for i in firsts if i != tokenizer.eos_token_id)


HARD_TEXTS = [
    "plain",
    "caf\u00e9 \u2014 na\u00efve \U0001f600\U0001f1e9\U0001f1ea",
    "spells <|endoftext|> and </s> out",
    "   spaces  \n\n\t",
    "e\u0301 \ufb01 \u4f60\u597d",
    "</s>",
]


def encoding_of(directory: Path, **settings: Any) -> Encoding:
    data = DataConfig.model_validate({"source": "builtin", "append_eos": False} | settings)
    return Encoding.of_tokenizer(load_tokenizer(directory), data)


def sizes_of(encoding: Encoding, texts: list[str]) -> list[int]:
    """Bytes of text that each text's tokens stand for."""
    array = pa.array(texts, pa.large_string())
    tokens = completed(Reference(encoding.tokenizer_json).encode(array), encoding)
    sizes = token_sizes(tokens, array, encoding)
    if sizes is None:
        sizes = encoding.token_bytes[tokens.ids].astype(np.uint32)
    return [int(sizes[a:b].sum()) for a, b in pairwise(tokens.offsets)]


@pytest.mark.parametrize("name", ["gpt2-tokenizer", "stories260K"])
def test_the_tokens_of_any_text_stand_for_its_bytes(shared: Path, name: str) -> None:
    encoding = encoding_of(shared / "models" / name)
    assert sizes_of(encoding, HARD_TEXTS) == [len(text.encode()) for text in HARD_TEXTS]


def test_the_tokens_of_a_tokenizer_that_changes_the_text_stand_for_its_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "cafe": 1, "the": 2}, unk_token="[UNK]"))
    words.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    texts = ["The caf\u00e9", "  the\n\nthe  ", "unknown w\u00f6rds"]
    assert sizes_of(encoding_of(tmp_path), texts) == [len(text.encode()) for text in texts]
    # What lies between two tokens belongs to the second.
    reference = Reference(encoding_of(tmp_path).tokenizer_json)
    assert reference.spans("  the\n\nthe  ").tolist() == [5, 7]
    assert reference.spans("The caf\u00e9").tolist() == [3, 6]


def test_a_second_call_reads_nothing(make: MakeJob, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make()
    store = prepare(job, stores, Silent())
    monkeypatch.setattr(pipeline, "open_sources", None)
    assert prepare(job, stores, Silent()) == store == find_store(job, stores)


def test_a_file_is_what_it_holds(make_job: MakeJob, tmp_path: Path, corpus: Path) -> None:
    file, copy = tmp_path / "a.jsonl", tmp_path / "deep" / "b.jsonl"
    copy.parent.mkdir()
    for path in (file, copy):
        shutil.copyfile(corpus, path)
    store = prepare(make_job(f"data.path={file}"), tmp_path, Silent())
    file.touch()
    assert find_store(make_job(f"data.path={file}"), tmp_path) == store
    assert find_store(make_job(f"data.path={copy}"), tmp_path) == store
    # One letter of another case, in a file of the same size.
    file.write_text(file.read_text().replace("e", "E", 1))
    assert find_store(make_job(f"data.path={file}"), tmp_path) is None


def test_whatever_changes_the_blocks_changes_the_store(make: MakeJob, tmp_path: Path) -> None:
    changes = (
        "data.split='train[:100]'",
        "data.eval_fraction=0.3",
        "data.split_method=hash",
        "data.seed=1",
        "data.block_size=16",
        "data.grouping=guide",
        "data.append_eos=false",
        "data.join=x",
        "tokenizer.train.vocab_size=300",
    )

    def identity(*settings: str) -> str:
        return json.dumps(pipeline.resolve(make(*settings), Stores(tmp_path)).identity)

    identities = [identity(), *map(identity, changes)]
    assert len(set(identities)) == len(changes) + 1
    assert identity("data.split_method=hash") != identity("data.split_method=hash", "data.id=null")
    # Only the hash split reads the id.
    unrelated = ("data.id=null", "train.learning_rate=1", "batch.global_size=4", "train.max_failures=0", "name=other")
    assert identity(*unrelated) == identities[0]


def test_a_killed_preparation_goes_on_and_gives_the_same_shards(
    make: MakeJob, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make()
    whole = prepare(job, stores, Silent())
    effort = Effort(num_tasks=1, partition_bytes=20_000)
    encoded: list[int] = []
    encode = Gigatoken.encode

    def dies_in_the_ninth_partition(self: Gigatoken, texts: Any, *, parallel: bool = False) -> Any:
        if parallel:  # the probe is not
            encoded.append(len(texts))
            if len(encoded) == 9:
                raise KeyboardInterrupt
        return encode(self, texts, parallel=parallel)

    monkeypatch.setattr(Gigatoken, "encode", dies_in_the_ninth_partition)
    with pytest.raises(KeyboardInterrupt):
        prepare(job, tmp_path, Silent(), effort)
    assert find_store(job, tmp_path) is None
    (store,) = tmp_path.glob("*/work")
    done = sorted(store.glob("*.part.arrow"))
    assert len(done) == 8
    # What the power cut short is made again.
    done[3].write_bytes(done[3].read_bytes()[:1000])
    encoded.clear()
    encoded.extend([0] * 100)
    again = prepare(job, tmp_path, Silent(), effort)
    num_partitions = -(-Path(str(job.data.path)).stat().st_size // 20_000)
    assert len(encoded) - 100 == num_partitions - 7
    manifests = [Manifest.read(store / "manifest.json") for store in (whole, again)]
    assert manifests[0] == manifests[1]
    assert not (again / "work").exists()


@pytest.mark.parametrize(
    "settings", [(), ("data.split_method=hash",), ("data.grouping=guide", "data.append_eos=false")]
)
def test_shards_do_not_depend_on_tasks_partitions_or_engine(
    make: MakeJob, stores: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    expected = Manifest.read(prepare(make(*settings), stores, Silent()) / "manifest.json")
    assert expected.engine == "gigatoken"
    for number, (tasks, size, engine) in enumerate(
        [(1, 5_000, "auto"), (2, 50_000, "gigatoken"), (8, 1_000, "auto"), (8, 30_000, "tokenizers")]
    ):
        job = make(*settings, f"tokenizer.engine={engine}")
        store = prepare(job, tmp_path / str(number), Silent(), Effort(tasks, size))
        found = Manifest.read(store / "manifest.json")
        assert found.engine == ("gigatoken" if engine == "auto" else engine)
        assert replace(found, engine="") == replace(expected, engine="")
        for split in ("train", "eval"):
            assert (store / split / "00000.arrow").read_bytes() == (
                stores / expected.fingerprint / split / "00000.arrow"
            ).read_bytes()


def test_other_ids_of_the_fast_engine_are_never_taken(
    make: MakeJob, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = Manifest.read(prepare(make(), stores, Silent()) / "manifest.json")
    encode = Gigatoken.encode
    calls: list[int] = []

    def goes_wrong(self: Gigatoken, texts: Any, *, parallel: bool = False) -> Any:
        calls.append(len(texts))
        tokens = encode(self, texts, parallel=parallel)
        if len(calls) > wrong_from:
            tokens.ids[-1] += 1
        return tokens

    monkeypatch.setattr(Gigatoken, "encode", goes_wrong)
    # In the probe before the first partition, and in a later partition's own.
    for wrong_from in (0, 9):
        calls.clear()
        job = make(f"name=from{wrong_from}")
        store = prepare(job, tmp_path / str(wrong_from), Silent(), Effort(1, 20_000))
        found = Manifest.read(store / "manifest.json")
        assert found.engine == "tokenizers"
        assert found.splits == expected.splits
    assert "it gives other ids than tokenizers on the data's own text" in caplog.text
    wrong_from = 0
    with pytest.raises(ConfigError, match=r"tokenizer.engine gigatoken cannot be used: it gives other ids") as caught:
        prepare(make("tokenizer.engine=gigatoken"), tmp_path / "insists", Silent())
    assert caught.value.field == "tokenizer.engine"


def error_of(job: JobConfig, stores: Path) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        prepare(job, stores, Silent())
    return caught.value


def test_too_little_text_for_a_block(make: MakeJob, stores: Path) -> None:
    error = error_of(make("data.split='train[1:9]'", "data.block_size=128"), stores)
    assert "split has" in str(error)
    assert "less than one block of 128" in str(error)
    assert error.field == "data.block_size"


def test_texts_that_are_all_empty(make_job: MakeJob, tmp_path: Path, stores: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text('{"text": ""}\n{"text": null}\n{"text": "  "}\n' * 5)
    job = make_job("data.source=files", f"data.path={path}", "data.split=train")
    error = error_of(job, stores)
    assert isinstance(error, DataError)
    assert "data.text text is empty in all 15 records of data.path" in str(error)


def test_append_eos_with_a_tokenizer_that_has_none(make_job: MakeJob, tmp_path: Path, stores: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    error = error_of(make_job("tokenizer.train=null", f"tokenizer.path={tmp_path / 'words'}"), stores)
    assert "data.append_eos is on, but the tokenizer has no end-of-sequence token" in str(error)
    # A tokenizer that gigatoken does not know.
    words_job = ("tokenizer.train=null", f"tokenizer.path={tmp_path / 'words'}", "data.append_eos=false")
    store = prepare(make_job(*words_job), stores, Silent())
    assert Manifest.read(store / "manifest.json").engine == "tokenizers"
    error = error_of(make_job(*words_job, "tokenizer.engine=gigatoken"), tmp_path)
    assert "tokenizer.engine gigatoken cannot be used: Unsupported model type" in str(error)


def test_a_tokenizer_that_is_nowhere(make_job: MakeJob, stores: Path, tmp_path: Path) -> None:
    error = error_of(make_job("tokenizer.train=null", "tokenizer.path=nobody/nothing"), stores)
    assert "tokenizer.path nobody/nothing is neither a directory nor reachable on the Hub" in str(error)
    (tmp_path / "bare").mkdir()
    error = error_of(make_job("tokenizer.train=null", f"tokenizer.path={tmp_path / 'bare'}"), stores)
    assert "holds no tokenizer" in str(error)
    assert error.field == "tokenizer.path"
    with pytest.raises(ConfigError, match="is neither a directory nor reachable on the Hub"):
        locate_tokenizer("a" * 5000, "tokenizer.path")


def test_wrong_input_leaves_nothing_and_trains_no_tokenizer_for_nothing(
    make: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "less than one block" in str(error_of(make("data.block_size=64000"), tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    monkeypatch.setattr("clm_dist.prepare.tokenizer_training.train_tokenizer", None)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"answers": {"text": [" "]}}\n' * 9)
    assert "is empty in all 9 records" in str(error_of(make(f"data.path={empty}"), tmp_path))
    assert "cannot split 1 records" in str(error_of(make("data.split='train[:1]'"), tmp_path))


def test_the_last_note_says_what_is_left_out(make: MakeJob, make_job: MakeJob, stores: Path) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    for job, skipped in ((make(), "25 empty records skipped, "), (make_job(), "")):
        store = prepare(job, stores, Notes())
        splits = Manifest.read(store / "manifest.json").splits
        blocks = f"train {splits['train'].num_blocks:,}, eval {splits['eval'].num_blocks:,}"
        dropped = splits["train"].num_dropped_tokens + splits["eval"].num_dropped_tokens
        assert notes[-1] == f"Blocks of 32: {blocks} ({skipped}{dropped} tokens dropped; {store})"


def test_training_a_tokenizer_twice_gives_the_same(make: MakeJob, stores: Path, tmp_path: Path) -> None:
    stored = prepare(make(), stores, Silent()) / "tokenizer" / "tokenizer.json"
    again = prepare(make(), tmp_path, Silent()) / "tokenizer" / "tokenizer.json"
    assert stored.read_bytes() == again.read_bytes()


def test_eli5_has_the_known_blocks(make_job: MakeJob, shared: Path, stores: Path) -> None:
    job = make_job(
        "data.source=files",
        f"data.path={shared}/data/eli5/eli5_category_test.jsonl.gz",
        "data.split='train[:5000]'",
        "data.text=answers.text",
        "data.id=q_id",
        "data.block_size=128",
        "data.grouping=guide",
        "data.append_eos=false",
        "tokenizer.train=null",
        f"tokenizer.path={shared}/models/gpt2-tokenizer",
    )
    splits = Manifest.read(prepare(job, stores, Silent()) / "manifest.json").splits
    assert (splits["train"].num_blocks, splits["eval"].num_blocks) == (10628, 2398)
    shutil.rmtree(find_store(job, stores) or stores)


def test_files_and_slices_with_no_records(make_job: MakeJob, tmp_path: Path, stores: Path) -> None:
    for name, content in EMPTY_FILES.items():
        (tmp_path / name).write_text(content)
        error = error_of(make_job("data.source=files", f"data.path={tmp_path / name}", "data.id=null"), stores)
        assert f"data.path {tmp_path / name} has no records: its files are empty" in str(error), name
    (tmp_path / "c.txt").write_text("one\ntwo\n")
    for split in ("train[:0]", "train[5:2]", "train[7:]"):
        error = error_of(make_job(f"data.path={tmp_path / 'c.txt'}", "data.id=null", f"data.split='{split}'"), stores)
        assert f"data.split {split} has no records" in str(error)
        assert error.field == "data.split"


def test_a_full_disk_keeps_what_is_done(make: MakeJob, stores: Path, tmp_path: Path) -> None:
    job, effort = make(), Effort(1, 20_000)
    whole = prepare(job, stores, Silent())
    log: list[str] = []

    class Log(Silent):
        def log(self, text: str) -> None:
            log.append(text)

    with mounted(tmp_path / "disk", "size=2m") as disk:
        (disk / "other").write_bytes(b"x" * (2**21 - 300_000))
        with pytest.raises(StorageError, match=r"no space left while writing .* run the same command again"):
            prepare(job, disk, Log(), effort)
        (work,) = disk.glob("*/work")
        done = len(list(work.glob("*.part.arrow")))
        assert 0 < done < 20
        assert not list(disk.rglob(".*.part"))
        (disk / "other").unlink()
        log.clear()
        again = prepare(job, disk, Log(), effort)
        assert next(line.split()[1] for line in log) == f"{done}:"
        assert Manifest.read(again / "manifest.json") == Manifest.read(whole / "manifest.json")
        assert sorted(path.name for path in again.iterdir()) == ["eval", "manifest.json", "tokenizer", "train"]


def test_duplicates_of_eval_documents_are_counted_and_removed_from_train(make_job: MakeJob, tmp_path: Path) -> None:
    texts = [f"text {i} " * 5 for i in range(60)] + ["the same text again and again "] * 40
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = (f"data.path={path}", "data.block_size=2", "tokenizer.train.vocab_size=300")
    kept, removed = (
        prepare(make_job(*settings, f"data.deduplicate={value}"), tmp_path, Silent()) for value in ("false", "true")
    )
    before, after = (Manifest.read(store / "manifest.json").splits for store in (kept, removed))
    num = before["train"].num_duplicates
    assert 20 < num < 40
    assert after["train"].num_duplicates == num
    assert after["train"].num_skipped["duplicate"] == num
    assert before["train"].num_skipped["duplicate"] == before["eval"].num_duplicates == 0
    assert after["train"].num_documents == before["train"].num_documents - num
    # The eval split stays as it was.
    assert after["eval"].num_skipped.pop("repeated") == 0
    assert after["eval"] == before["eval"]
    ids = {name: blocks_of(removed, name).reshape(-1) for name in ("train", "eval")}
    tokenizer = load_tokenizer(removed / "tokenizer")
    assert "the same text again" not in tokenizer.decode(ids["train"])
    assert "the same text again" in tokenizer.decode(ids["eval"])
    for split in [*before.values(), *after.values()]:
        assert split.num_records == split.num_documents + sum(split.num_skipped.values())
        assert split.num_tokens == 2 * split.num_blocks + split.num_dropped_tokens


def test_documents_that_repeat_an_earlier_one_are_removed_from_train(make_job: MakeJob, tmp_path: Path) -> None:
    train, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    texts = [["one", "two"], ["two"], ["e"], ["three", "one", "three"], ["e", "two"], [], ["four"]]
    train.write_text("".join(json.dumps({"text": [f"{word} is a text" for word in each]}) + "\n" for each in texts))
    other.write_text('{"text": "e is a text"}\n{"text": "e is a text"}\n')
    settings = (f"data.path={train}", f"data.eval_path={other}", "data.join=null", "data.block_size=2")
    kept, removed = (
        prepare(make_job(*settings, f"data.deduplicate={value}"), tmp_path, Silent(), Effort(1, size))
        for value, size in (("false", 1 << 20), ("true", 40))
    )
    before, after = (Manifest.read(store / "manifest.json").splits for store in (kept, removed))
    for split in (before["train"], after["train"]):
        assert (split.num_duplicates, split.num_repeated) == (2, 4)
    assert (before["train"].num_documents, after["train"].num_documents) == (10, 4)
    assert before["train"].num_skipped == {"empty": 1, "low_score": 0, "duplicate": 0}
    assert after["train"].num_skipped == {"empty": 1, "low_score": 0, "duplicate": 1, "repeated": 2}
    # The eval split keeps what it repeats.
    assert (after["eval"].num_documents, after["eval"].num_repeated) == (2, 0)
    text = load_tokenizer(removed / "tokenizer").decode(blocks_of(removed, "train").reshape(-1))
    assert text.startswith("one is a text<|endoftext|>two is a text<|endoftext|>three is a text<|endoftext|>four")


def test_the_first_of_repeated_documents_is_that_of_the_split_s_order() -> None:
    hashes = np.array([7, 3, 7, 7, 3, 9], np.uint64)
    assert splits._is_repeated(hashes).tolist() == [False, False, True, True, True, False]
    assert splits._is_repeated(hashes[:0]).tolist() == []


def test_a_slice_reads_only_what_it_needs(make: MakeJob, tmp_path: Path) -> None:
    log: list[str] = []

    class Log(Silent):
        def log(self, text: str) -> None:
            log.append(text)

    effort = Effort(1, 20_000)
    prepare(make(), tmp_path, Log(), effort)
    num_partitions = len(log)
    expected = {"train[:300]": (1, 3), "train[1200:1500]": (2, 4), "train[-100:]": (1, 2)}
    for split, (least, most) in expected.items():
        log.clear()
        store = prepare(make(f"data.split='{split}'"), tmp_path, Log(), effort)
        assert least <= len(log) <= most < num_partitions
        splits = Manifest.read(store / "manifest.json").splits
        whole = prepare(make(f"data.split='{split}'"), tmp_path / "large", Silent())
        assert Manifest.read(whole / "manifest.json").splits == splits
    # No more of a partition is encoded than the slice takes.
    log.clear()
    prepare(make("data.split='train[:20]'", "data.block_size=4"), tmp_path, Log())
    assert log[0].startswith("partition 0: 20 records, ")


def test_a_fault_that_may_pass_keeps_what_is_done(
    make: MakeJob, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, effort = make(), Effort(1, 20_000)
    whole = prepare(job, stores, Silent())
    read = read_partition
    calls: list[int] = []

    def fails_later(partition: Partition, data: DataConfig) -> pa.Table:
        calls.append(1)
        if len(calls) == 6:
            with data_file.reading(data_file.DataFile("records.jsonl", 0)):
                raise OSError(5, "Input/output error")
        return read(partition, data)

    monkeypatch.setattr("clm_dist.prepare.encoded.read_partition", fails_later)
    with pytest.raises(StorageError, match=r"records.jsonl: cannot be read: .* or run the same command again"):
        prepare(job, tmp_path, Silent(), effort)
    assert len(list(tmp_path.glob("*/work/*.part.arrow"))) == 5
    monkeypatch.undo()
    assert Manifest.read(prepare(job, tmp_path, Silent(), effort) / "manifest.json") == Manifest.read(
        whole / "manifest.json"
    )


def test_a_repair_that_fails_keeps_the_store(make: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = prepare(make(), tmp_path, Silent())
    shard = store / "train" / "00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])

    def wrong(*_: Any) -> Any:
        raise DataError("the data is wrong now")

    monkeypatch.setattr(pipeline, "open_sources", wrong)
    with pytest.raises(DataError, match="is wrong now"):
        prepare(make(), tmp_path, Silent())
    assert (store / "eval" / "00000.arrow").exists()
    assert (store / "manifest.json").exists()


def test_what_a_kill_after_the_manifest_leaves_is_removed(make: MakeJob, tmp_path: Path) -> None:
    store = prepare(make(), tmp_path, Silent())
    (store / "work").mkdir()
    assert prepare(make(), tmp_path, Silent()) == store
    assert not (store / "work").exists()


def test_a_part_that_is_not_as_it_was_written_is_made_again(tmp_path: Path, make: MakeJob) -> None:
    job, effort = make(), Effort(1, 20_000)
    store = prepare(job, tmp_path, Silent(), effort)
    before = Manifest.read(store / "manifest.json")
    recipe = Recipe(job.data, encoding_of(store / "tokenizer", append_eos=True), "gigatoken", parallel=False)
    partition = next(open_source(job.data).partitions(20_000))
    path = tmp_path / "x.part.arrow"
    write_encoded(path, encode_partition(partition, recipe, None), np.dtype(np.uint16))
    content = path.read_bytes()
    for place in (100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert Encoded.open(path, np.dtype(np.uint16)) is None
    for length in (0, 5, len(content) // 3, len(content) - 1):
        path.write_bytes(content[:length])
        assert Encoded.open(path, np.dtype(np.uint16)) is None
    assert Manifest.read(store / "manifest.json") == before


@pytest.mark.parametrize("broken", ["single_word", "no pattern", "normalized"])
def test_gigatoken_is_not_taken_for_a_tokenizer_whose_settings_it_does_not_follow(
    make: MakeJob, tmp_path: Path, broken: str
) -> None:
    from tokenizers import AddedToken, normalizers, pre_tokenizers

    store = prepare(make(), tmp_path, Silent())
    tokenizer = load_tokenizer(store / "tokenizer")
    backend = tokenizer.backend_tokenizer
    if broken == "single_word":
        backend.add_tokens([AddedToken("rare", single_word=True)])
    elif broken == "no pattern":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        backend.normalizer = normalizers.NFC()
        backend.add_tokens([AddedToken("e\u0301t\u00e9", normalized=True)])
    tokenizer.save_pretrained(tmp_path / "changed")
    job = make("tokenizer.train=null", f"tokenizer.path={tmp_path / 'changed'}")
    assert Manifest.read(prepare(job, tmp_path, Silent()) / "manifest.json").engine == "tokenizers"
    error = error_of(
        make("tokenizer.train=null", f"tokenizer.path={tmp_path / 'changed'}", "tokenizer.engine=gigatoken"),
        tmp_path / "x",
    )
    assert "tokenizer.engine gigatoken cannot be used: it does not " in str(error)


def test_a_space_that_the_tokenizer_adds_is_no_byte_of_the_text(make: MakeJob, tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = load_tokenizer(prepare(make(), tmp_path, Silent()) / "tokenizer")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save_pretrained(tmp_path / "spaced")
    # A special token that is spelled out has twelve bytes more than the table says: the sums are equal.
    texts = ["hello world"] * 12 + ["<|endoftext|>a"]
    assert sizes_of(encoding_of(tmp_path / "spaced"), texts) == [len(text) for text in texts]


def test_large_vocabularies_take_four_bytes_and_gaps_do_no_harm(make: MakeJob, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[UNK]": 0, "word1": 1, "word2": 70_000}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    job = make("tokenizer.train=null", f"tokenizer.path={tmp_path / 'words'}", "data.append_eos=false")
    store = prepare(job, tmp_path, Silent(), Effort(2, 20_000))
    assert Manifest.read(store / "manifest.json").dtype == "uint32"
    assert set(np.unique(blocks_of(store, "train"))) == {0, 1, 70_000}
    with pytest.raises(DataError, match=r"4,294,967,297 ids, and a store holds ids below 2\^32"):
        token_dtype(2**32 + 1)


def test_deduplication_that_leaves_nothing_says_so(make_job: MakeJob, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "the same"}\n' * 30)
    error = error_of(
        make_job(f"data.path={tmp_path / 'a.jsonl'}", "data.deduplicate=true", "data.block_size=2"), tmp_path
    )
    assert "data.deduplicate leaves nothing of the train split" in str(error)
    assert error.field == "data.deduplicate"
