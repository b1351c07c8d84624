"""How weights, gradients and optimizer live on the ranks: DDP, DeepSpeed ZeRO 1 to 3, FSDP2, behind one interface.

Everything that differs between them is in this file. Two promises hold for each: the gradient of a step is the mean
over the ranks of what each of them passed to `backward`, and the norm that `step` returns is that of the whole
gradient, the same on every rank. `check_gradients_are_shared` tries the first before any step is trained.
"""

import contextlib
import gc
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clm_dist.config import JobConfig
from clm_dist.errors import CheckpointError, RunError
from clm_dist.train.model import autocast

logger = logging.getLogger(__name__)

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_REPORT_FAULT = (
    "This is a fault of the installation or of clm-dist, not of the job: please report it with the output of pip list"
)


def set_up_worker(*, rank: int, world_size: int, use_gpu: bool, num_threads: int) -> None:
    """The one place that sets the environment of torch, Accelerate and DeepSpeed for a worker."""
    torch.set_num_threads(num_threads)
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", str(world_size))
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(world_size))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    # The job alone decides; what a shell or `accelerate config` left behind must not.
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "FSDP_"))]:
        del os.environ[name]
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    if not use_gpu:
        # DeepSpeed takes a GPU that it sees, whatever the job says.
        os.environ["DS_ACCELERATOR"] = "cpu"
    if not dist.is_initialized():
        if world_size != 1:
            raise RunError(f"worker {rank} of {world_size} has no process group; the launcher must create one")
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", store=store, rank=0, world_size=1)


