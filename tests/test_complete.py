"""What a shell proposes for a word of the command line."""

from pathlib import Path

import pytest

from clm_dist.config.packaged import packaged_jobs
from tests.support.command import assert_starts_at_once, clm_dist, modules_of


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a job file, two runs and a submission."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLM_DIST_RUNS", raising=False)
    monkeypatch.setenv("_CLM_DIST_COMPLETE", "complete_bash")
    names = ("quick.yaml", "runs/q 1/job.yaml", "runs/two/job.yaml", "runs/none/x", "runs/.submitted/a/submission.json")
    for name in (*names, "else/other/job.yaml", "else/.submitted/b/submission.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def ask(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """What bash sets when Tab is pressed at the end of a line."""
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))


@pytest.mark.parametrize(
    ("line", "proposed"),
    [
        ("clm-dist gen", ["generate"]),
        ("clm-dist run --over", ["--overwrite"]),
        ("clm-dist run ", sorted([*packaged_jobs(), "quick.yaml"])),
        ("clm-dist train qu", ["quick.yaml", "quickstart"]),
        ("clm-dist prepare quick.", ["quick.yaml"]),
        ("clm-dist submit slurm quicks", ["quickstart"]),
        ("clm-dist submit k8s quicks", ["quickstart"]),
        ("clm-dist evaluate x --job quicks", ["quickstart"]),
        ("clm-dist report ", ["runs/q 1", "runs/two"]),
        ("clm-dist report runs/two runs/q", ["runs/q 1"]),
        ("clm-dist push runs/t", ["runs/two"]),
        ("clm-dist generate runs/t", ["runs/two"]),
        ("clm-dist evaluate runs/t", ["runs/two"]),
        # The shell proposes directories then.
        ("clm-dist generate models/", []),
        ("clm-dist status ", ["a", "q 1", "two"]),
        ("clm-dist logs ", ["a"]),
        ("clm-dist cancel --runs else ", ["b"]),
    ],
)
def test_what_is_proposed(
    line: str, proposed: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(monkeypatch, line)
    said = clm_dist(capsys, monkeypatch)
    assert (said.code, said.out.split("\n")[:-1], said.err) == (0, proposed or [""], "")


def test_runs_elsewhere_are_those_of_the_environment(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLM_DIST_RUNS", str(here / "else"))
    ask(monkeypatch, "clm-dist report ")
    assert clm_dist(capsys, monkeypatch).out == f"{here / 'else' / 'other'}\n"
    ask(monkeypatch, "clm-dist status ")
    assert clm_dist(capsys, monkeypatch).out == "b\nother\n"


def test_it_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "clm-dist report ")
    out, modules = modules_of()
    assert out == "runs/q 1\nruns/two\n"
    assert_starts_at_once(modules)
