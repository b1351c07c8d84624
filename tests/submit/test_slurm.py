"""What a script says; `python -m tests.submit.test_slurm` writes slurm/*.sbatch anew."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job
from clm_dist.errors import ConfigError
from clm_dist.submit.slurm.render import hosts_of, render_prepare, render_run
from clm_dist.submit.submission import sweep_name, sweep_settings
from tests.conftest import ROOT
from tests.support.fakes import full_job, request_of, submission

GOLDEN = ROOT / "slurm"


def rendered() -> dict[str, str]:
    """Every file of slurm/ by its name."""
    files = {}
    for path in (ROOT / "jobs").glob("*.yaml"):
        job = load_job(path).config
        hosts_of(job.cluster).check()
        files[f"{path.stem}.sbatch"] = render_run(job, request_of(submission(name=job.name)))
    sweep = sweep_settings(["learning_rate=1e-5,2e-5,5e-5"])
    names = tuple(sweep_name("eli5-full", settings) for settings in sweep)
    files["eli5-full-sweep.sbatch"] = render_run(full_job(), request_of(submission(run_names=names, sweep=True)))
    files["eli5-full-prepare.sbatch"] = render_prepare(full_job(), request_of(submission()))
    return files


def test_the_files_of_slurm_are_what_is_rendered() -> None:
    files = rendered()
    assert {path.name for path in GOLDEN.iterdir()} == set(files)
    for name, text in files.items():
        assert (GOLDEN / name).read_text() == text, f"{name} differs; `python -m tests.submit.test_slurm` writes it"


_RENDER = """
import sys
from pathlib import Path
from clm_dist.config.load import load_job
from clm_dist.submit.slurm.render import Request, render_run
from clm_dist.submit.submission import Submission
job = load_job(Path(sys.argv[1])).config
one = Submission(name=job.name, backend="slurm", runs=Path("/shared/runs"), run_names=(job.name,))
print(render_run(job, Request(one, store="/shared/store", venv=Path("/shared/clm_dist/.venv"))), end="")
"""


def test_a_script_is_the_same_on_every_host(tmp_path: Path) -> None:
    host = {"PATH": "", "PYTHONPATH": str(ROOT), "HOSTNAME": "elsewhere", "SLURM_JOB_ID": "5", "TZ": "Asia/Tokyo"}
    command = [sys.executable, "-c", _RENDER, str(ROOT / "jobs" / "eli5-subset.yaml")]
    ended = subprocess.run(command, cwd=tmp_path, env=host, capture_output=True, text=True)
    assert ended.stdout == (GOLDEN / "eli5-subset.sbatch").read_text(), ended.stderr
    assert list(tmp_path.iterdir()) == []


def tokens(line: str) -> list[str]:
    """An #SBATCH line as sbatch splits it: quotes group, and a backslash takes the next character, in quotes too."""
    found: list[str] = []
    word, quote, position = "", "", len("#SBATCH")
    while position < len(line):
        character = line[position]
        if character == "\\":
            position += 1
            word += line[position]
        elif quote:
            quote, word = ("", word) if character == quote else (quote, word + character)
        elif character in "'\"":
            quote = character
        elif character == "#":
            break
        elif character.isspace():
            found, word = ([*found, word] if word else found), ""
        else:
            word += character
        position += 1
    assert not quote
    return [*found, word] if word else found


def options(text: str) -> list[str]:
    """What sbatch takes from a script: the lines of #SBATCH before the first command."""
    found = []
    for line in text.splitlines():
        if line.startswith("#SBATCH"):
            found += tokens(line)
        elif line and not line.startswith("#"):
            break
    return found


