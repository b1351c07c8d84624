"""What runs on a commit, on a push and at night is what .ci/run runs."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

from clm_dist.train.trackers.services import TRACKERS
from tests.conftest import ROOT

CI = (ROOT / ".ci" / "run").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def steps_of(name: str) -> list[str]:
    """The commands of a workflow."""
    workflow = load(ROOT / ".github" / "workflows" / name)
    return [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def test_a_push_runs_the_linters_and_the_installation_of_ci() -> None:
    steps = steps_of("fast.yml")
    for line in CI.splitlines():
        if line.startswith((".venv/bin/ruff", ".venv/bin/mypy")):
            assert line in steps
    # GitHub's python is not called python3 alone.
    (install,) = (line for line in CI.splitlines() if "-m venv" in line)
    assert install.replace("python3", "python") in steps
    assert ".venv/bin/pytest" in steps


def test_a_push_runs_on_the_oldest_python_that_is_supported() -> None:
    versions = load(ROOT / ".github" / "workflows" / "fast.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert f">={versions[0]}" == PROJECT["project"]["requires-python"]


def test_the_night_runs_the_whole_check_and_what_is_long() -> None:
    steps = steps_of("nightly.yml")
    assert ".ci/run" in steps
    assert ".venv/bin/pytest -m long -n 0" in steps
    assert re.search(r"pytest -m 'not long'", CI)


def test_the_night_installs_every_tracker_and_runs_its_tests() -> None:
    steps = steps_of("nightly.yml")
    place = steps.index(".venv/bin/pytest -n 0 tests/train/test_tracker_services.py")
    assert steps[place - 1].endswith(f"'.[test,{','.join(TRACKERS)}]'")


def test_a_commit_runs_the_linters_of_ci() -> None:
    (repo,) = load(ROOT / ".pre-commit-config.yaml")["repos"]
    entries = {hook["entry"].replace(" --force-exclude", "") for hook in repo["hooks"]}
    lines = [line.removeprefix(".venv/bin/").removesuffix(" .") for line in CI.splitlines()]
    assert entries == {line for line in lines if line.startswith(("ruff", "mypy"))}