class Strategy(ABC):
    """A model and its optimizer on this rank. Every method is collective unless it says otherwise."""

    sharded = False
    """Whether weights are sharded, so that a forward pass needs every rank."""

    def __init__(self, job: JobConfig, *, rank: int, world_size: int, use_gpu: bool) -> None:
        self.rank, self.world_size = rank, world_size
        self._job = job
        self._use_gpu = use_gpu
        self._max_norm = job.train.max_grad_norm
        self.accelerator = self._build_accelerator()
        self.device: torch.device = self.accelerator.device
        if use_gpu:
            # Object collectives and seeds go to the current device.
            torch.cuda.set_device(self.device)
        self.model: nn.Module
        self.optimizer: torch.optim.Optimizer
        self._check_world()

    @abstractmethod
    def _build_accelerator(self) -> Any: ...

    @abstractmethod
    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        """Spread the model over the ranks, and its optimizer with it.

        The model must have been loaded after this object was made, because ZeRO-3 shards on loading.
        """

    @contextlib.contextmanager
    def one_pass(self, *, last: bool) -> Iterator[nn.Module]:
        """The model for one forward and backward pass; `last` is the one after which gradients are complete."""
        yield self.model

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; over the ranks the mean is taken."""
        loss.backward()  # type: ignore[no-untyped-call]

    @abstractmethod
    def step(self, learning_rate: float) -> float:
        """Clip, update the weights, forget the gradient; gives the gradient's 2-norm before clipping.

        With a norm that is not finite nothing is updated, but ZeRO, which only then knows it, has updated in fp32 and
        bf16.
        """

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU of rank 0; anything on the others."""

    @abstractmethod
    def save(self, directory: Path) -> None:
        """Write this rank's share of model and optimizer."""

    @abstractmethod
    def load(self, directory: Path) -> None:
        """Read what `save` wrote. Raises CheckpointError where it was written for another number of workers."""

    @property
    def plain_model(self) -> nn.Module:
        """The transformers model itself; not collective unless sharded."""
        module: nn.Module = self.accelerator.unwrap_model(self.model)
        return module

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The arithmetic of a forward pass outside of `one_pass`."""
        return contextlib.nullcontext()

    def release(self) -> None:
        """Give the memory of model and optimizer back."""
        del self.model, self.optimizer
        self.accelerator.free_memory()
        gc.collect()
        if self._use_gpu:
            torch.cuda.empty_cache()

    def all_reduce(self, values: list[float]) -> list[float]:
        """The sums of each value over the ranks, in float64."""
        if self.world_size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @abstractmethod
    def forget_gradient(self) -> float:
        """The 2-norm of the gradient as the optimizer would see it; it is dropped, and nothing is updated."""

    def check_gradients_are_shared(self, loss_of: Callable[[nn.Module], Tensor]) -> None:
        """Raise RunError unless the mean over the ranks is taken of what each passes to `backward`.

        Called before weights or optimizer are loaded. A gradient that only rank 0 has, times the number of ranks, must
        come out as the one that all have: without the mean, what a rank's optimizer sees is either too much or nothing.

        Args:
            loss_of: the loss of the same block, on every rank.
        """
        if self.world_size == 1:
            return
        passes = min(2, self._job.passes_per_step)

        def norm(scale: float) -> float:
            for number in range(passes):
                with self.one_pass(last=number == passes - 1) as model:
                    # An accumulated pass must not be lost, nor one that adds nothing change it.
                    self.backward(loss_of(model) * (scale if number == 0 else 0.0))
            return self.forget_gradient()

        of_one, of_all = norm(float(self.world_size) if self.rank == 0 else 0.0), norm(1.0)
        finite = math.isfinite(of_one + of_all)
        # Rounding is all that may differ; bf16 keeps 8 bits.
        shared = finite and math.isclose(of_one, of_all, rel_tol=1e-2) and of_all > 0
        num_shared, num_finite = self.all_reduce([float(shared), float(finite)])
        if num_shared == self.world_size:
            return
        if num_finite:
            raise RunError(
                f"the ranks do not share their gradients: one rank's gradient has norm {of_one:.6g}, and {of_all:.6g} "
                f"when all {self.world_size} ranks have it. Nothing was trained. {_REPORT_FAULT}"
            )
        if self._job.train.precision != "fp16":
            raise RunError(
                "the gradient of the first block is not finite before anything was trained: the weights of the model "
                "are broken; get them again, or name another model"
            )
        logger.warning("whether the ranks share their gradients could not be seen: they overflow in fp16")

    def _check_world(self) -> None:
        """Accelerate falls back to a single process without a word; then every rank would train alone."""
        seen = (self.accelerator.num_processes, self.accelerator.process_index)
        if seen != (self.world_size, self.rank) or dist.get_world_size() != self.world_size:
            raise RunError(
                f"worker {self.rank} of {self.world_size} sees itself as process {seen[1]} of {seen[0]} "
                f"(torch.distributed: {dist.get_world_size()}); it would train alone, so the run stops"
            )

    def _set_learning_rate(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate


class DataParallel(Strategy):
    """Every rank holds everything; gradients are averaged (torch's DistributedDataParallel, through Accelerate)."""

    def _build_accelerator(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        return Accelerator(
            cpu=not self._use_gpu,  # on CPU anything else silently gives no distribution
            mixed_precision=_MIXED_PRECISION[self._job.train.precision],
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.model = self.accelerator.prepare(model)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.model))

    @contextlib.contextmanager
    def one_pass(self, *, last: bool) -> Iterator[nn.Module]:
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield self.model

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self, learning_rate: float) -> float:
        self._set_learning_rate(learning_rate)
        limit = float("inf") if self._max_norm is None else self._max_norm
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        self._check_norm(norm)
        if math.isfinite(norm) or self.accelerator.scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _check_norm(self, norm: float) -> None:
        """Raise RunError unless every rank has the same norm, as ranks do whose weights and gradients are the same."""
        finite = math.isfinite(norm)
        norm = norm if finite else 0.0
        norms, squares, num_finite = self.all_reduce([norm, norm * norm, float(finite)])
        mean = norms / self.world_size
        variance = squares / self.world_size - mean * mean
        if num_finite not in (0, self.world_size) or variance > (1e-5 * mean) ** 2 + 1e-24:
            raise RunError(
                f"the ranks do not share their gradients any more: this rank's gradient norm is {norm:.6g}, the mean "
                f"of {self.world_size} ranks {mean:.6g}; nothing was saved since. {_REPORT_FAULT}"
            )

    def forget_gradient(self) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return float(norm)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self._job.train.precision, self.device)

    def full_weights(self) -> dict[str, Tensor]:
        return {name: weight.cpu() for name, weight in self.plain_model.state_dict().items()}

    def save(self, directory: Path) -> None:
        if self.rank == 0:
            state: dict[str, Any] = {
                "model": self.plain_model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
            if self.accelerator.scaler is not None:
                state["scaler"] = self.accelerator.scaler.state_dict()
            torch.save(state, directory / "state.pt")

    def load(self, directory: Path) -> None:
        state = torch.load(directory / "state.pt", map_location="cpu", weights_only=True, mmap=True)
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])


