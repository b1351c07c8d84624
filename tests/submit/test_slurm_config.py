"""The section cluster.slurm: what a job file may say, and what a wrong one is told."""

import re
from pathlib import Path

import pytest

from clm_dist.cli.submit import _option_setting
from clm_dist.config.job import ClusterConfig
from clm_dist.config.load import job_text, load_job, read_saved_job
from clm_dist.config.slurm import SlurmConfig
from clm_dist.errors import ConfigError
from clm_dist.submit.slurm.render import hosts_of, render_run
from tests.support.fakes import request_of, submission

GOOD = "name: a\ndata: {source: builtin}\nmodel: {path: gpt2}\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a job.yaml"


def slurm_of(path: Path, text: str, *overrides: str) -> SlurmConfig:
    """The section of a job whose cluster.slurm is one line, the fourth."""
    path.write_text(f"{GOOD}cluster: {{slurm: {{{text}}}}}\n")
    return load_job(path, overrides).config.cluster.slurm


def error_of(path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        slurm_of(path, text, *overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "time", ["90", "90:30", "2:00:00", "100:00:00", "1-12", "1-12:30", "1-12:30:15", "UNLIMITED", "infinite"]
)
def test_every_time_that_slurm_reads_is_taken_as_it_is(path: Path, time: str) -> None:
    assert slurm_of(path, f'time: "{time}"').time == time
    assert slurm_of(path, "", f'cluster.slurm.time="{time}"').time == time
    # The saved job gives it back as a text.
    path.write_text(job_text(load_job(path, [f'cluster.slurm.time="{time}"']).config))
    assert load_job(path).config.cluster.slurm.time == time


@pytest.mark.parametrize(
    "time", ["2h", "two hours", "1:2:3:4", "-5", "1-", ":30", "2:00:", "1-12:00:00:00", "", "1\\n"]
)
def test_what_is_no_time_is_refused_with_its_line(path: Path, time: str) -> None:
    said = error_of(path, f'time: "{time}"')
    assert said.startswith(f"{path}:4: cluster.slurm.time is ")
    assert said.endswith(": not a time of Slurm; it takes minutes, [hours:]minutes:seconds or days-hours[:minutes]")


def test_a_time_that_yaml_reads_as_a_number_is_refused(path: Path) -> None:
    advice = 'a number; write it in quotes, "2:00:00"; it takes minutes'
    assert f"{path}:4: cluster.slurm.time is 7200: {advice}" in error_of(path, "time: 2:00:00")
    assert f"{path}:4: cluster.slurm.prepare.time is 7200: {advice}" in error_of(path, "prepare: {time: 2:00:00}")
    assert f"cluster.slurm.time is 90: {advice}" in error_of(path, "time: 90")
    said = error_of(path, "", "cluster.slurm.time=2:00:00")
    assert said.startswith(f"--set cluster.slurm.time=2:00:00: cluster.slurm.time is 7200: {advice}")


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("nodes: 2", "nodes has a field of its own: nodes; remove it here"),
        ("job-name: a", "job-name has a field of its own: the job's name"),
        ("array: 0-3", "array has a field of its own: --array"),
        ("gpus-per-socket: 2", "gpus-per-socket has a field of its own: gpus_per_node"),
        ("gpus: two", "not a number of GPUs; write 8, or a100:8 for GPUs of a type"),
        ("gpus-per-task: true", "not a number of GPUs; write 8, or a100:8"),
        ("gres: shard:2", "shard:2 is a share of a GPU, and a worker takes a whole one; write gres=gpu:1"),
        ('gres: "gpu:a100:many"', "gpu:a100:many is not understood; write gres=gpu:2, or gres=gpu:a100:2"),
        ('gres: "gpu=2"', "gpu=2 is not understood; write gres=gpu:2"),
        ("exclusive: yes please", "exclusive is an option without a value; write true, or user, mcs, topo"),
        ("spread-job: 1", "spread-job is an option without a value; write true"),
        ("no-requeue: true", "no-requeue has a field of its own: max_requeues"),
        ("signal: USR2", "signal has a field of its own: signal_s"),
        ("output: log", "output is set by clm-dist, which relies on it; remove it"),
        ("wrap: true", "wrap is set by clm-dist, which relies on it; remove it"),
        ("ntasks: 3", "ntasks is set by clm-dist, which relies on it; remove it"),
        ("--exclusive: true", "'--exclusive' is not a long option of sbatch; write it without leading dashes"),
        ("C: a100", "'C' is not a long option of sbatch"),
        ('"comment=a b": true', "'comment=a b' is not a long option of sbatch"),
        ('"exclusive\\n#SBATCH": true', "is not a long option of sbatch"),
        ('comment: "a\\nb"', "it must be text without line breaks, which #SBATCH cannot hold"),
        ('comment: ""', "it must be text without line breaks"),
    ],
)
def test_an_option_that_cannot_be_set_says_where_its_place_is(path: Path, option: str, field: str) -> None:
    for section, name in (("{}", "cluster.slurm.options"), ("prepare: {{{}}}", "cluster.slurm.prepare.options")):
        said = error_of(path, section.format(f"options: {{{option}}}"))
        assert said.startswith(f"{path}:4: {name} is ")
        assert field in said


