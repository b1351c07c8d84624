"""`clm-dist prepare` as a person calls it: what it shows, checks and removes, and what it says when it cannot."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.pretrained.tokenizer import load_tokenizer
from tests.conftest import WriteJob
from tests.support.command import HEAVY, Said, assert_starts_at_once, clm_dist, modules_of

MOST_MODULES_THAT_ENCODE = 2000
"""Of a preparation that reads files and encodes; with torch 2,900, with datasets 300 more."""


class Prepare:
    """Runs the command; `--store` is the test's own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stores: Path) -> None:
        self._capsys, self._monkeypatch, self.stores = capsys, monkeypatch, stores

    def __call__(self, *arguments: object) -> Said:
        return clm_dist(self._capsys, self._monkeypatch, "prepare", *arguments, "--store", self.stores)

    @property
    def store(self) -> Path:
        (manifest,) = self.stores.glob("*/manifest.json")
        return manifest.parent


@pytest.fixture
def prepare(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Prepare:
    return Prepare(capsys, monkeypatch, tmp_path / "stores")


def test_a_log_has_a_line_a_partition_and_standard_output_the_store(prepare: Prepare, write_job: WriteJob) -> None:
    said = prepare(write_job(), "--partition-mib", "0.002", "--tasks", "2")
    assert (said.code, said.out) == (0, f"{prepare.store}\n")
    lines = [line for line in said.err.splitlines() if " partition " in line]
    assert [line.split()[3] for line in lines] == [f"{i}:" for i in range(len(lines))]
    assert len(lines) == 4
    assert "records, 0.00 MB of text, " in lines[0]
    assert "tokens with gigatoken (data.path" not in lines[0]
    assert "tokens with gigatoken (/" in lines[0]


def test_a_second_call_loads_no_tokenizer_and_no_library_of_data_sets(prepare: Prepare, write_job: WriteJob) -> None:
    job = write_job()
    assert prepare(job).code == 0
    out, modules = modules_of("prepare", job, "--store", prepare.stores)
    assert out == f"{prepare.store}\n"
    assert_starts_at_once(modules)


@pytest.mark.parametrize("named", [False, True], ids=["trained", "named"])
def test_a_first_call_loads_nothing_that_its_job_does_not_use(
    prepare: Prepare, write_job: WriteJob, tmp_path: Path, named: bool
) -> None:
    settings: list[str] = []
    if named:
        # One of a type whose class transformers has a module for, beside a model's configuration.
        assert prepare(write_job(name="other.yaml")).code == 0
        tokenizer = shutil.copytree(prepare.store / "tokenizer", tmp_path / "gpt2")
        shutil.rmtree(prepare.store)
        config = json.loads((tokenizer / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(config))
        (tokenizer / "config.json").write_text('{"model_type": "gpt2"}')
        settings = ["tokenizer.train=null", f"tokenizer.path={tokenizer}"]
    out, modules = modules_of("prepare", write_job(*settings), "--store", prepare.stores)
    assert out == f"{prepare.store}\n"
    # pyarrow imports pandas for its first array, to see whether that is one of pandas'.
    assert {name.partition(".")[0] for name in modules} & HEAVY == {"tokenizers", "transformers", "pandas"}
    assert len(modules) < MOST_MODULES_THAT_ENCODE


def test_show_prints_blocks_with_the_borders_of_documents(prepare: Prepare, write_job: WriteJob) -> None:
    said = prepare(write_job(), "--show", "3")
    assert said.code == 0
    blocks = said.out.split("train block ")[1:]
    assert [block.split()[0] for block in blocks] == ["0", "1", "2"]
    # Every document but the last of a block ends before a border.
    assert said.out.count("<|endoftext|> │ ") >= 1
    splits = Manifest.read(prepare.store / "manifest.json").splits
    for figure in (splits["train"].num_tokens, splits["eval"].num_blocks, splits["train"].num_dropped_tokens):
        assert f"{figure:,}" in said.out
    assert "Tokens of a document (train)" in said.out
    for highest, count in splits["train"].document_lengths.items():
        assert any(
            line.split()[0].endswith(highest) and line.split()[-1] == str(count)
            for line in said.out.splitlines()
            if "█" in line
        )
    assert "tokens a word" in said.out
    assert "bytes a token" in said.out
    assert "train block" not in prepare(write_job(), "--show", "0").out


def test_fertility_counts_tokens_of_words(prepare: Prepare, write_job: WriteJob) -> None:
    from clm_dist.prepare.fertility import measure_fertility

    assert prepare(write_job()).code == 0
    tokenizer = load_tokenizer(prepare.store / "tokenizer")
    ids = np.array([tokenizer(" the the zqzqzq")["input_ids"]])
    found = measure_fertility(tokenizer, ids)
    assert found.tokens_per_word == pytest.approx(ids.size / 3)
    assert found.bytes_per_token == pytest.approx(15 / ids.size)
    assert found.costliest[0] == ("zqzqzq", len(tokenizer(" zqzqzq")["input_ids"]), 1)


def test_the_manifest_has_the_fertility_of_the_train_split(prepare: Prepare, write_job: WriteJob) -> None:
    assert prepare(write_job()).code == 0
    fertility = Manifest.read(prepare.store / "manifest.json").tokens_per_word
    assert fertility is not None
    assert f"Fertility: {fertility:.2f} tokens a word" in prepare(write_job(), "--show", "0").out
    # The split is smaller than a sample.
    blocks, tokenizer = Blocks(prepare.store, "train"), load_tokenizer(prepare.store / "tokenizer")
    ids = blocks[np.arange(len(blocks))]
    num_words = sum(len(tokenizer.decode(block, skip_special_tokens=True).split()) for block in ids)
    assert fertility == (ids != tokenizer.eos_token_id).sum() / num_words


def test_verify_names_what_is_damaged_and_prepare_mends_it(prepare: Prepare, write_job: WriteJob) -> None:
    job = write_job()
    prepare(job)
    before = {path: path.read_bytes() for path in prepare.store.rglob("*") if path.is_file()}
    said = clm_dist_verify(prepare)
    assert (said.code, said.err) == (0, "")
    assert "every hash and count is as its manifest says" in said.out
    shard = prepare.store / "train" / "00000.arrow"
    damaged = bytearray(shard.read_bytes())
    damaged[-40] ^= 1
    shard.write_bytes(damaged)
    said = clm_dist_verify(prepare)
    assert said.code == 1
    assert f"{shard} is not as it was written" in said.err
    assert "`clm-dist prepare` with the store's job makes it whole again" in said.err
    said = prepare(job)
    assert f"{shard} is not as its manifest says; preparing it again" in said.err
    assert {path: path.read_bytes() for path in prepare.store.rglob("*") if path.is_file()} == before
    (prepare.store / "eval" / "00000.arrow").unlink()
    assert "00000.arrow is missing" in clm_dist_verify(prepare).err
    assert "eval/00000.arrow is not as its manifest says; preparing it again" in prepare(job).err
    (prepare.store / "eval" / "bytes.npy").unlink()
    (prepare.store / "tokenizer" / "tokenizer.json").write_text("{}")
    said = clm_dist_verify(prepare)
    assert "bytes.npy is missing" in said.err
    assert "tokenizer.json is not as it was written" in said.err
    prepare(job)
    assert {path: path.read_bytes() for path in prepare.store.rglob("*") if path.is_file()} == before
    for field in ("num_blocks", "num_records", "num_document_ends"):
        manifest = json.loads((prepare.store / "manifest.json").read_text())
        manifest["splits"]["train"][field] += 1
        (prepare.store / "manifest.json").write_text(json.dumps(manifest))
        said = clm_dist_verify(prepare)
        assert "manifest.json was changed since it was written" in said.err
    assert "the shards of train have" in said.err
    assert "do not add up to" in said.err


def clm_dist_verify(prepare: Prepare) -> Said:
    return prepare("--verify", prepare.store)


def test_verify_of_what_is_no_store(prepare: Prepare, write_job: WriteJob, tmp_path: Path) -> None:
    said = prepare("--verify", tmp_path)
    assert said.code == 2
    assert "is not a store: it has no manifest.json" in said.err
    prepare(write_job())
    manifest = json.loads((prepare.store / "manifest.json").read_text())
    (prepare.store / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    for said in (prepare("--verify", prepare.store), prepare(write_job())):
        assert said.code == 2
        assert "has format 99 of a newer version of clm-dist, this one reads" in said.err
    # Nothing of it is lost.
    assert (prepare.store / "train" / "00000.arrow").exists()
    del manifest["splits"]["train"]["num_blocks"]
    (prepare.store / "manifest.json").write_text(json.dumps(manifest))
    assert "is no whole manifest" in prepare("--verify", prepare.store).err


def test_prune_lists_and_removes_old_and_large_stores(prepare: Prepare, write_job: WriteJob) -> None:
    assert prepare("--prune").code == 0
    prepare(write_job())
    old = prepare.store
    os.utime(old, (time.time() - 10 * 86400,) * 2)
    prepare(write_job(), "--set", "data.block_size=16")
    unfinished = prepare.stores / "0123456789abcdef" / "work"
    unfinished.mkdir(parents=True)
    (unfinished / "1-000000.part.arrow").write_bytes(b"")
    others = [prepare.stores / "project" / "work" / "thesis.tex", prepare.stores / "extension" / "manifest.json"]
    newer = prepare.stores / "fedcba9876543210" / "manifest.json"
    for other in (*others, newer):
        other.parent.mkdir(parents=True)
        other.write_text('{"format_version": 99}')
    said = prepare("--prune", "--older-than", "5")
    assert "1 of 3 stores" in said.out
    assert said.out.count("keep") == 2
    assert "unfinished" in said.out
    assert old.exists()
    assert "0 of" not in prepare("--prune", "--larger-than", "1000").out
    # A job that asks for a store makes it young.
    prepare(write_job())
    assert "to remove" not in prepare("--prune", "--older-than", "5", "--yes").out
    os.utime(old, (time.time() - 10 * 86400,) * 2)
    said = prepare("--prune", "--older-than", "5", "--yes")
    assert said.out.count("removed") == 1
    assert not old.exists()
    said = prepare("--prune", "--yes")
    assert said.code == 2
    assert "would remove every store; say which, with --older-than or --larger-than" in said.err
    assert prepare("--prune", "--yes", "--larger-than", "0.000001").code == 0
    # What is no store, and what a newer version made, is not ours to remove.
    assert all(other.exists() for other in (*others, newer))
    assert len(list(prepare.stores.glob("*/manifest.json"))) == 2


def test_a_store_that_is_being_prepared_is_not_removed(prepare: Prepare, write_job: WriteJob) -> None:
    from clm_dist.files.stores import Store

    prepare(write_job())
    with Store(prepare.store).lease().hold(timeout_s=0):
        assert "in use" in prepare("--prune", "--yes", "--larger-than", "0.000001").out
    assert prepare.store.exists()


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "give a job file, or --verify STORE, or --prune"),
        (("JOB", "--prune"), "give a job file, or --verify STORE, or --prune"),
        (("JOB", "--older-than", "3"), "--older-than goes with --prune"),
        (("JOB", "--yes"), "--yes goes with --prune"),
        (("--prune", "--show", "3"), "--show goes with a job file"),
        (("--prune", "--tasks", "3"), "--tasks goes with a job file"),
    ],
)
def test_calls_that_make_no_sense(
    prepare: Prepare, write_job: WriteJob, arguments: tuple[str, ...], problem: str
) -> None:
    said = prepare(*(str(write_job()) if argument == "JOB" else argument for argument in arguments))
    assert said.code == 2
    assert problem in said.err


def test_an_interrupt_says_that_the_same_command_goes_on(
    prepare: Prepare, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("clm_dist.prepare.encode.write_encoded", interrupted)
        said = prepare(write_job())
    assert said.code == 130
    assert "interrupted; the same command goes on with the partitions that are left" in said.err
    assert prepare(write_job()).code == 0