class Zero(Strategy):
    """DeepSpeed ZeRO 1, 2 and 3, through Accelerate (Rajbhandari et al. 2020)."""

    @property
    def _stage(self) -> int:
        return int(self._job.cluster.strategy.removeprefix("zero"))

    def _build_accelerator(self) -> Any:
        import deepspeed
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        # The op would be compiled at first use, a minute or more, and gloo does its work as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.sharded = self._stage == 3
        return Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._deepspeed_config()),
            mixed_precision=_MIXED_PRECISION[self._job.train.precision],
            # Told nothing, DeepSpeed takes NCCL or no group at all on CPU, and each rank trains alone.
            kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if self._use_gpu else "gloo")],
        )

    def _deepspeed_config(self) -> dict[str, Any]:
        job = self._job
        zero: dict[str, Any] = {"stage": self._stage}
        if job.cluster.offload != "none":
            zero["offload_optimizer"] = {"device": "cpu"}
        if job.cluster.offload == "all":
            zero["offload_param"] = {"device": "cpu"}
        if self._stage == 3:
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        return {
            "train_micro_batch_size_per_gpu": job.batch.micro_size,
            "gradient_accumulation_steps": job.passes_per_step,
            "gradient_clipping": job.train.max_grad_norm or 0.0,
            "zero_optimization": zero,
            "bf16": {"enabled": job.train.precision == "bf16"},
            "fp16": {"enabled": job.train.precision == "fp16"},
            "zero_allow_untested_optimizer": True,
            # DeepSpeed's own CPU Adam would be compiled at first use.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.optimizer = make_optimizer(model)
        # DeepSpeed's engine is the model and steps the optimizer.
        self.model, _ = self.accelerator.prepare(model, self.optimizer)

    @contextlib.contextmanager
    def one_pass(self, *, last: bool) -> Iterator[nn.Module]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield self.model

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float) -> float:
        self._set_learning_rate(learning_rate)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def forget_gradient(self) -> float:
        # The engine forgets a gradient by a step only; at rate 0 it changes no weight.
        norm = self.step(0.0)
        for state in self._engine.optimizer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, Tensor):
                    value.zero_()
        return norm

    def full_weights(self) -> dict[str, Tensor]:
        weights = self.accelerator.get_state_dict(self.model)
        return {name: weight.cpu() for name, weight in (weights or {}).items()}

    def save(self, directory: Path) -> None:
        self._engine.save_checkpoint(str(directory), tag="zero")

    def load(self, directory: Path) -> None:
        loaded, _ = self._engine.load_checkpoint(str(directory), tag="zero")
        if loaded is None:
            raise CheckpointError(f"{directory} holds no DeepSpeed checkpoint")

    def release(self) -> None:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        self._engine.destroy()
        super().release()
        # Until then transformers shards every model that it loads.
        unset_hf_deepspeed_config()

    @property
    def _engine(self) -> Any:
        return self.model


class FullyShard(Strategy):
    """torch's own fully_shard (FSDP2): weights, gradients and optimizer are sharded.

    Accelerate's FSDP2 is fully_shard as well on GPUs and does nothing at all on CPU, so it is called here directly:
    one path, the same on both.
    """

    sharded = True

    def _build_accelerator(self) -> Any:
        from accelerate import Accelerator

        return Accelerator(cpu=not self._use_gpu)

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.model = shard(
            model,
            self.device,
            self.world_size,
            bf16=self._job.train.precision == "bf16",
            offload=self._job.cluster.offload == "all",
        )
        self.optimizer = make_optimizer(self.model)

    def step(self, learning_rate: float) -> float:
        self._set_learning_rate(learning_rate)
        limit = float("inf") if self._max_norm is None else self._max_norm
        sharded_norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = float(sharded_norm.full_tensor())
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def forget_gradient(self) -> float:
        norm: Any = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return float(norm.full_tensor())

    @property
    def plain_model(self) -> nn.Module:
        return self.model

    def full_weights(self) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(self.model, options=options)
        return dict(weights)

    def save(self, directory: Path) -> None:
        from torch.distributed.checkpoint.state_dict import get_state_dict
        from torch.distributed.checkpoint.state_dict_saver import save

        model, optimizer = get_state_dict(self.model, self.optimizer)
        save({"model": model, "optimizer": optimizer}, checkpoint_id=directory / "dcp")

    def load(self, directory: Path) -> None:
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
        from torch.distributed.checkpoint.state_dict_loader import load

        model, optimizer = get_state_dict(self.model, self.optimizer)
        load({"model": model, "optimizer": optimizer}, checkpoint_id=directory / "dcp")
        set_state_dict(self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer)


def shard(
    model: nn.Module, device: torch.device, world_size: int, *, bf16: bool = False, offload: bool = False
) -> nn.Module:
    """Shard a model's weights over all ranks, a transformer block at a time, and move the shards to the device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    settings: dict[str, Any] = {"mesh": init_device_mesh(device.type, (world_size,))}
    if bf16:
        settings["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if offload and device.type != "cpu":  # on a CPU they are in host memory already
        settings["offload_policy"] = CPUOffloadPolicy()
    block_names = set(getattr(model, "_no_split_modules", None) or ())
    for module in list(model.modules()):
        if type(module).__name__ in block_names:
            fully_shard(module, **settings)
    fully_shard(model, **settings)
    return model


def build_strategy(job: JobConfig, *, rank: int, world_size: int, use_gpu: bool) -> Strategy:
    """The job's strategy on this rank. Collective."""
    kinds: dict[str, type[Strategy]] = {"ddp": DataParallel, "fsdp2": FullyShard}
    kind = kinds.get(job.cluster.strategy, Zero)
    return kind(job, rank=rank, world_size=world_size, use_gpu=use_gpu)