HOSTILE = [
    "a b",
    "it's",
    '"',
    "# no comment",
    "100%",
    "back\\slash",
    "\\",
    "$(touch x)",
    "`ls`",
    "; ls",
    "'\\''",
    "*",
    "é",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_an_option_reaches_sbatch_as_it_is(value: str) -> None:
    own = {"partition": value, "account": value, "options": {"comment": value}}
    job = full_job("cluster.slurm=" + json.dumps({**own, "prepare": own}))
    for render in (render_run, render_prepare):
        given = options(render(job, request_of(submission())))
        assert {f"--partition={value}", f"--account={value}", f"--comment={value}"} <= set(given)


@pytest.mark.parametrize("runs", ["/a b/it's", '/"/#/$(ls)/`ls`/;', "/100%/%j/%%"])
def test_the_log_lies_where_it_is_said_to(runs: str) -> None:
    for sweep in (False, True):
        one = submission(Path(runs), run_names=("a", "b"), sweep=sweep)
        (log,) = (o for o in options(render_run(full_job(), request_of(one))) if o.startswith("--output="))
        # Slurm takes %% for a per cent sign, and %a for the number in the array.
        path = log.removeprefix("--output=").replace("%%", "\0")
        assert path.replace("%a", "1").replace("\0", "%") == str(one.files(1).log)
        assert sweep == ("%a" in path)


def test_options_say_what_the_job_says() -> None:
    settings = (
        "cluster.slurm.partition=gpu",
        "cluster.slurm.account=me",
        "cluster.slurm.signal_s=300",
        "cluster.slurm.options={exclusive: true, mem: 0, hold: false, qos: null}",
    )
    run = options(render_run(full_job(*settings), request_of(submission())))
    assert run == [
        "--job-name=eli5-full",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=32",
        "--gpus-per-node=8",
        "--time=12:00:00",
        "--partition=gpu",
        "--account=me",
        "--output=/shared/runs/.submitted/eli5-full/log",
        "--open-mode=append",
        "--requeue",
        "--signal=B:USR1@300",
        "--exclusive",
        "--mem=0",
    ]


def test_a_job_that_is_never_requeued_says_so() -> None:
    text = render_run(full_job("cluster.slurm.max_requeues=0"), request_of(submission()))
    assert "--no-requeue" in options(text)
    assert "--requeue" not in options(text)
    assert "\nmax_requeues=0\n" in text


def test_elastic_workers_outlive_a_node() -> None:
    elastic = render_run(full_job("cluster.workers=[4,16]"), request_of(submission()))
    rigid = render_run(full_job(), request_of(submission()))
    assert "--no-kill" in options(elastic)
    assert "\nsrun --export=ALL --no-kill --kill-on-bad-exit=0 python3 -m clm_dist.submit.slurm.ray_node " in elastic
    assert "--no-kill" not in rigid
    assert "\nsrun --export=ALL --kill-on-bad-exit=1 python3 -m clm_dist.submit.slurm.ray_node " in rigid


def test_a_sweep_is_one_array() -> None:
    names = ("a", "b", "c")
    text = render_run(full_job(), request_of(submission(run_names=names, sweep=True)))
    assert "--array=0-2" in options(text)
    limited = request_of(submission(run_names=names, sweep=True), at_once=2)
    assert "--array=0-2%2" in options(render_run(full_job(), limited))
    assert "\nstate=/shared/runs/.submitted/eli5-full/$SLURM_ARRAY_TASK_ID\n" in text
    prepare = render_prepare(full_job(), request_of(submission(run_names=names, sweep=True)))
    assert not [option for option in options(prepare) if option.startswith("--array")]
    assert prepare.count("-m clm_dist prepare --tasks 4 /shared/runs/.submitted/eli5-full/") == 3


def test_the_job_that_prepares_asks_for_cpus_alone() -> None:
    settings = ("cluster.slurm.prepare={partition: cpu, cpus: 6, time: '30', options: {mem: 8G}}",)
    prepare = options(render_prepare(full_job(*settings, "cluster.slurm.account=me"), request_of(submission())))
    assert {"--nodes=1", "--ntasks=1", "--cpus-per-task=6", "--partition=cpu", "--time=30", "--mem=8G"} <= set(prepare)
    assert "--account=me" in prepare
    assert not [option for option in prepare if "gpu" in option or "signal" in option]


def sized(workers: str, nodes: int, gpus: int, *settings: str) -> JobConfig:
    shape = (f"cluster.workers={workers}", f"cluster.slurm.nodes={nodes}", f"cluster.slurm.gpus_per_node={gpus}")
    return load_job(ROOT / "jobs" / "eli5-full.yaml", [*shape, *settings]).config


@pytest.mark.parametrize(
    ("workers", "nodes", "gpus", "setting", "message"),
    [
        (
            *("16", 1, 8, "cpus_per_worker=4"),
            "cluster.workers 16 x 1 GPUs do not fit 1 x 8 (cluster.slurm.nodes x gpus_per_node); "
            "take --nodes 2 or --set cluster.workers=8",
        ),
        ("[12,16]", 1, 8, "cpus_per_worker=4", "cluster.workers 12 x 1 GPUs do not fit 1 x 8"),
        (
            *("16", 2, 8, "slurm.cpus_per_node=16"),
            "cluster.workers 16 x 4 CPUs do not fit 2 x 16 (cluster.slurm.nodes x cpus_per_node); "
            "take --nodes 4 or --set cluster.workers=8",
        ),
        ("16", 2, 8, "slurm.cpus_per_node=3", "take a larger cluster.slurm.cpus_per_node"),
        (
            *("16", 2, 0, "gpus_per_worker=1"),
            "cluster.gpus_per_worker is 1, and no GPUs are asked for; say how many each node has with --gpus-per-node",
        ),
    ],
)
def test_workers_that_do_not_fit_the_nodes_are_told_what_does(
    workers: str, nodes: int, gpus: int, setting: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        hosts_of(sized(workers, nodes, gpus, f"cluster.{setting}").cluster).check()
    assert message in str(caught.value)
    assert caught.value.field in ("cluster.workers", "cluster.slurm.gpus_per_node")


@pytest.mark.parametrize(("nodes", "gpus", "workers"), [(1, 8, 8), (3, 4, 12), (2, 0, 16), (3, 0, 16)])
def test_workers_that_fill_the_nodes_fit(nodes: int, gpus: int, workers: int) -> None:
    job = sized(str(workers), nodes, gpus)
    hosts_of(job.cluster).check()
    assert hosts_of(job.cluster).idle_gpus == 0


def test_gpus_that_no_worker_takes_are_counted() -> None:
    assert hosts_of(sized("10", 2, 8).cluster).idle_gpus == 6
    assert hosts_of(sized("[2,10]", 2, 8).cluster).idle_gpus == 6
    assert hosts_of(sized("16", 2, 8, "cluster.gpus_per_worker=0").cluster).idle_gpus == 16


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, text in rendered().items():
        (GOLDEN / name).write_text(text)
        print(f"slurm/{name}")
