"""Pushes against a Hub in this process, which holds bytes and fails on demand."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clm_dist import hub
from clm_dist.errors import ConfigError, HubError
from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from tests.conftest import MakeJob

LFS_SUFFIX = ".safetensors"
FILES = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"weights", "nested/card.md": b"# A model"}


class AnswerError(Exception):
    """What the Hub's client raises for an answer with this status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} Server Error")
        self.response = SimpleNamespace(status_code=status)


@dataclass
class FakeHub:
    """Stands for `huggingface_hub.HfApi`."""

    statuses: list[int] = field(default_factory=list)
    """Of the next uploads, which fail."""
    changed: dict[str, bytes | None] = field(default_factory=dict)
    """What the Hub holds in the place of what was uploaded; None where it holds nothing."""
    num_uploads: int = 0
    repos: dict[str, bool] = field(default_factory=dict)
    """Whether each repository was made private."""
    files: dict[str, bytes] = field(default_factory=dict)

    def __call__(self) -> "FakeHub":
        return self

    def whoami(self) -> dict[str, str]:
        return {"name": "alice"}

    def create_repo(self, repo: str, *, private: bool, exist_ok: bool) -> str:
        self.repos[repo] = private
        return f"https://hub.example/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        self.num_uploads += 1
        if self.statuses:
            raise AnswerError(self.statuses.pop(0))
        found = (path for path in folder_path.rglob("*") if path.is_file())
        held = {str(path.relative_to(folder_path)): path.read_bytes() for path in found} | self.changed
        self.files = {name: data for name, data in held.items() if data is not None}
        return SimpleNamespace(oid="c0ffee")

    def list_repo_tree(self, repo: str, *, recursive: bool, revision: str) -> Iterator[Any]:
        assert revision == "c0ffee"
        for name, data in self.files.items():
            blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            lfs = SimpleNamespace(sha256=hashlib.sha256(data).hexdigest()) if name.endswith(LFS_SUFFIX) else None
            yield SimpleNamespace(path=name, blob_id=blob_id, lfs=lfs)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", fake)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_token")
    monkeypatch.setattr("clm_dist.hub.RETRY_DELAYS_S", (0.0, 0.0))
    return fake


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "final" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "final"


def test_a_push_that_the_hub_holds_is_recorded(
    fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path)
    assert hub.push(make_job(), run, model, 3) == "https://hub.example/alice/tiny"
    assert fake_hub.files == FILES
    state = read_json(run.hub)
    assert ([pushed["step"] for pushed in state["pushed"]], state["pending"]) == ([3], None)


@pytest.mark.parametrize("held", [b"WEIGHTS", b"", None], ids=["other bytes", "nothing in it", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_that_the_hub_does_not_hold_as_it_was_pushed_is_found(
    name: str, held: bytes | None, fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    fake_hub.changed = {name: held}
    with pytest.raises(HubError, match=f"does not hold {name} as it was pushed"):
        hub.push(make_job(), RunDir(tmp_path), model, 3)
    state = read_json(RunDir(tmp_path).hub)
    assert not state["pushed"]
    assert f"does not hold {name}" in state["pending"]["error"]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_push_that_fails_for_a_passing_reason_is_tried_again(
    status: int, fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    fake_hub.statuses = [status, status]
    hub.push(make_job(), RunDir(tmp_path), model, 3)
    assert fake_hub.num_uploads == 3
    assert read_json(RunDir(tmp_path).hub)["pending"] is None


def test_a_push_is_given_up_after_the_last_try(
    fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    fake_hub.statuses = [503, 503, 503]
    with pytest.raises(HubError, match="the push to alice/tiny failed: 503"):
        hub.push(make_job(), RunDir(tmp_path), model, 3)
    assert fake_hub.num_uploads == 3


def test_a_push_that_the_hub_refuses_is_not_tried_again(
    fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    fake_hub.statuses = [403]
    with pytest.raises(ConfigError, match="the token may not write to alice/tiny"):
        hub.push(make_job(), RunDir(tmp_path), model, 3)
    assert fake_hub.num_uploads == 1


def test_the_repository_is_the_one_of_the_job(
    fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    for settings in (("name=other",), ("hub.repo=bob/named", "hub.private=false"), ("hub.repo=mine",)):
        hub.push(make_job(*settings), RunDir(tmp_path), model, 3)
    assert fake_hub.repos == {"alice/other": True, "bob/named": False, "alice/mine": True}
