"""The code of a working tree, packed for pods."""

import base64
import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from clm_dist.errors import ConfigError
from clm_dist.submit.k8s import sync
from tests.conftest import ROOT


def git(directory: Path, *arguments: str) -> None:
    user = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *user, *arguments], cwd=directory, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "clm_dist").mkdir()
    (tmp_path / "clm_dist" / "__init__.py").write_text("where = __file__\n")
    (tmp_path / "secret.txt").write_text("not tracked")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "clm_dist")
    git(tmp_path, "commit", "-qm", "one")
    return tmp_path


def test_the_tracked_files_go_before_what_is_installed(repository: Path) -> None:
    code = sync.pack(repository / "clm_dist")
    archive = repository / "code.zip"
    archive.write_bytes(base64.b64decode(code.archive))
    command = [sys.executable, "-c", "import clm_dist; print(clm_dist.where)"]
    environment = {**os.environ, "PYTHONPATH": f"{archive}:{ROOT}"}
    said = subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True, check=True).stdout
    assert said.strip() == str(archive / "clm_dist" / "__init__.py")
    assert b"secret" not in archive.read_bytes()
    assert sync.pack(repository) == code


def test_the_commit_says_whether_the_tree_differs(repository: Path) -> None:
    before = sync.pack(repository)
    assert len(before.commit) == 12
    (repository / "clm_dist" / "__init__.py").write_text("changed = True\n")
    after = sync.pack(repository)
    assert after.commit == f"{before.commit}-changed"
    assert after.archive != before.archive
    # A link may lead out of the repository.
    (repository / "clm_dist" / "link.py").symlink_to("/etc/hostname")
    git(repository, "add", "clm_dist")
    with pytest.raises(ConfigError, match=r"follows no links, and clm_dist/link.py is one"):
        sync.pack(repository)
    git(repository, "rm", "-qf", "clm_dist/link.py")
    (repository / "link").symlink_to("/etc/hostname")
    git(repository, "add", "link")
    with zipfile.ZipFile(io.BytesIO(base64.b64decode(sync.pack(repository).archive))) as archive:
        assert archive.namelist() == ["clm_dist/__init__.py"]
    # A file that is removed and not yet committed is left out.
    (repository / "clm_dist" / "other.py").touch()
    git(repository, "add", "clm_dist")
    (repository / "clm_dist" / "other.py").unlink()
    sync.pack(repository)


def test_what_cannot_be_packed_is_refused(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ConfigError, match=r"git finds none: .*not a git repository"):
        sync.pack(tmp_path_factory.mktemp("nothing"))
    (repository / "clm_dist" / "new.py").touch()
    with pytest.raises(ConfigError, match=r"clm_dist/new.py is new; run `git add`, or remove it"):
        sync.pack(repository)
    (repository / "clm_dist" / "new.py").unlink()
    (repository / "large.bin").write_bytes(os.urandom(1_000_000))
    git(repository, "add", "large.bin")
    sync.pack(repository)
    (repository / "large.bin").rename(repository / "clm_dist" / "large.bin")
    git(repository, "add", "clm_dist")
    with pytest.raises(ConfigError, match=r"1,000,\d+ bytes when packed, and 900,000 at most"):
        sync.pack(repository)
    git(repository, "rm", "-qrf", "--cached", "clm_dist")
    with pytest.raises(ConfigError, match="not one of clm_dist"):
        sync.pack(repository)


def test_this_repository_fits_and_the_command_packs_it() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone")
    commit = sync.pack(ROOT).commit
    command = [sys.executable, "-m", "clm_dist", "submit", "k8s", "jobs/quickstart.yaml", "--image=i", "--sync"]
    said = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (config,) = (one for one in yaml.safe_load_all(said) if one["kind"] == "ConfigMap")
    assert base64.b64decode(config["binaryData"]["code.zip"]).startswith(b"PK")
    assert commit in said
