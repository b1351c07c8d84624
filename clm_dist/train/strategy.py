"""How weights, gradients and optimizer live on the ranks: DDP, DeepSpeed ZeRO 1 to 3, FSDP2, behind one interface.

Everything that differs between them is in this file. Three promises hold for each: the gradient of a step is the mean
over the ranks of what each of them passed to `backward`, the norm that `step` returns is that of the whole gradient,
the same on every rank, and `fragments` are all that changes in training, so that a checkpoint of one strategy and
number of workers loads into any other. `check_gradients_are_shared` tries the first before any step is trained.
"""

import contextlib
import gc
import logging
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.train.checkpoint import Fragment
from clm_dist.train.model import autocast

logger = logging.getLogger(__name__)

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
REPORT_FAULT = (
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
    def step(self, learning_rate: float, *, drop: bool = False) -> float:
        """Clip, update the weights, forget the gradient; gives the gradient's 2-norm before clipping.

        Args:
            drop: update nothing. Nor is anything updated where the norm is not finite.
        """

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU of rank 0; anything on the others."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter and saved buffer of the whole model. Not collective."""
        # ZeRO-3 leaves an empty vector in a parameter's place and keeps its shape beside it.
        named = self.plain_model.named_parameters()
        shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named}
        return shapes | {name: tuple(buffer.shape) for name, buffer in self._buffers()}

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that belong to a checkpoint; they change in an update only, as far as they change."""
        saved = self.plain_model.state_dict().keys()
        return ((name, buffer) for name, buffer in self.plain_model.named_buffers() if name in saved)

    def fragments(self) -> list[Fragment]:
        """What this rank holds of weights, optimizer and buffers: views, which change with the next `step`."""
        buffers = [Fragment(name, 0, {"buffer": b.view(-1)}, replicated=True) for name, b in self._buffers()]
        return [*self._parameter_fragments(), *buffers]

    @abstractmethod
    def _parameter_fragments(self) -> Iterable[Fragment]: ...

    def apply_fragments(self, num_updates: int, scaler: Mapping[str, float]) -> None:
        """Compute from now on with what was written into the fragments.

        Args:
            num_updates: that the optimizer had made.
            scaler: what `scaler_state` gave.
        """
        for state in self._adam.state.values():
            state["step"].fill_(num_updates)

    @property
    def num_updates(self) -> int:
        """Updates that the optimizer made. Not collective."""
        return max((int(state["step"]) for state in self._adam.state.values() if "step" in state), default=0)

    def scaler_state(self) -> dict[str, float]:
        """State of the loss scaler; empty where there is none. Not collective."""
        return {}

    @property
    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer itself."""
        return self.optimizer

    def _adam_fragment(self, name: str, start: int, parameter: Any, part: slice, **options: Any) -> Fragment:
        """A part of a parameter of the optimizer, with its moments: zeros before the first update, as AdamW begins.

        Args:
            name: the model's parameter, of which the part begins at the element `start`.
        """
        state = self._adam.state[parameter]
        if not state:
            device = parameter.device
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors = {"weight": parameter, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
        flat = {kind: _local(tensor.detach()).view(-1)[part] for kind, tensor in tensors.items()}
        return Fragment(name, start, flat, **options)

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
    def gradient_norm(self) -> float:
        """The 2-norm of the gradient as the optimizer would see it, which is forgotten."""

    def check_gradients_are_shared(self, loss_of: Callable[[nn.Module], Tensor]) -> None:
        """Raise RunError unless the mean over the ranks is taken of what each passes to `backward`.

        Called before weights or optimizer are loaded. A gradient that only rank 0 has, times the number of ranks, must
        come out as the one that all have: without the mean, what a rank's optimizer sees is either too much or nothing.

        Args:
            loss_of: the loss of the same block, on every rank.
        """
        if self.world_size == 1:
            return
        passes = min(2, self._job.batch.passes_per_step(self.world_size))

        def norm(scale: float) -> float:
            for number in range(passes):
                with self.one_pass(last=number == passes - 1) as model:
                    # An accumulated pass must not be lost, nor one that adds nothing change it.
                    self.backward(loss_of(model) * (scale if number == 0 else 0.0))
            return self.gradient_norm()

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
                f"when all {self.world_size} ranks have it. Nothing was trained. {REPORT_FAULT}"
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

    def step(self, learning_rate: float, *, drop: bool = False) -> float:
        self._set_learning_rate(learning_rate)
        limit = float("inf") if self._max_norm is None else self._max_norm
        scaler = self.accelerator.scaler
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), limit))
        self._check_norm(norm)
        if drop:
            if scaler is not None:
                scaler.update()
        elif math.isfinite(norm) or scaler is not None:
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
                f"of {self.world_size} ranks {mean:.6g}; nothing was saved since. {REPORT_FAULT}"
            )

    def gradient_norm(self) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return float(norm)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self._job.train.precision, self.device)

    def full_weights(self) -> dict[str, Tensor]:
        return {name: weight.cpu() for name, weight in self.plain_model.state_dict().items()}

    @property
    def _adam(self) -> torch.optim.Optimizer:
        adam: torch.optim.Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]  # Accelerate wraps it
        return adam

    def _parameter_fragments(self) -> Iterable[Fragment]:
        for name, parameter in self.plain_model.named_parameters():
            if parameter.requires_grad:
                yield self._adam_fragment(name, 0, parameter, slice(None), replicated=True)

    def apply_fragments(self, num_updates: int, scaler: Mapping[str, float]) -> None:
        super().apply_fragments(num_updates, scaler)
        if self.accelerator.scaler is not None and scaler:
            self.accelerator.scaler.load_state_dict(dict(scaler))

    def scaler_state(self) -> dict[str, float]:
        return {} if self.accelerator.scaler is None else dict(self.accelerator.scaler.state_dict())


