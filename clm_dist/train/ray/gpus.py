"""Whether the torch of each node can use the GPUs that Ray gives there, before workers start."""

import logging
import time
from collections.abc import Sequence

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from clm_dist.errors import ConfigError
from clm_dist.train.cuda import find_problem

logger = logging.getLogger(__name__)

_TIMEOUT_S = 60


def check_gpus(nodes: Sequence[str]) -> None:
    """Raise ConfigError where torch cannot use the GPUs of one of these nodes, named by their ids in Ray."""
    # A process that has asked the driver sees all GPUs from then on, so no worker may be one of these.
    ask = ray.remote(num_cpus=0, max_retries=0, max_calls=1)(find_problem)
    answers = {
        node: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)) for node in nodes
    }
    waiting = {node: answer.remote() for node, answer in answers.items()}
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    deadline = time.monotonic() + _TIMEOUT_S
    for node, answer in waiting.items():
        try:
            problem = ray.get(answer, timeout=max(0, deadline - time.monotonic()))
        except ray.exceptions.RayError as error:
            # The node may be gone, or have no clm-dist: the start of the workers says that.
            logger.debug("node %s does not say whether its GPUs can be used", node, exc_info=error)
            continue
        if problem:
            raise ConfigError(
                f"node {addresses[node]}: {problem}, and the job takes GPUs; install there a torch for its GPUs "
                "(https://pytorch.org/get-started/locally), or set cluster.gpus_per_worker to 0 to train on CPUs",
                field="cluster.gpus_per_worker",
            )
