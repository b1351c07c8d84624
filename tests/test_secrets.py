"""Values of the environment that are secret are in no file and in no line that clm-dist writes."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clm_dist.files.run_dir import RunDir
from tests.conftest import WriteJob
from tests.support.clusters import KubernetesCommands, k8s_commands
from tests.support.command import Said
from tests.support.fakes import Commands, commands, slurm

__all__ = ["commands", "k8s_commands", "slurm"]

SECRETS = {
    name: f"hf_5ecret{number}of{name.title().replace('_', '')}"
    for number, name in enumerate(
        (
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "AWS_ACCESS_KEY_ID",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_SESSION_TOKEN",
            "WANDB_API_KEY",
            "GOOGLE_API_KEY",
            "MY_PASSWORD",
        )
    )
}
REFERENCE = "${oc.env:HF_TOKEN}"
TIMEOUT_S = 300


def assert_told_nowhere(root: Path, *said: str) -> None:
    """Check what was said, and each file below a directory, with its name."""
    files = [path for path in root.rglob("*") if path.is_file()]
    assert files
    for name, value in SECRETS.items():
        assert not any(value in text for text in said), name
        holders = [path for path in files if value in str(path) or value.encode() in path.read_bytes()]
        assert not holders, name


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose name leaves room for the sockets of Ray."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


@pytest.mark.slow
def test_a_run_leaves_no_secret_behind(write_job: WriteJob, tmp_path: Path, short_dir: Path) -> None:
    job = write_job(
        "cluster.workers=2",
        "tracking=[tensorboard]",
        "hub.push=end",
        "hub.repo=alice/tiny",
        f"checkpoint.path={tmp_path}/{REFERENCE}",
    )
    # The push fails, because nobody listens there; what it said is in hub.json.
    hub = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    environment = os.environ | SECRETS | hub | {"RAY_TMPDIR": str(short_dir)}
    options = ["--runs", str(tmp_path / "runs"), "--store", str(tmp_path / "stores")]
    ended = subprocess.run(
        [sys.executable, "-m", "clm_dist", "--verbose", "run", str(job), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr
    run = RunDir(tmp_path / "runs" / "tiny")
    for file in (run.job, run.metrics, run.result, run.report, run.hub, run.final / "README.md"):
        assert file.is_file()
    assert list((tmp_path / REFERENCE / "tiny").glob("*/committed.json"))
    assert REFERENCE in run.job.read_text()
    assert_told_nowhere(tmp_path, ended.stdout, ended.stderr)
    # Of Ray's files nothing is left.
    assert list(short_dir.iterdir()) == []


@pytest.fixture
def in_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def submit(cluster: Commands | KubernetesCommands, *options: str) -> Said:
    cluster.job.write_text(f"{cluster.job.read_text()}checkpoint: {{path: '/shared/{REFERENCE}'}}\n")
    return cluster.submit(*options)


@pytest.mark.usefixtures("in_environment")
def test_a_submission_to_slurm_holds_no_secret(commands: Commands, tmp_path: Path) -> None:
    dry = submit(commands, "--dry-run", "--prepare-first")
    said = commands.submit("--prepare-first")
    assert (dry.code, said.code) == (0, 0)
    assert REFERENCE in (commands.files() / "job.yaml").read_text()
    assert_told_nowhere(commands.runs, dry.out, dry.err, said.out, said.err)


@pytest.mark.usefixtures("in_environment")
@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["RayJob", "Job"])
def test_the_objects_of_kubernetes_hold_no_secret(
    k8s_commands: KubernetesCommands, tmp_path: Path, options: list[str]
) -> None:
    said = submit(k8s_commands, "--dry-run", *options)
    assert said.code == 0
    assert REFERENCE in said.out
    assert_told_nowhere(tmp_path, said.out, said.err)
