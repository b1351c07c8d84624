"""What a push does about a Hub that fails, and that holds other bytes than were pushed."""

from pathlib import Path

import pytest

from clm_dist import hub
from clm_dist.errors import ConfigError, HubError
from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from tests.conftest import MakeJob
from tests.support.fake_hub import FakeHub

FILES = {"config.json": b'{"model_type": "gpt2"}', "model.safetensors": b"weights", "nested/card.md": b"# A model"}
COMMIT = "POST /api/models/alice/tiny/commit/main"


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY_DELAYS_S", (0.0, 0.0))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        path = tmp_path / "final" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "final"


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
    fake_hub.fail(COMMIT, status, times=2)
    hub.push(make_job(), RunDir(tmp_path), model, 3)
    assert fake_hub.requests.count(COMMIT) == 3
    assert read_json(RunDir(tmp_path).hub)["pending"] is None


def test_a_push_is_given_up_after_the_last_try(
    fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    fake_hub.fail(COMMIT, 503, times=3)
    with pytest.raises(HubError, match=r"the push to alice/tiny failed: .*503"):
        hub.push(make_job(), RunDir(tmp_path), model, 3)
    assert fake_hub.requests.count(COMMIT) == 3


def test_a_push_that_the_hub_refuses_is_not_tried_again(
    fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    fake_hub.fail(COMMIT, 403, times=3)
    with pytest.raises(ConfigError, match="the token may not write to alice/tiny"):
        hub.push(make_job(), RunDir(tmp_path), model, 3)
    assert fake_hub.requests.count(COMMIT) == 1


def test_the_repository_is_the_one_of_the_job(
    fake_hub: FakeHub, make_job: MakeJob, model: Path, tmp_path: Path
) -> None:
    for settings in (("name=other",), ("hub.repo=alice/named", "hub.private=false"), ("hub.repo=mine",)):
        hub.push(make_job(*settings), RunDir(tmp_path), model, 3)
    private = {name: repo.private for (_, name), repo in fake_hub.repos.items()}
    assert private == {"alice/other": True, "alice/named": False, "alice/mine": True}
