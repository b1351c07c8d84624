"""The tokenizer's files: all that its loader reads is fetched, fingerprinted and handed on, and nothing else is."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import BertTokenizer

from clm_dist.errors import ConfigError, StorageError
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Stores
from clm_dist.prepare import pipeline
from clm_dist.pretrained.tokenizer import load_tokenizer, locate_tokenizer, num_ids, tokenizer_fingerprint
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.support.fake_hub import FakeHub, Repo, StoredFile

LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *".,;:'()`", *(f"##{letter}" for letter in LETTERS)]


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """BERT's kind of tokenizer, whose vocabulary is in vocab.txt."""
    directory = tmp_path / "words"
    directory.mkdir()
    (directory / "vocab.txt").write_text("\n".join(WORDS))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    return directory


@pytest.fixture
def own(finished_run: RunDir, tmp_path: Path) -> Path:
    """A copy of a model and its tokenizer."""
    return Path(shutil.copytree(finished_run.final, tmp_path / "own"))


Push = Callable[[Path], str]


@pytest.fixture
def push(fake_hub: FakeHub) -> Push:
    """Puts a directory on the Hub as alice/model. Returns the commit."""

    def pushed(directory: Path) -> str:
        repo = fake_hub.repos.setdefault(("models", "alice/model"), Repo(private=False))
        files = {file.name: StoredFile(file.read_bytes(), is_lfs=False) for file in directory.iterdir()}
        return repo.add("push", files).oid

    return pushed


def test_a_vocabulary_in_a_file_of_its_own_gives_the_same_ids_from_the_hub(words: Path, push: Push) -> None:
    push(words)
    text = "The hat, that sits"
    found = locate_tokenizer("alice/model", "model.path")
    ids = BertTokenizer.from_pretrained(words)(text)["input_ids"]
    assert load_tokenizer(words)(text)["input_ids"] == load_tokenizer(found)(text)["input_ids"] == ids
    assert len(set(ids)) > 8
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(words)


def test_whatever_the_loader_reads_changes_the_fingerprint(words: Path) -> None:
    before = tokenizer_fingerprint(words)
    (words / "vocab.txt").write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]))
    assert tokenizer_fingerprint(words) != before


@pytest.mark.parametrize("name", ["notes.txt", "README.md", "trainer_state.json", "model.safetensors", "run.py"])
def test_what_the_loader_does_not_read_does_not_change_it(words: Path, name: str) -> None:
    before = tokenizer_fingerprint(words)
    (words / name).write_text("x")
    assert tokenizer_fingerprint(words) == before


def test_the_type_of_the_model_counts_where_it_decides_the_class(words: Path) -> None:
    (words / "tokenizer_config.json").write_text("{}")
    found = set()
    for kind in ("bert", "electra"):
        (words / "config.json").write_text(json.dumps({"model_type": kind}))
        found.add(tokenizer_fingerprint(words))
    assert len(found) == 2
    (words / "config.json").write_text(json.dumps({"model_type": "electra", "hidden_size": 8}))
    assert tokenizer_fingerprint(words) in found


def test_a_chat_template_makes_another_store_and_arrives_in_it(own: Path, make_job: MakeJob, tmp_path: Path) -> None:
    stores = Stores(tmp_path / "stores")

    def store() -> Path:
        job = make_job("model.config=null", f"model.path={own}", "tokenizer.train=null")
        return pipeline.prepare(job, stores, Silent()).local

    plain = store()
    (own / "chat_template.jinja").write_text("{{ messages[0].content }}")
    templated = store()
    assert templated != plain
    assert load_tokenizer(templated / "tokenizer").chat_template == "{{ messages[0].content }}"
    assert [shard.sha256 for shard in Manifest.read(templated / "manifest.json").splits["train"].shards] == [
        shard.sha256 for shard in Manifest.read(plain / "manifest.json").splits["train"].shards
    ]


def test_a_chat_template_comes_from_the_hub(own: Path, push: Push) -> None:
    (own / "chat_template.jinja").write_text("{{ messages[0].content }}")
    push(own)
    found = locate_tokenizer("alice/model", "model.path")
    assert load_tokenizer(found).chat_template == "{{ messages[0].content }}"
    # Its weights are no part of a tokenizer.
    assert not list(found.glob("*.safetensors"))


def test_the_tokenizer_is_that_of_the_models_revision(
    words: Path, push: Push, make_job: MakeJob, tmp_path: Path
) -> None:
    first, before = push(words), tokenizer_fingerprint(words)
    (words / "vocab.txt").write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]))
    second = push(words)

    def fingerprint(*settings: str) -> str:
        job = make_job("model.config=null", "model.path=alice/model", "tokenizer.train=null", *settings)
        return str(pipeline.resolve(job, Stores(tmp_path)).identity["tokenizer"])

    assert fingerprint() == fingerprint(f"model.revision={second}") == tokenizer_fingerprint(words)
    assert fingerprint(f"model.revision={first}") == before != fingerprint()


def test_a_sentencepiece_model_names_the_package_that_reads_it(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    with pytest.raises(ConfigError, match="is a SentencePiece model; pip install sentencepiece protobuf to read it"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "llama"])
def test_a_directory_without_a_vocabulary_is_no_tokenizer(tmp_path: Path, model_type: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds no tokenizer(: it has no vocabulary; set tokenizer| that loads: )"):
        load_tokenizer(tmp_path)


def test_the_current_directory_is_a_directory_like_others(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(words)
    assert tokenizer_fingerprint(Path()) == tokenizer_fingerprint(words)
    (words / "vocab.txt").write_text("\n".join([*WORDS[:5], *reversed(WORDS[5:])]))
    assert tokenizer_fingerprint(Path()) == tokenizer_fingerprint(words)


def test_a_class_that_is_not_that_of_the_models_type_is_told_apart(own: Path) -> None:
    (own / "config.json").unlink()
    (own / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizerFast"}')
    plain, found = tokenizer_fingerprint(own), []
    for model_type in ("llama", "qwen2", "mamba"):
        (own / "config.json").write_text(json.dumps({"model_type": model_type}))
        found.append(tokenizer_fingerprint(own))
    assert len(set(found)) == 3
    assert found[0] == plain


def test_a_disk_that_does_not_answer_is_no_fault_of_the_tokenizer(words: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(StorageError, match=r"words cannot be read: .*; run the same command again"):
        load_tokenizer(words)


def test_code_of_a_tokenizer_is_never_run(words: Path) -> None:
    described = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (words / "tokenizer_config.json").write_text(json.dumps(described))
    (words / "own.py").write_text(f"open({str(words / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="holds no tokenizer that loads"):
        load_tokenizer(words)
    assert not (words / "ran").exists()


def test_the_ids_of_blocks_are_below_the_highest(own: Path, make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job("model.config=null", f"model.path={own}", "tokenizer.train=null")
    store = pipeline.prepare(job, Stores(tmp_path / "stores"), Silent()).local
    highest = Blocks(store, "train").highest_id()
    assert 0 < highest < num_ids(load_tokenizer(own)) == 300
