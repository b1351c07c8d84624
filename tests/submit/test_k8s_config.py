"""What a job file may say about Kubernetes, and what a wrong one is told."""

import re

import pytest

from clm_dist.config.load import load_job
from clm_dist.errors import ConfigError
from clm_dist.submit.k8s.render import check_job
from clm_dist.submit.k8s.request import Code, Request, hosts_of
from tests.conftest import ROOT
from tests.submit.test_k8s import job_of, k8s_job


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("a" * 48, "47 at most"),
        ("Eli5", "small letters"),
        ("5eli", "a letter"),
        ("eli_5", "small letters"),
        ("eli5-", "ends with a dash"),
    ],
)
def test_a_name_that_kubernetes_does_not_take_is_refused(name: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        check_job(job_of("eli5-full", f"name={name}"), Request())
    assert error.value.field == "name"


def test_a_job_without_an_image_or_a_token_to_push_with_is_refused() -> None:
    with pytest.raises(ConfigError, match="no image is named"):
        check_job(load_job(ROOT / "jobs" / "eli5-full.yaml").config, Request())
    with pytest.raises(ConfigError, match="the pods have no token"):
        check_job(job_of("eli5-full", "hub.push=end"), Request())
    with pytest.raises(ConfigError, match="sets PYTHONPATH, which --sync needs"):
        check_job(k8s_job("env={PYTHONPATH: /x}"), Request(code=Code("YQ==", "1a2b")))


def test_workers_that_do_not_fit_the_pods_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"16 x 1 GPUs do not fit 2 x 4 .*; take --pods 4 or --set cluster.workers=8"):
        check_job(k8s_job("gpus_per_pod=4"), Request())
    assert hosts_of(k8s_job("pods=3").cluster).idle_gpus == 8


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("queue=''", "pattern"),
        ("scheduler=volcano", "cluster.k8s.scheduler does not exist any more; remove it"),
        ("memory_per_pod=512Mi", "less than 1Gi"),
        ("memory_per_pod=16GB", "not a Kubernetes quantity"),
        ("mount=shared", "pattern"),
        ("claim=My_Claim", "pattern"),
        ("env={HF_TOKEN: hf_x}", "the variable HF_TOKEN would be visible to everyone who may list pods"),
        ("env={CLM_DIST_STATE: /x}", "CLM_DIST_STATE is set by clm-dist"),
        ("tolerations=[{keys: x}]", "keys is not a key of a toleration"),
        ("grace_s=10", "60"),
        ("podz=2", "pods"),
    ],
)
def test_a_wrong_field_says_what_is_wrong(setting: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        k8s_job(setting)