def test_any_other_option_is_passed_through_with_its_type(path: Path) -> None:
    options = slurm_of(
        path, 'options: {exclusive: true, mem: 0, comment: "it\'s # 5%", hold: false, qos: null}'
    ).options
    assert options == {"exclusive": True, "mem": 0, "comment": "it's # 5%", "hold": False, "qos": None}
    assert options["exclusive"] is True
    assert options["mem"] is not False


@pytest.mark.parametrize(
    ("asked", "count", "lines"),
    [
        ("gpus_per_node: 2", 2, {"--gpus-per-node=2"}),
        ('gpus_per_node: "2"', 2, {"--gpus-per-node=2"}),
        ("gpus_per_node: a100:2", 2, {"--gpus-per-node=a100:2"}),
        ("gpus_per_node: 'a100:4,v100:2'", 6, {"--gpus-per-node=a100:4,v100:2"}),
        ("options: {gpus-per-node: a100:2}", 2, {"--gpus-per-node=a100:2"}),
        ("options: {gpus-per-task: 2}", 2, {"--gpus-per-node=2"}),
        ("nodes: 2, options: {gpus: a100_3g.20gb:4}", 2, {"--gpus-per-node=a100_3g.20gb:2"}),
        ("options: {gres: gpu}", 1, {"--gres=gpu"}),
        ('options: {gres: "gpu:2"}', 2, {"--gres=gpu:2"}),
        ('options: {gres: "gpu:a100"}', 1, {"--gres=gpu:a100"}),
        ('options: {gres: "nvme:1,gpu:1g.5gb:2"}', 2, {"--gres=nvme:1,gpu:1g.5gb:2"}),
        ('options: {gres: "gres/gpu:2"}', 2, {"--gres=gres/gpu:2"}),
        ("options: {gres: gpu:3090:2}", 2, {"--gres=gpu:3090:2"}),
        ("options: {gres: nvme}", 0, {"--gres=nvme"}),
        ("options: {gpus: null, gres: null}", 0, set()),
    ],
)
def test_gpus_are_counted_however_they_are_asked_for(path: Path, asked: str, count: int, lines: set[str]) -> None:
    path.write_text(f"{GOOD}cluster:\n  slurm: {{{asked}}}\n")
    job = load_job(path).config
    hosts = hosts_of(job.cluster)
    assert hosts.gpus == count
    assert ("trains on CPUs" in " ".join(hosts.warnings())) == (count == 0)
    script = render_run(job, request_of(submission()))
    assert {line.split()[1] for line in script.splitlines() if re.match("#SBATCH --(gpu|gres)", line)} == lines


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        (
            'gpus_per_node: 2, options: {gres: "gpu:2"}',
            "options.gres and gpus_per_node ask for GPUs; keep one of them (",
        ),
        (
            "options: {gpus: 2, gpus-per-task: 2}",
            "options.gpus and options.gpus-per-task ask for GPUs; keep one of them",
        ),
        (
            "nodes: 2, options: {gpus: 3}",
            "gpus 3 is the number on all hosts, and 2 do not share it equally; set cluster",
        ),
        ("gpus_per_node: many", "cluster.slurm.gpus_per_node is 'many': not a number of GPUs; write 8, or a100:8"),
        ("gpus_per_node: -1", "not a number of GPUs"),
        ("gpus_per_node: 2.5", "not a number of GPUs"),
        ("gpus_per_node: [8]", "not a number of GPUs"),
        ("gpus_per_node: a100:99999999999", "not a number of GPUs"),
    ],
)
def test_gpus_that_are_not_understood_are_refused_with_their_line(path: Path, asked: str, problem: str) -> None:
    said = error_of(path, asked)
    assert said.startswith(f"{path}:4: cluster.slurm")
    assert problem in said


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("exclusive=true", "#SBATCH --exclusive"),
        ("exclusive", "#SBATCH --exclusive"),
        ("exclusive=user", "#SBATCH --exclusive=user"),
        ("exclusive=false", None),
        ("hold=true", "#SBATCH --hold"),
        ("kill-on-invalid-dep=yes", "#SBATCH --kill-on-invalid-dep=yes"),
    ],
)
def test_options_without_a_value_may_be_written_as_true(path: Path, option: str, line: str | None) -> None:
    path.write_text(GOOD)
    script = render_run(load_job(path, [_option_setting(option)]).config, request_of(submission()))
    name = option.partition("=")[0]
    assert [found for found in script.splitlines() if name in found] == ([line] if line else [])


