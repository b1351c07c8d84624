"""A torch that cannot use the GPUs of its node is named before workers start."""

import ctypes
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clm_dist.config.job import ClusterConfig
from clm_dist.errors import ConfigError
from clm_dist.train.cuda import find_problem
from clm_dist.train.ray import cluster as cluster_module
from clm_dist.train.ray.cluster import Cluster, start_ray, this_node
from clm_dist.train.ray.gpus import check_gpus


class Driver:
    """NVIDIA's driver."""

    def __init__(self, code: int, version: int) -> None:
        self._code, self._version = code, version

    def cuInit(self, _: int) -> int:
        return self._code

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self._version
        return 0


@pytest.mark.parametrize(
    ("built", "driver", "problem"),
    [
        ("cuda = None\nhip = None", None, "torch 2.13.0+x has no CUDA"),
        ("cuda = '13.0'\nhip = None", None, "torch 2.13.0+x needs NVIDIA's driver, and libcuda.so.1 is not there"),
        ("cuda = '13.0'\nhip = None", Driver(803, 13000), "NVIDIA's driver does not start (cuInit returns 803)"),
        (
            "cuda = '13.0'\nhip = None",
            Driver(0, 12040),
            "torch 2.13.0+x needs a driver for CUDA 13.0, and this one is for 12.4",
        ),
        ("cuda = '12.8'\nhip = None", Driver(0, 12040), None),
        ("cuda = '13.0'", Driver(0, 13010), None),
        ("cuda = None\nhip = '7.0'", None, None),
    ],
)
def test_what_keeps_torch_from_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: str, driver: Driver | None, problem: str | None
) -> None:
    def load(_: str) -> Driver:
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0+x'\n{built}\n")
    found = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: found)
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_problem() == problem


def test_a_node_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert find_problem() == "torch is not installed"


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="this torch has GPUs")
def test_each_node_is_asked(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    check_gpus([])
    gpus = {this_node(): {"CPU": 2.0, "GPU": 1.0}}
    with monkeypatch.context() as patch:
        patch.setattr(cluster_module, "alive_nodes", lambda: gpus)
        with pytest.raises(ConfigError, match="has no CUDA"), start_ray(ClusterConfig()):
            pass
        with start_ray(ClusterConfig(gpus_per_worker=0)) as started:
            assert started.num_gpus_per_worker == 0
    with pytest.raises(ConfigError) as said:
        check_gpus([this_node()])
    assert said.value.field == "cluster.gpus_per_worker"
    assert str(said.value).startswith(f"node 127.0.0.1: torch {torch.__version__} has no CUDA, and the job takes GPUs;")
