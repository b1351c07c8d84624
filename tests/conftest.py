"""Fixtures that the tests share: a tiny job, its store, one Ray for all, and the material beside the repository."""

import os

# Before any library reads them: no test may reach the network, or wait for it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny models: two threads that wait for each other on a busy machine take a hundred times longer than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import shutil
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from clm_dist.config.job import JobConfig
from clm_dist.config.load import job_text, load_job
from clm_dist.files.atomic import write_json
from clm_dist.files.blocks import Manifest
from clm_dist.files.run_dir import RunDir
from clm_dist.progress import Silent
from clm_dist.train.ray.cluster import Cluster, start_ray
from tests.support.fake_hub import FakeHub, serve_hub

ROOT = Path(__file__).resolve().parent.parent
TINY_GPT2 = {
    "model_type": "gpt2",
    "n_layer": 2,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}


def tiny_job(corpus: Path) -> dict[str, Any]:
    """A job that trains in seconds."""
    return {
        "name": "tiny",
        "data": {"source": "files", "path": str(corpus), "id": "topic", "block_size": 32},
        "tokenizer": {"train": {"vocab_size": 300}},
        # A copy, because drills change it.
        "model": {"config": dict(TINY_GPT2)},
        "batch": {"global_size": 8, "micro_size": 4},
        "train": {"max_steps": 6, "learning_rate": 1e-3},
        "checkpoint": {"every": 2},
    }


WriteJob = Callable[..., Path]
MakeJob = Callable[..., JobConfig]


def write_corpus(directory: Path) -> Path:
    """45 records of 100 to 145 characters of Python's language reference: about 100 blocks of 32 tokens."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topics.values()).split())
    path = directory / "corpus.jsonl"
    records = [{"topic": f"t{i}", "text": text[200 * i : 200 * i + 100 + i]} for i in range(45)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def write_job(tmp_path: Path, corpus: Path) -> WriteJob:
    """Writes a job file that trains a tiny model in seconds; takes `section.field=value` and a file name."""

    def write(*settings: str, name: str = "tiny.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(tiny_job(corpus)))
        if settings:
            path.write_text(yaml.safe_dump(load_job(path, settings).config.model_dump(mode="json")))
        return path

    return write


@pytest.fixture
def make_job(write_job: WriteJob) -> MakeJob:
    """The tiny job with `section.field=value` settings."""

    def make(*settings: str) -> JobConfig:
        return load_job(write_job(), settings).config

    return make


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all tests prepare, so that equal jobs are prepared once."""
    return tmp_path_factory.mktemp("stores")


@pytest.fixture
def prepared(stores: Path) -> Callable[[JobConfig], Path]:
    """The store of a job."""
    from tests.support.stores import prepare

    return lambda job: prepare(job, stores, Silent())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """One Ray for all tests; each start costs seconds."""
    from clm_dist.config.job import ClusterConfig

    with start_ray(ClusterConfig()) as started:
        yield started


@pytest.fixture(autouse=True)
def prepare_in_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests prepare in this process, where they can look, unless they ask for Ray; another test's may be there."""
    if "cluster" not in request.fixturenames:
        monkeypatch.setattr("clm_dist.prepare.pools.ray_is_initialised", lambda: False)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and a real model, which lie beside the repository where it is developed."""
    path = ROOT.parent / "shared"
    if not (path / "data" / "eli5").is_dir():
        pytest.skip("../shared (ELI5 records, stories260K) is not here; it is not part of the repository")
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, corpus: Path, stores: Path) -> RunDir:
    """A run that is done: trained in this process, two epochs of the tiny job. Tests copy it before they change it."""
    from clm_dist.files.result import build_result
    from clm_dist.train.accept import accept_export
    from tests.support.stores import prepare
    from tests.support.training import train_one

    directory = tmp_path_factory.mktemp("runs")
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_job(corpus)))
    job = load_job(path, ["train.max_steps=24", "model.config.n_positions=128"]).config
    store = prepare(job, stores, Silent())
    run = RunDir(directory / "tiny")
    assert train_one(job, run, store).status == "done"
    run.job.write_text(job_text(job))
    files = accept_export(job, run)
    manifest = Manifest.read(store / "manifest.json")
    manifest.without_files().write(run.data)
    write_json(run.result, build_result(job, run, manifest, "done", files=files))
    return run


@pytest.fixture
def run(finished_run: RunDir, tmp_path: Path) -> RunDir:
    """A copy of a run that is done."""
    return RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "runs" / "tiny")))


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub; this process talks to it with alice's token."""
    with serve_hub(tmp_path / "hub home") as hub:
        monkeypatch.setenv("HF_TOKEN", "hf_good")
        # The library reads these from the environment when it is imported.
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        files = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", files)
        # transformers keeps a client for the address of its first call.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub cache"))
        # Without Xet the library does not try a failed commit again, so what is tested is ours.
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        yield hub


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An S3 server with the bucket `texts`; what writes into it."""
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    # Its memory is the process's.
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")).close()
    files.mkdir("texts")
    yield files
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()
