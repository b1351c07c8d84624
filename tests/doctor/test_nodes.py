"""Questions to nodes: probes in processes of their own, as srun starts them, and what they answer together."""

import sys
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from clm_dist.config.load import load_job
from clm_dist.doctor.between import Between
from clm_dist.doctor.bounded import Deadline, begin, output_of
from clm_dist.doctor.group import Group, find_group
from clm_dist.doctor.link import AskError, Started, question, value_of
from clm_dist.doctor.meetings import Meetings
from clm_dist.doctor.model_size import estimate_disk_needs, find_size, judge_size, measure_size
from clm_dist.doctor.need import Need
from clm_dist.doctor.probe import Facts, Probe
from clm_dist.doctor.slurm import is_inside, parse_counts, read_allocation
from clm_dist.files.stores import Stores
from tests.conftest import MakeJob, WriteJob

PROBE = [sys.executable, "-m", "clm_dist.doctor.probe"]


@pytest.fixture
def two() -> Iterator[Group]:
    """Two nodes, which are both this machine."""
    links = {name: Started(PROBE) for name in ("a", "b")}
    group = Group(dict(links), "two probes", is_ray=False, joins=False)
    yield group
    group.close()


def need_of(tmp_path: Path) -> Need:
    return Need.of(None, tmp_path / "runs", Stores(tmp_path / "stores"))


