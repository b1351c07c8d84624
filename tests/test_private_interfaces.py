"""What is used of libraries beyond their interfaces: in one module each, and still there.

Where one of these fails after an upgrade, the library has moved what the named module uses; mend that module.
"""

import inspect
import re
from pathlib import Path

import pytest
import ray

PACKAGE = Path(__file__).resolve().parent.parent / "clm_dist"
USES = {
    r"ray\._private|ray\._raylet|ray\.train\.v2\._internal|AutoscalingCoordinator|_base_exc": "train/ray/private.py",
    r"torch\._C|_distributed_c10d": "train/heartbeat.py",
    r"__compatible_ops__|_hp_mapping|_partition_all_parameters|single_partition_of_fp32_groups": (
        "train/strategies/zero.py"
    ),
    r"LinearFunctionForZeroStage3|PreBackwardFunctionForModule": "train/loss.py",
    r"AcceleratorState": "train/strategies/environment.py",
    r"_attn_implementation": "train/attention.py",
    r"_no_split_modules": "train/strategies/fsdp2.py",
    r"torch\._subclasses": "train/unused.py",
    r"\._sample\b": "pretrained/decoding.py",
}


@pytest.mark.parametrize("names", USES)
def test_a_private_interface_is_used_in_one_module(names: str) -> None:
    users = {
        str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if re.search(names, file.read_text("utf-8"))
    }
    assert users == {USES[names]}


def test_ray_has_what_is_used_of_it() -> None:
    from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerCallback, WorkerGroupCallback

    where = "see clm_dist/train/ray/private.py and callbacks.py"
    assert callable(ray._private.worker.print_to_stdstream), where
    assert callable(ray._private.state.GlobalState.get_draining_nodes), where
    assert hasattr(ray._private.worker, "_global_node"), where
    for callback, hooks in (
        (WorkerCallback, ("after_init_train_context", "before_worker_shutdown")),
        (
            WorkerGroupCallback,
            (
                "before_worker_group_start",
                "before_init_train_context",
                "after_worker_group_training_start",
                "before_worker_group_shutdown",
            ),
        ),
        (
            ControllerCallback,
            ("before_controller_execute_failure_decision", "before_controller_execute_resize_decision"),
        ),
    ):
        for hook in hooks:
            assert hasattr(callback, hook), f"{callback.__name__}.{hook} has moved; {where}"


def test_ray_train_takes_its_parts_from_where_they_are_taken_out() -> None:
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
    from ray.train.v2.api import data_parallel_trainer

    from clm_dist.train.ray.private import LeanTrainer

    where = "see LeanTrainer in clm_dist/train/ray/private.py"
    scaling = ScalingConfig(num_workers=1)
    plain = [type(one) for one in TorchTrainer(print, scaling_config=scaling)._create_default_callbacks()]
    for alone, without in ((False, {DatasetsCallback}), (True, {DatasetsCallback, PlacementGroupCleanerCallback})):
        assert without <= set(plain), where
        trainer = LeanTrainer(print, scaling_config=scaling, alone=alone)
        kept = [kind for kind in plain if kind not in without]
        assert [type(one) for one in trainer._create_default_callbacks()] == kept, where
    fit = inspect.getsource(data_parallel_trainer.DataParallelTrainer.fit)
    assert "self._initialize_and_run_controller(" in fit, where
    assert "scaling_policy=" in fit, where
    for hook in ("after_controller_start", "_maybe_send_resource_request"):
        assert "oordinator" in inspect.getsource(getattr(FixedScalingPolicy, hook)), where


def test_ray_knows_the_variables_that_are_set_for_it() -> None:
    from ray.train.v2._internal.constants import ENABLE_PREEMPTION_WATCHER_ENV_VAR

    assert ENABLE_PREEMPTION_WATCHER_ENV_VAR == "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "see clm_dist/train/ray/own.py"
    raylet = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
    assert b"prestart_worker_first_driver" in raylet.read_bytes(), "see clm_dist/train/ray/own.py"


def test_the_errors_of_workers_are_found_in_what_ray_train_raises() -> None:
    from ray.train.v2._internal.exceptions import UserExceptionWithTraceback

    from clm_dist.train.ray.private import own_error

    error = ValueError("own")
    in_task = ray.exceptions.RayTaskError("\x1b[36mray::f()\x1b[39m", "Traceback ...", error).as_instanceof_cause()
    assert own_error(UserExceptionWithTraceback(error, "Traceback ...")) is error
    assert own_error(UserExceptionWithTraceback(in_task, "Traceback ...")) is error
    assert own_error(in_task) is error
    assert own_error(error) is error


def test_processes_of_ray_are_found() -> None:
    from ray._private import ray_constants, services

    where = "see clm_dist/train/ray/private.py"
    assert (ray_constants.PROCESS_TYPE_RAYLET, ray_constants.PROCESS_TYPE_GCS_SERVER) == ("raylet", "gcs_server"), where
    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process), where
    assert "ray_constants.ENABLE_RAY_CLUSTER" in inspect.getsource(services.get_node_ip_address), where
    assert ray._private.worker.shutdown is ray.shutdown, where
    assert "ray._private.parameter.RayParams(" in inspect.getsource(ray.init), where
    settings = {"dashboard_agent_listen_port", "include_log_monitor", "no_monitor"}
    assert settings <= inspect.signature(ray._private.parameter.RayParams).parameters.keys(), where
    assert "self.start_api_server(" in inspect.getsource(ray._private.node.Node), where
    assert hasattr(ray._private.node.Node, "get_gcs_client"), where


def test_transformers_hands_over_what_is_made_before_it_samples() -> None:
    from transformers import GenerationMixin

    where = "see clm_dist/pretrained/decoding.py"
    taken = {"input_ids", "logits_processor", "stopping_criteria", "generation_config", "streamer"}
    assert taken <= inspect.signature(GenerationMixin._sample).parameters.keys(), where


def test_torch_records_collectives() -> None:
    from torch._C import _distributed_c10d

    assert hasattr(_distributed_c10d, "_dump_fr_trace"), "torch's flight recorder has moved; see train/heartbeat.py"


def test_deepspeed_has_what_is_used_of_it() -> None:
    import deepspeed
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    where = "see clm_dist/train/strategies/zero.py"
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__, where
    third = ("_partition_all_parameters", "_reassign_or_swap_out_partitioned_parameters", "_post_step", "get_param_id")
    for optimizer, names in ((DeepSpeedZeroOptimizer_Stage3, third), (DeepSpeedZeroOptimizer, ("update_lp_params",))):
        for name in names:
            assert hasattr(optimizer, name), f"{optimizer.__name__}.{name} has moved; {where}"


def test_torch_has_tensors_without_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    assert "allow_non_fake_inputs" in inspect.signature(FakeTensorMode).parameters, "see clm_dist/train/unused.py"


def test_accelerate_forgets_its_state() -> None:
    from accelerate.state import AcceleratorState

    parameters = inspect.signature(AcceleratorState._reset_state).parameters
    assert "reset_partial_state" in parameters, "see clm_dist/train/strategies/environment.py"