@pytest.mark.parametrize("field", ["partition", "account", "prepare: {partition", "container: {image"])
def test_a_line_break_cannot_get_into_an_option(path: Path, field: str) -> None:
    close = "}" if "{" in field else ""
    assert "it must be text without line breaks" in error_of(path, f'{field}: "a\\n#SBATCH --wrap=ls"{close}')


def test_two_environments_are_one_too_many(path: Path) -> None:
    both = "venv: /a, container: {image: a.sif}"
    assert error_of(path, both) == (
        f"{path}:4: cluster.slurm has venv and container; keep one of them and set the other to null"
    )
    assert slurm_of(path, both, "cluster.slurm.container=null").venv == "/a"


def test_a_key_that_was_removed_says_what_to_write_instead(path: Path) -> None:
    said = error_of(path, "modules: [cuda/12.8]")
    assert said == (
        f"{path}:4: cluster.slurm.modules does not exist any more; write `module load NAME` as a line of "
        "cluster.slurm.setup"
    )
    assert "`conda activate NAME` as lines of cluster.slurm.setup, and set cluster.slurm.venv" in error_of(
        path, "conda: b"
    )


def test_a_job_that_an_earlier_version_saved_is_read(path: Path) -> None:
    for text in ("modules: [], conda: null", "modules: [cuda], conda: b"):
        path.write_text(f"{GOOD}cluster: {{slurm: {{{text}}}, k8s: {{scheduler: default}}}}\n")
        assert read_saved_job(path).cluster == ClusterConfig()
    assert slurm_of(path, "modules: [], conda: null") == SlurmConfig()
    # Options that are refused now are not needed any more, but the run is.
    options = "options: {gres: 'gpu:a100:2', hold: 1}, gpus_per_node: 2, prepare: {options: {exclusive: 'yes'}}"
    path.write_text(f"{GOOD}cluster: {{slurm: {{{options}}}}}\n")
    with pytest.raises(ConfigError):
        load_job(path)
    assert read_saved_job(path).cluster.slurm.gpus_per_node == 2


def test_an_unknown_key_names_the_nearest_and_its_line(path: Path) -> None:
    assert error_of(path, "partitoin: gpu") == (
        f"{path}:4: unknown key cluster.slurm.partitoin; did you mean partition?"
    )
    assert "unknown key cluster.slurm.prepare.cpu; did you mean cpus?" in error_of(path, "prepare: {cpu: 3}")
    assert "unknown key cluster.slurm.container.img; did you mean image?" in error_of(path, "container: {img: a}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes: 0", "cluster.slurm.nodes is 0: input should be greater than 0"),
        ("nodes: true", "cluster.slurm.nodes is True: input should not be true or false"),
        ("gpus_per_node: -1", "cluster.slurm.gpus_per_node is -1: not a number of GPUs; write 8, or a100:8"),
        ("max_requeues: -1", "cluster.slurm.max_requeues is -1: input should be greater than or equal to 0"),
        ("signal_s: 0", "cluster.slurm.signal_s is 0: input should be greater than 0"),
        ('interface: "ib0; ls"', "cluster.slurm.interface is 'ib0; ls': string should match pattern"),
        ("container: {image: a, runtime: docker}", "cluster.slurm.container.runtime is 'docker': input should be"),
    ],
)
def test_a_wrong_value_names_field_value_and_line(path: Path, text: str, message: str) -> None:
    assert error_of(path, text).startswith(f"{path}:4: {message}")
