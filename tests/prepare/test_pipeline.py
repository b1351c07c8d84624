"""Text to blocks: what the guide gives, what a kill leaves, what too little text says."""

import json
import shutil
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clm_dist.config import DataConfig, JobConfig
from clm_dist.errors import ConfigError, DataError
from clm_dist.prepare import pipeline
from clm_dist.prepare.pipeline import find_store, prepare
from clm_dist.prepare.tokens import Encoder, locate_tokenizer
from clm_dist.progress import Silent
from clm_dist.shards import Blocks, Manifest
from tests.conftest import MakeJob


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
    assert (manifest.engine, manifest.dtype, manifest.fingerprint) == ("tokenizers", "uint16", store.name)


def test_documents_end_with_eos_and_bytes_are_those_of_the_predicted_tokens(make: MakeJob, stores: Path) -> None:
    from transformers import AutoTokenizer

    store = prepare(make("data.split='train[:200]'", "data.block_size=2"), stores, Silent())
    splits = Manifest.read(store / "manifest.json").splits
    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
    eos = tokenizer.eos_token_id
    ids = blocks_of(store, "train").reshape(-1)
    assert abs(int((ids == eos).sum()) - splits["train"].num_documents) <= 1
    for name, split in splits.items():
        blocks = blocks_of(store, name)
        assert split.num_document_ends == (blocks[:, 0] == eos).sum() > 0
        assert split.num_predicted(2, document_mask=False) == len(blocks)
        assert split.num_predicted(2, document_mask=True) == (blocks[:, 0] != eos).sum()
    num_bytes = np.load(store / "eval" / "bytes.npy")
    blocks = blocks_of(store, "eval")
    pieces = tokenizer.convert_ids_to_tokens(blocks[:, 1].tolist())
    sizes = np.array([0 if piece == tokenizer.eos_token else len(piece) for piece in pieces])
    assert np.array_equal(num_bytes, np.stack([sizes, np.where(blocks[:, 0] == eos, 0, sizes)], axis=1))


def test_bytes_of_tokens_of_a_sentencepiece_tokenizer(shared: Path) -> None:
    encoder = Encoder(shared / "models" / "stories260K", DataConfig(source="builtin", append_eos=False))
    text = "Lily and Tom saw a café — and said “hi”.\n\U0001f600"
    sizes = encoder.token_bytes()
    # One byte more: the tokenizer puts a space before the text.
    assert sizes[encoder.encode([text])[0]].sum() == len(text.encode()) + 1


def test_a_second_call_reads_nothing(make: MakeJob, stores: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = make()
    store = prepare(job, stores, Silent())
    monkeypatch.setattr(pipeline, "load_records", None)
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
        return json.dumps(pipeline._identity(make(*settings), None, tmp_path))

    identities = [identity(), *map(identity, changes)]
    assert len(set(identities)) == len(changes) + 1
    assert identity("data.split_method=hash") != identity("data.split_method=hash", "data.id=null")
    # Only the hash split reads the id.
    unrelated = ("data.id=null", "train.learning_rate=1", "batch.global_size=4", "cluster.max_restarts=0", "name=other")
    assert identity(*unrelated) == identities[0]


def test_a_killed_preparation_goes_on_and_gives_the_same_shards(
    make: MakeJob, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make()
    whole = prepare(job, stores, Silent())
    encoded: list[int] = []
    encode = Encoder.encode

    def dies_in_the_second_partition(self: Encoder, documents: list[str]) -> Any:
        encoded.append(len(documents))
        if len(encoded) == 2:
            raise KeyboardInterrupt
        return encode(self, documents)

    monkeypatch.setattr(Encoder, "encode", dies_in_the_second_partition)
    with pytest.raises(KeyboardInterrupt):
        prepare(job, tmp_path, Silent())
    assert find_store(job, tmp_path) is None
    again = prepare(job, tmp_path, Silent())
    # Three partitions: the first was done, the second was in flight.
    assert len(encoded) == 2 + 2
    manifests = [Manifest.read(store / "manifest.json") for store in (whole, again)]
    assert manifests[0] == manifests[1]
    assert not (again / "work").exists()


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
    assert "data.text text is empty in all 12 records of the train split" in str(error)


def test_append_eos_with_a_tokenizer_that_has_none(make_job: MakeJob, tmp_path: Path, stores: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "words")
    error = error_of(make_job("tokenizer.train=null", f"tokenizer.path={tmp_path / 'words'}"), stores)
    assert "data.append_eos is on, but the tokenizer has no end-of-sequence token" in str(error)
    job = make_job("tokenizer.train=null", f"tokenizer.path={tmp_path / 'words'}", "data.append_eos=false")
    # A tokenizer that loses text: bytes of its tokens are not bytes of the text, so there are none.
    assert np.load(prepare(job, stores, Silent()) / "eval" / "bytes.npy").sum() == 0


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
    monkeypatch.setattr(pipeline, "train_tokenizer", None)
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"answers": {"text": [" "]}}\n' * 9)
    assert "is empty in all 7 records" in str(error_of(make(f"data.path={empty}"), tmp_path))
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