class Zero(Strategy):
    """DeepSpeed ZeRO 1, 2 and 3, through Accelerate (Rajbhandari et al. 2020)."""

    _drop = False

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
            "gradient_accumulation_steps": job.batch.passes_per_step(self.world_size),
            "gradient_clipping": job.train.max_grad_norm or 0.0,
            "zero_optimization": zero,
            # Without the check a gradient that is not finite would be applied.
            "bf16": {"enabled": job.train.precision == "bf16", "check_grad_overflow": True},
            "fp16": {"enabled": job.train.precision == "fp16"},
            "zero_allow_untested_optimizer": True,
            # DeepSpeed's own CPU Adam would be compiled at first use.
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 10**9,
        }

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.optimizer = make_optimizer(model)
        update = self.optimizer.step

        def step() -> None:
            if not self._drop:
                update()

        # The engine forgets a gradient in its own step only, and calls the optimizer's there.
        self.optimizer.step = step  # type: ignore[method-assign, assignment]
        # DeepSpeed's engine is the model and steps the optimizer.
        self.model, _ = self.accelerator.prepare(model, self.optimizer)

    @contextlib.contextmanager
    def one_pass(self, *, last: bool) -> Iterator[nn.Module]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield self.model

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, learning_rate: float, *, drop: bool = False) -> float:
        self._set_learning_rate(learning_rate)
        self._drop = drop
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def gradient_norm(self) -> float:
        return self.step(0.0, drop=True)

    def full_weights(self) -> dict[str, Tensor]:
        weights = self.accelerator.get_state_dict(self.model)
        return {name: weight.cpu() for name, weight in (weights or {}).items()}

    @property
    def _adam(self) -> torch.optim.Optimizer:
        adam: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return adam

    def _parameter_fragments(self) -> Iterable[Fragment]:
        zero = self._engine.optimizer
        for name, parameter in self._engine.module.named_parameters():
            if not parameter.requires_grad:
                continue
            if self._stage == 3:
                # Every rank has an equal part, so the end of the last parts is filling.
                group, begin, size = zero.grad_position[zero.get_param_id(parameter)]
                start = min(self.rank * size, parameter.ds_numel)
                size = min(size, parameter.ds_numel - start)
                flat = zero.fp32_partitioned_groups_flat[group]
            else:
                # All parameters of a group lie one after the other, and every rank has an equal part of that.
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                start, begin = mapping.lp_fragment_address.start, mapping.hp_fragment_address.start
                size = mapping.hp_fragment_address.numel
                flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
            yield self._adam_fragment(name, start, flat, slice(begin, begin + size))

    def apply_fragments(self, num_updates: int, scaler: Mapping[str, float]) -> None:
        super().apply_fragments(num_updates, scaler)
        zero = self._engine.optimizer
        for key, value in scaler.items():
            setattr(zero.loss_scaler, key, value)
        # What passes compute with is a copy of the optimizer's weights; these are the ends of DeepSpeed's own steps.
        if self._stage == 3:
            zero._partition_all_parameters()
            for group in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
            zero._post_step(set())
        else:
            zero.update_lp_params()

    def scaler_state(self) -> dict[str, float]:
        if self._job.train.precision != "fp16":
            return {}
        return {key: v for key, v in vars(self._engine.optimizer.loss_scaler).items() if isinstance(v, int | float)}

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
        # Named here: after an evaluation some modules show whole weights in the place of shards.
        self._shards = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.model)

    def step(self, learning_rate: float, *, drop: bool = False) -> float:
        self._set_learning_rate(learning_rate)
        limit = float("inf") if self._max_norm is None else self._max_norm
        sharded_norm: Any = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        norm = float(sharded_norm.full_tensor())
        if math.isfinite(norm) and not drop:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def gradient_norm(self) -> float:
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

    def _parameter_fragments(self) -> Iterable[Fragment]:
        for name, parameter in self._shards.items():
            # Rows, as torch.chunk deals them out.
            rows, row_size = parameter.shape[0], math.prod(parameter.shape[1:])
            first = min(self.rank * -(-rows // self.world_size), rows)
            yield self._adam_fragment(name, first * row_size, parameter, slice(None))

    def release(self) -> None:
        del self._shards
        super().release()


def _local(tensor: Any) -> Tensor:
    """This rank's shard of a tensor, or the tensor where it is not sharded."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


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