def test_two_nodes_are_examined_from_facts_to_a_collective(two: Group, tmp_path: Path) -> None:
    need, deadline = need_of(tmp_path), Deadline(120)
    facts = two.ask_all("facts", Facts, 60, directories=[place.where for place in need.places])
    assert list(facts) == ["a", "b"]
    assert facts["a"].versions == facts["b"].versions
    assert facts["a"].disks[str(tmp_path / "runs")].existing == str(tmp_path)
    between = Between(two, need, facts, deadline)
    if not facts["a"].network.reachable:
        pytest.skip("this machine has no network but the loopback one")
    meetings = Meetings(two, need, {node: one.disks for node, one in facts.items()}, deadline)
    between.begin()
    found = [*between.interfaces(), *meetings.files(), *between.connections(), *meetings.leases()]
    found += [*between.bandwidth(), *between.collective(), *meetings.speed(None, 120)]
    assert not two.findings
    # How fast a shared machine is, is not what is tested.
    assert not [finding for finding in found if finding.severity in ("error", "unchecked")]
    said = "\n".join(finding.what for finding in found)
    assert "2 connections between 2 nodes" in said
    assert "gloo sums over 2 nodes" in said
    assert "one of 2 nodes gets a lease" in said
    assert "2 nodes read what each wrote and renamed" in said
    assert "are written by 2 nodes at once" in said
    assert "(measured 2 ways)" in said
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_not_shared_is_found(two: Group, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second node writes nothing, as if it had a disk of its own at this place."""
    need = need_of(tmp_path)
    facts = two.ask_all("facts", Facts, 60, directories=[place.where for place in need.places])
    meetings = Meetings(two, need, {node: one.disks for node, one in facts.items()}, Deadline(60))
    ask_all = two.ask_all

    def ask(name: str, *arguments: object, **options: object) -> dict[str, object]:
        answers = ask_all(name, *arguments, **options)  # type: ignore[arg-type]
        if name == "write":
            (Path(options["meeting"].directory) / "b").unlink()  # type: ignore[attr-defined]
        return answers

    monkeypatch.setattr(two, "ask_all", ask)
    errors = [finding for finding in meetings.files() if finding.severity == "error"]
    assert {finding.nodes for finding in errors} == {("a",), ("b",)}
    assert all("what b wrote is not there" in finding.what for finding in errors)
    assert not list(meetings.leases())
    assert not list(tmp_path.iterdir())


def test_a_node_whose_probe_ends_is_named_with_its_last_words_and_asked_no_more() -> None:
    dying = Started([sys.executable, "-c", "import sys; sys.exit('No module named clm_dist')"])
    silent = Started([sys.executable, "-c", "import time; time.sleep(60)"])
    group = Group({"a": dying, "b": silent, "c": Started(PROBE)}, "three", is_ray=False, joins=False)
    assert list(group.ask_all("free_port", int, 20, {"a": {}, "c": {}})) == ["c"]
    assert list(group.ask_all("free_port", int, 0.1, {"b": {}})) == []
    first, second = group.findings
    assert (first.severity, first.nodes, first.passes) == ("error", ("a",), True)
    assert "ended with 1: No module named clm_dist" in first.what
    assert (second.nodes, "no answer within" in second.what) == (("b",), True)
    assert list(group.ask_all("free_port", int, 20)) == ["c"]
    group.close()


def test_a_question_that_fails_on_a_node_is_not_checked_and_the_node_stays() -> None:
    group = Group({"a": Started(PROBE)}, "one", is_ray=False, joins=False)
    assert group.ask_all("write_speed", float, 20, directory="/nowhere") == {}
    (finding,) = group.findings
    assert finding.severity == "unchecked"
    assert "write speed: FileNotFoundError" in finding.what
    assert group.ask_all("free_port", int, 20)
    group.close()


def test_lines_of_others_are_no_answers() -> None:
    noisy = (
        "print('Lmod has loaded cuda'); import runpy; runpy.run_module('clm_dist.doctor.probe', run_name='__main__')"
    )
    link = Started([sys.executable, "-c", noisy])
    assert value_of(link.ask(question("free_port")), int, 60) > 0
    link.close()


def test_what_a_probe_is_asked_wrongly_is_told() -> None:
    answer: Future[str] = Future()
    answer.set_result(Probe().answer('{"ask": "reach", "with": {"peers": 7}}'))
    with pytest.raises(AskError, match="ValidationError"):
        value_of(answer, list, 1)


def test_a_program_that_takes_too_long_is_ended() -> None:
    with pytest.raises(OSError, match=r"sleep does not end within 0\.05 s"):
        output_of(["sleep", "60"], 0.05)
    with pytest.raises(OSError, match="sh ends with 3: no"):
        output_of(["sh", "-c", "echo no >&2; exit 3"], 10)


def test_a_thread_tells_what_it_raises() -> None:
    with pytest.raises(ZeroDivisionError):
        begin(lambda: 1 // 0).result(timeout=10)


# --- which nodes


@pytest.mark.parametrize(
    ("environment", "inside"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "n1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "n1"}, True),
        # salloc on a login node.
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, True),
    ],
)
def test_nodes_of_a_job_are_examined_where_this_is_not_the_only_one(environment: dict[str, str], inside: bool) -> None:
    assert is_inside(environment) is inside


def test_counts_of_nodes_are_read() -> None:
    assert parse_counts("4(x2),8") == [4, 4, 8]
    assert parse_counts("72") == [72]


def test_an_allocation_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a program that prints what Slurm does."""
    program = tmp_path / "scontrol"
    program.write_text(
        "#!/bin/sh\n"
        'case "$2" in\n'
        'job) echo "JobId=$4 JobState=${STATE:-RUNNING} Reason=None" ;;\n'
        'hostnames) printf "n1\\nn2\\nn3\\n" ;;\n'
        'node) for n in 1 2 3; do echo "NodeName=n$n Arch=x NodeAddr=10.9.0.$n NodeHostName=n$n"; done ;;\n'
        "esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_CPUS_PER_NODE": "4(x2),8"}
    found = read_allocation(environment | {"SLURM_GPUS_ON_NODE": "2"})
    assert (found.nodes, found.gpus) == (("n1", "n2", "n3"), 2)
    assert found.cpus == {"n1": 4, "n2": 4, "n3": 8}
    assert "10.9.0.2" in found.hints["n2"]
    monkeypatch.setenv("STATE", "COMPLETED")
    with pytest.raises(OSError, match="job 7 is COMPLETED"):
        read_allocation(environment)


def test_a_job_that_has_ended_is_told_and_this_machine_examined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    with find_group(environment) as group:
        assert (group.where, len(group.names)) == ("this machine", 1)
        (finding,) = group.findings
    assert (finding.severity, "unset SLURM_JOB_ID" in finding.what) == ("unchecked", True)


def test_a_ray_that_does_not_answer_is_an_error_and_this_machine_examined() -> None:
    with find_group({"RAY_ADDRESS": "127.0.0.1:9"}) as group:
        assert group.where == "this machine"
        (finding,) = group.findings
    assert (finding.severity, "RAY_ADDRESS 127.0.0.1:9" in finding.what) == ("error", True)


# --- the model of the job


def test_the_size_of_a_model_is_that_of_its_parameters(make_job: MakeJob) -> None:
    from clm_dist.train.model import build_model, load_config

    job = make_job("model.config.vocab_size=300")
    model = build_model(load_config(job))
    assert measure_size(job).num_parameters == sum(parameter.numel() for parameter in model.parameters())
    # The tokenizer that is trained has 300 tokens as well.
    assert measure_size(make_job()) == measure_size(job)


def test_a_model_that_cannot_be_built_is_an_error(make_job: MakeJob) -> None:
    size = find_size(make_job("model.config.model_type=no-such-model"), 120)
    (finding,) = judge_size(size)
    assert (finding.severity, finding.passes) == ("error", False)
    assert "no-such-model" in finding.what


def test_nothing_is_imported_from_the_working_directory(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job()
    (tmp_path / "transformers.py").write_text("raise SystemExit('not mine')")
    monkeypatch.chdir(tmp_path)
    size = find_size(job, 120)
    assert size is not None
    assert size.num_parameters


def test_a_process_that_fails_is_told_with_its_last_words(
    make_job: MakeJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'libcuda is broken' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    (finding,) = judge_size(find_size(make_job(), 120))
    assert finding.severity == "error"
    assert "the model cannot be looked at: libcuda is broken" in finding.what


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({}, "'SLURM_JOB_NODELIST' is not set"),
        ({"SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_ON_NODE": "gpu:2"}, "could not convert string to float"),
        ({"SLURM_JOB_NODELIST": "n1"}, "srun"),
    ],
)
def test_a_slurm_that_is_half_there_is_not_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], problem: str
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$2" = job ] && echo JobState=RUNNING || echo n1\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    environment = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "PATH": str(tmp_path)} | variables
    with find_group(environment) as group:
        (finding,) = group.findings
        assert finding.severity == "unchecked"
        assert problem in finding.what
        assert group.where == "this machine"


def test_what_takes_too_long_is_not_checked(make_job: MakeJob) -> None:
    assert [finding.severity for finding in judge_size(find_size(make_job(), 0.01))] == ["unchecked"]


def test_a_run_takes_the_checkpoints_that_are_kept_and_its_model(write_job: WriteJob) -> None:
    job = load_job(write_job(), ["checkpoint.keep=3"]).config
    assert estimate_disk_needs(job, 1000) == {"runs": 5 * 12_000 + 8_000}
    job = load_job(write_job(), ["checkpoint.keep=3", "checkpoint.path=/elsewhere"]).config
    assert estimate_disk_needs(job, 1000) == {"checkpoints": 60_000, "runs": 8_000}
