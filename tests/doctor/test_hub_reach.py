"""What the Hub says of the names of a job, and of the token that is to push."""

from pathlib import Path

import pytest

from clm_dist.doctor.finding import Finding
from clm_dist.doctor.hub_reach import Answer, ask_hub, check_push, judge_answers
from tests.conftest import MakeJob
from tests.support.fake_hub import FakeHub


def judged(*answers: Answer) -> list[Finding]:
    return list(judge_answers(list(answers)))


def test_a_model_that_is_there_is_found_and_one_that_is_not_is_an_error(fake_hub: FakeHub) -> None:
    from huggingface_hub import HfApi

    HfApi().create_repo("alice/model")
    there, missing = judged(*ask_hub(("alice/model", "alice/other"), None, offline=False, data_offline=False))
    assert (there.severity, there.what) == ("ok", "the model alice/model is there")
    assert (missing.severity, missing.passes) == ("error", False)
    assert "alice/other" in missing.what


def test_a_hub_that_fails_is_an_error_that_may_pass(fake_hub: FakeHub) -> None:
    fake_hub.fail("alice/model", 503, times=20)
    (finding,) = judged(*ask_hub(("alice/model",), None, offline=False, data_offline=False))
    assert (finding.severity, finding.passes) == ("error", True)


def test_a_hub_that_is_not_reached_is_an_error_that_may_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    (finding,) = judged(*ask_hub((), "alice/data", offline=False, data_offline=False))
    assert (finding.severity, finding.passes) == ("error", True)
    assert "the data set alice/data" in finding.what


def test_a_name_that_the_hub_cannot_have_is_an_error(fake_hub: FakeHub) -> None:
    (finding,) = judged(*ask_hub(("./no/such/directory",), None, offline=False, data_offline=False))
    assert (finding.severity, finding.passes) == ("error", False)


def test_what_is_in_the_cache_does_without_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--alice--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--alice--model" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    cached, missing, data = judged(
        *ask_hub(("alice/model", "alice/other"), "alice/data", offline=True, data_offline=True)
    )
    assert (cached.severity, missing.severity, data.severity) == ("note", "error", "unchecked")
    assert "hf download alice/other" in missing.mend


def test_a_cached_model_makes_an_absent_hub_a_warning() -> None:
    answer = Answer("alice/model", "model", is_cached=True, problem="timed out", is_away=True)
    assert [finding.severity for finding in judged(answer)] == ["warning"]


@pytest.mark.parametrize(
    ("token", "severity", "words"),
    [("hf_good", "ok", "alice/tiny"), ("hf_reads", "error", "may only read"), ("hf_wrong", "error", "refuses")],
)
def test_the_token_of_a_job_that_pushes_is_asked_for(
    token: str,
    severity: str,
    words: str,
    fake_hub: FakeHub,
    make_job: MakeJob,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    (finding,) = check_push(make_job("hub.push=end"), {})
    assert finding.severity == severity
    assert words in finding.what


def test_a_hub_that_is_away_ends_no_run_that_pushes(fake_hub: FakeHub, make_job: MakeJob) -> None:
    fake_hub.fail("whoami", 503, times=20)
    assert [finding.severity for finding in check_push(make_job("hub.push=end"), {})] == ["warning"]
    assert not list(check_push(make_job("hub.push=end"), {"HF_HUB_OFFLINE": "1"}))
