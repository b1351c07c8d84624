"""Variables that disturb a job, each with its effect; others are not named."""

from pathlib import Path

import pytest

from clm_dist.doctor.environment import Surroundings, is_offline, judge_environment, read_environment
from clm_dist.doctor.finding import Finding
from clm_dist.doctor.need import Need

HERE, ON_GPUS, JOINING = Surroundings(False, False), Surroundings(False, True), Surroundings(True, True)
PUSHING = Need((), models=("a/model",), pushes=True)


def judged(variables: dict[str, str], need: Need | None = None, where: Surroundings = HERE) -> list[Finding]:
    return list(judge_environment(read_environment(variables), need or Need(()), where))


@pytest.mark.parametrize(
    ("variables", "need", "where", "severity", "words"),
    [
        ({"RAY_TRAIN_V2_ENABLED": "0"}, None, HERE, "error", "turns off the Ray Train"),
        ({"CLM_DIST_NODES": "two"}, None, HERE, "error", "not a number"),
        ({"TMPDIR": "/nowhere/at/all"}, None, HERE, "warning", "not a directory"),
        ({"HF_HUB_OFFLINE": "1"}, PUSHING, HERE, "warning", "hub.push is not never"),
        ({"TRANSFORMERS_OFFLINE": "yes"}, PUSHING, HERE, "warning", "hub.push is not never"),
        ({"HF_ENDPOINT": "https://hub.example"}, None, HERE, "note", "hub.example"),
        ({"https_proxy": "http://p:3128"}, PUSHING, HERE, "note", "https_proxy=http://p:3128"),
        (
            {"RAY_grpc_enable_http_proxy": "1", "http_proxy": "http://p:3128"},
            None,
            HERE,
            "warning",
            "Ray's own connections go through it",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp16", "FSDP_STRATEGY": "x"}, None, HERE, "note", "no effect"),
        ({"NCCL_P2P_DISABLE": "1"}, None, ON_GPUS, "warning", "NCCL_P2P_DISABLE=1"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, None, ON_GPUS, "warning", "waits for each kernel"),
        ({"DS_ACCELERATOR": "cpu"}, None, ON_GPUS, "warning", "DS_ACCELERATOR=cpu"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, None, ON_GPUS, "note", "PYTORCH_CUDA_ALLOC_CONF=a:1"),
        ({"OMP_NUM_THREADS": "3"}, None, HERE, "note", "OMP_NUM_THREADS=3"),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}, None, HERE, "warning", "job 7 of 2 nodes"),
    ],
)
def test_what_disturbs_a_job_is_named(
    variables: dict[str, str], need: Need | None, where: Surroundings, severity: str, words: str
) -> None:
    (finding,) = judged(variables, need, where)
    assert finding.severity == severity
    assert words in finding.what + finding.why


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        # Ray Train sets them in each worker.
        ({"RANK": "3", "WORLD_SIZE": "9", "LOCAL_RANK": "1", "MASTER_ADDR": "nowhere", "MASTER_PORT": "1"}, HERE),
        # A Ray of a run's own sets it to the loopback interface.
        ({"GLOO_SOCKET_IFNAME": "ib9"}, HERE),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1"}, HERE),
        ({"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "RAY_ADDRESS": "10.0.0.1:6379"}, JOINING),
        ({"http_proxy": "http://p:3128"}, HERE),
        ({"HF_HUB_OFFLINE": "0", "RAY_TRAIN_V2_ENABLED": "1"}, HERE),
        ({"NCCL_P2P_DISABLE": "1", "DS_ACCELERATOR": "cpu"}, HERE),
        ({"OMP_NUM_THREADS": "1"}, JOINING),
    ],
)
def test_what_has_no_effect_is_not_named(variables: dict[str, str], where: Surroundings) -> None:
    assert [finding.severity for finding in judged(variables, where=where)] == ["ok"]


def test_passwords_of_proxies_and_tokens_are_not_kept() -> None:
    given = {"https_proxy": "http://bob:secret@p:3128", "HF_TOKEN": "hf_secret", "PATH": "/bin", "NCCL_DEBUG": "INFO"}
    assert read_environment(given) == {"https_proxy": "http://p:3128", "NCCL_DEBUG": "INFO"}


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("bob:secret@p:3128", "p:3128"),
        ("http://bob:se/cret@p:3128", "http://p:3128"),
        ("http://bob:se@cret@p:3128", "http://p:3128"),
        ("http://p:3128", "http://p:3128"),
    ],
)
def test_no_password_of_a_proxy_is_shown_however_it_is_written(value: str, shown: str) -> None:
    for name in ("http_proxy", "HTTPS_PROXY", "all_proxy", "HF_ENDPOINT"):
        assert read_environment({name: value}) == {name: shown}


def test_data_sets_have_an_offline_switch_of_their_own() -> None:
    assert is_offline({"HF_DATASETS_OFFLINE": "1"}, of_data=True)
    assert not is_offline({"HF_DATASETS_OFFLINE": "1"})
    assert not is_offline({"HF_DATASETS_OFFLINE": "0", "HF_HUB_OFFLINE": "1"}, of_data=True)


def test_ray_takes_no_other_word_for_yes() -> None:
    for value, severity in (("1", "ok"), ("true", "ok"), ("yes", "error"), ("0", "error")):
        assert [one.severity for one in judged({"RAY_TRAIN_V2_ENABLED": value})] == [severity]


@pytest.mark.parametrize(("value", "offline"), [("1", True), ("ON", True), ("0", False), ("", False)])
def test_offline_is_what_the_clients_take_for_it(value: str, offline: bool) -> None:
    assert is_offline({"HF_HUB_OFFLINE": value}) is offline


def test_a_directory_that_is_there_is_no_problem(tmp_path: Path) -> None:
    assert [finding.severity for finding in judged({"TMPDIR": str(tmp_path)})] == ["ok"]
