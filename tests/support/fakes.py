"""A Slurm of shell scripts: it answers from files, and remembers what it was asked."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.submit.slurm.render import Request
from clm_dist.submit.submission import Submission
from tests.conftest import ROOT
from tests.support.command import Said, clm_dist

# Nothing but this is on the PATH, so the scripts keep to what bash has built in.
_PROGRAM = r"""#!/bin/bash
cd {root} || exit 99
printf '%s\037' {name} "$@" >>calls
echo >>calls
/usr/bin/env -0 >environment-{name}
number=$(<number-{name})
number=$((number + 1))
echo $number >number-{name}
for refusal in refusal-{name} refusal-{name}-$number; do
    if [ -f $refusal ]; then printf '%s\n' "$(<$refusal)" >&2; exit 1; fi
done
job="${{!#}}"
case {name} in
    sbatch) echo $((100 + number)) ;;
    scontrol)
        if [ "$1" = release ]; then exit 0; fi
        if [ ! -f "jobs/$job" ]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
        printf '%s\n' "$(<"jobs/$job")" ;;
    scancel) printf '%s\n' "JobId=$job JobState=CANCELLED Reason=None ExitCode=0:15" >"jobs/$job" ;;
    *) printf '%s\n' "$(<{name}.txt)" ;;
esac
"""
SINFO = "cpu*|(null)\ngpu|gpu:a100:4(S:0-1)\ngpu|gpu:v100:8\n"


@dataclass(frozen=True)
class FakeSlurm:
    """The first job that it takes has the number 101, the second 102."""

    root: Path

    @property
    def path(self) -> Path:
        """Directory of the programs."""
        return self.root / "bin"

    def install(self, *names: str) -> None:
        for name in names:
            (self.root / f"number-{name}").write_text("0")
            program = self.path / name
            program.write_text(_PROGRAM.format(root=shlex.quote(str(self.root)), name=name))
            program.chmod(0o755)

    def remove(self, name: str) -> None:
        (self.path / name).unlink()

    def answer(self, name: str, text: str) -> None:
        """What sinfo or sacct say."""
        (self.root / f"{name}.txt").write_text(text)

    def refuse(self, name: str, text: str, *, call: int | None = None) -> None:
        """Let a program fail, at every call or at one."""
        (self.root / f"refusal-{name}{'' if call is None else f'-{call}'}").write_text(text)

    def job(self, number: object, *lines: str) -> None:
        """What scontrol says of a job; `JobId` is added in front of one line."""
        text = "\n".join(lines) if "JobId=" in lines[0] else f"JobId={number} {lines[0]}"
        (self.root / "jobs" / str(number)).write_text(text)

    def forget(self, number: object) -> None:
        (self.root / "jobs" / str(number)).unlink(missing_ok=True)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        calls = self.root / "calls"
        lines = calls.read_text().splitlines() if calls.exists() else []
        return [parts[1:-1] for parts in (line.split("\x1f") for line in lines) if parts[0] == name]

    def environment(self, name: str) -> dict[str, str]:
        """That a program's last call had."""
        entries = (self.root / f"environment-{name}").read_text().split("\0")
        return dict(entry.split("=", 1) for entry in entries if entry)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """Slurm without an accounting database, alone on the PATH."""
    fake = FakeSlurm(tmp_path / "a slurm")
    for directory in ("bin", "jobs"):
        (fake.root / directory).mkdir(parents=True)
    fake.install("sbatch", "sinfo", "scontrol", "scancel")
    fake.answer("sinfo", SINFO)
    monkeypatch.setenv("PATH", str(fake.path))
    return fake


@dataclass(frozen=True)
class Commands:
    """`clm-dist` with a directory of runs and a job file."""

    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    runs: Path
    store: Path
    job: Path

    def submit(self, *options: object) -> Said:
        return self.call("submit", "slurm", self.job, "--store", self.store, *options)

    def call(self, *arguments: object) -> Said:
        return clm_dist(self.capsys, self.monkeypatch, *arguments, "--runs", self.runs)

    def files(self, name: str = "tiny") -> Path:
        """Directory of a submission."""
        return self.runs / ".submitted" / name

    def add_metrics(self, name: str, *records: dict[str, object]) -> None:
        (self.runs / name).mkdir(parents=True, exist_ok=True)
        with (self.runs / name / "metrics.jsonl").open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def commands(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, slurm: FakeSlurm
) -> Commands:
    job = tmp_path / "it's a job.yaml"
    job.write_text("name: tiny\ndata: {source: builtin}\nmodel: {path: gpt2}\n")
    return Commands(capsys, monkeypatch, tmp_path / "the runs", tmp_path / "the store", job)


def submission(
    runs: Path = Path("/shared/runs"), name: str = "eli5-full", run_names: tuple[str, ...] = (), **values: Any
) -> Submission:
    return Submission(name=name, backend="slurm", runs=runs, run_names=run_names or (name,), **values)


def request_of(submission: Submission, **values: Any) -> Request:
    given = {"store": "/shared/store", "venv": Path("/shared/clm_dist/.venv"), **values}
    return Request(submission, **given)


def full_job(*settings: str) -> JobConfig:
    """jobs/eli5-full.yaml: two nodes of eight GPUs."""
    return load_job(ROOT / "jobs" / "eli5-full.yaml", settings).config
