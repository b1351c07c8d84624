"""Packaged jobs, which a name stands for, and job files that `init` writes."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from clm_dist.config.load import load_job
from clm_dist.config.packaged import JOBS, packaged_jobs
from clm_dist.config.schema import field_names
from clm_dist.config.template import render_job
from clm_dist.errors import ConfigError
from tests.conftest import ROOT
from tests.support.command import clm_dist

TINY = "name: own\ndata: {source: builtin}\ntokenizer: {train: {}}\nmodel: {config: {model_type: gpt2}}\n"


def test_a_name_is_a_packaged_job_where_no_such_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    job = load_job(Path("quickstart"), ["train.seed=7"])
    assert (job.config.name, job.config.train.seed) == ("quickstart", 7)
    assert job.where("data.source") == f"{JOBS / 'quickstart.yaml'}:4"
    assert load_job(Path("eli5-zero3")).config.cluster.strategy == "zero3"  # which extends others
    (tmp_path / "quickstart").mkdir()
    assert load_job(Path("quickstart")).config.name == "quickstart"
    (tmp_path / "eli5-full").write_text(TINY)
    assert load_job(Path("eli5-full")).config.name == "own"


def test_a_job_extends_a_packaged_one_or_the_file_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: quickstart\nname: mine\n")
    job = load_job(path)
    assert (job.config.name, job.config.data.source) == ("mine", "builtin")
    (tmp_path / "quickstart").write_text(TINY + "train: {seed: 9}\n")
    assert load_job(path).config.train.seed == 9


@pytest.mark.parametrize("command", [("run",), ("train",), ("prepare",), ("submit", "slurm"), ("submit", "k8s")])
def test_every_command_that_takes_a_job_names_the_jobs(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = clm_dist(capsys, monkeypatch, *command, "quikstart")
    names = ", ".join(packaged_jobs())
    assert len(packaged_jobs()) >= 5
    assert (said.code, said.err) == (
        2,
        "error: there is no job file quikstart; did you mean quickstart? The packaged jobs are "
        f"{names}; `clm-dist init` writes a job file\n",
    )


def test_a_name_far_from_all_is_not_corrected(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no job file \S*/zzz; The packaged jobs are eli5-full, "):
        load_job(tmp_path / "zzz")


def test_init_writes_a_job_that_runs_as_the_quickstart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    said = clm_dist(capsys, monkeypatch, "init")
    assert (said.code, said.out) == (0, "wrote mine.yaml; edit it, then: clm-dist run mine.yaml\n")
    assert clm_dist(capsys, monkeypatch, "init", "other").code == 0
    for name in ("mine", "other"):
        job = load_job(tmp_path / f"{name}.yaml").config
        assert job == load_job(Path("quickstart"), [f"name={name}"]).config
    before = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "mine.yaml").write_text("# edited\n" + before)
    said = clm_dist(capsys, monkeypatch, "init")
    assert (said.code, "mine.yaml exists and is not overwritten; name another" in said.err) == (2, True)
    assert (tmp_path / "mine.yaml").read_text() == "# edited\n" + before
    for name in ("../mine", "a b", "-", "null"):
        said = clm_dist(capsys, monkeypatch, "init", "--", name)
        assert (said.code, "cannot be the name of a run" in said.err) == (2, True), name
    assert {path.name for path in tmp_path.iterdir()} == {"mine.yaml", "other.yaml"}


def test_the_comments_of_that_job_are_the_defaults_of_all_fields(tmp_path: Path) -> None:
    text = render_job("mine")
    path = tmp_path / "mine.yaml"
    path.write_text(re.sub(r"^( *)#(\w+:)", r"\1\2", text, flags=re.MULTILINE))
    assert path.read_text() != text
    assert load_job(path).config == load_job(Path("quickstart"), ["name=mine"]).config
    fields = {name for name in field_names() if not name.startswith(("cluster.slurm.", "cluster.k8s."))}
    assert fields <= load_job(path).origins.keys()
    assert "  # Tokens in a block.\n  #block_size: 128\n" in text
    assert "  # Passes over the training blocks. The default is 3.\n  epochs: 8\n" in text


def test_a_wheel_has_the_jobs_and_works_without_the_repository(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    empty = tmp_path / "empty"
    empty.mkdir()

    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "clm_dist", *arguments]
        paths = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
        return subprocess.run(command, cwd=empty, env=paths, check=True, capture_output=True, text=True).stdout

    assert "--job-name=quickstart" in said("submit", "slurm", "quickstart", "--dry-run")
    said("init")
    assert "--job-name=mine" in said("submit", "slurm", "mine.yaml", "--dry-run")
