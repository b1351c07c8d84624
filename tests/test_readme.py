"""What the README and the guide's page say is so."""

import re
from pathlib import Path

import yaml

from clm_dist.config.load import load_job

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()


def test_ci_runs_the_readmes_test_command() -> None:
    ci = (ROOT / ".ci" / "run").read_text()
    command = next(line for line in README.splitlines() if line.endswith(".venv/bin/pytest"))
    install, test = command.rsplit(" && ", 1)
    assert install in ci.splitlines()
    assert any(line.startswith(test) for line in ci.splitlines())


def test_every_job_is_named() -> None:
    for job in (ROOT / "jobs").glob("*.yaml"):
        assert f"](../clm_dist/jobs/{job.name})" in GUIDE


def test_the_full_job_is_the_subset_and_six_lines() -> None:
    lines = (ROOT / "jobs" / "eli5-full.yaml").read_text().splitlines()
    changes = [line for line in lines if line and not line.startswith(("#", "extends", "name"))]
    assert len(changes) == 6
    assert "extends eli5-subset by six lines" in GUIDE


def test_the_settings_in_the_readme_are_settings(tmp_path: Path) -> None:
    guide = yaml.safe_load((ROOT / "jobs" / "eli5-guide.yaml").read_text())
    settings = re.findall(r"--set '?([a-z_.]+=[^\s'`]+)", README)
    assert len(settings) == 8
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(guide | {"batch": {"global_size": 840, "micro_size": 1}}))
    for setting in settings:
        # A job on files names them: the README sets both.
        load_job(path, [setting, *(s for s in settings if s.startswith("data.path="))])
