"""CPUs and GPUs that a run needs: there are too few, or others hold them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray

from clm_dist.config.job import ClusterConfig
from clm_dist.errors import ConfigError, NotReadyError
from clm_dist.train.ray.cluster import _check_resources
from tests.conftest import MakeJob
from tests.support.notes import Notes
from tests.train.test_driver import fit

__all__ = ["fit"]


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_some_precisions_need_gpus(
    precision: str, fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=rf"train.precision {precision} needs GPUs; use fp32 or bf16"):
        fit(make_job(f"train.precision={precision}"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_workers_must_fit_on_nodes() -> None:
    cluster = ClusterConfig(workers=3, cpus_per_worker=2)
    nodes = [{"CPU": 3.0}, {"CPU": 3.0, "memory": 1.0}]
    with pytest.raises(ConfigError, match=r"has 6 on 2 nodes, which fit 2 workers; set cluster.workers to 2 or less"):
        _check_resources(cluster, nodes, local=False)
    assert _check_resources(cluster, [*nodes, {"CPU": 2.0}], local=False) == 0
    assert _check_resources(ClusterConfig(workers=2), [{"CPU": 8.0, "GPU": 2.0}, {}], local=False) == 1
    with pytest.raises(ConfigError, match=r"need 3, the Ray cluster has 0; use a cluster with CPUs"):
        _check_resources(ClusterConfig(workers=3), [{}], local=False)
    # Of a range the fewest must fit; of nodes that come later nothing is known.
    assert _check_resources(ClusterConfig(workers=(2, 8), cpus_per_worker=2), nodes, local=False) == 0
    with pytest.raises(ConfigError, match=r"cluster.workers 3 x 2 CPU need 6, .* set cluster.workers to 2 or less"):
        _check_resources(ClusterConfig(workers=(3, 8), cpus_per_worker=2), nodes, local=False)


_HOLDER = """
import sys, time
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
group = ray.util.placement_group([{"CPU": float(sys.argv[2])}], name="theirs")
ray.get(group.ready())
print("holds", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_ray_whose_cpus_another_holds_is_named_and_tried_again(
    fit: Callable[..., dict[str, Any]], make_job: MakeJob, tmp_path: Path
) -> None:
    address, num_cpus = ray.get_runtime_context().gcs_address, ray.cluster_resources()["CPU"]
    command = [sys.executable, "-c", _HOLDER, address, str(num_cpus)]
    # As this process started it: with its token, and on 127.0.0.1.
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert holder.stdout and holder.stdout.readline() == "holds\n"
    words = (
        f"cluster.workers 1 x 1 CPU need 1, and 0 of {num_cpus:g} in the Ray cluster are free; the others are held by "
        f"placement group theirs ({num_cpus:g} CPU)"
    )
    progress = Notes()
    try:
        with pytest.raises(NotReadyError) as ended:
            fit(make_job("train.start_timeout_s=30"), tmp_path / "run", progress=progress)
    finally:
        holder.kill()
        holder.communicate()
    assert f"no worker began to train within train.start_timeout_s (30 s): {words}" in str(ended.value)
    assert ended.value.exit_code == 75
    assert f"Waiting for resources: {words}, for 30 s at most (train.start_timeout_s)" in progress.notes
