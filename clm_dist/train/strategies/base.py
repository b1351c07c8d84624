"""How weights, gradients and optimizer live on the ranks: the interface that every strategy fulfils.

All that differs between strategies is in this folder. Three promises hold for each: the gradient of a step is the mean
over the ranks of what each of them passed to `backward`; the norm that `step` returns is that of the whole gradient,
the same on every rank; and `fragments` are all that changes in training, so that a checkpoint of one strategy and
number of workers loads into any other. `first_step.py` tries the
first before any step is trained.
"""

import contextlib
import functools
import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor, nn

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError
from clm_dist.train.checkpointing.fragments import Fragment
from clm_dist.train.forward import WithLoss
from clm_dist.train.optimizers import first_state, states_of, why_not_saved

logger = logging.getLogger(__name__)


_Value = TypeVar("_Value")

MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]

MIXED_PRECISION = {"fp32": "no", "tf32": "no", "bf16": "bf16", "fp16": "fp16"}
REPORT_FAULT = (
    "This is a fault of the installation or of clm-dist, not of the job: please report it with the output of pip list"
)


class Strategy(ABC):
    """A model and its optimizer on this rank. Every method is collective unless it says otherwise."""

    sharded = False
    """Whether weights are sharded, so that a forward pass needs every rank."""
    why_not_compiled: str | None = None
    """Why passes cannot be compiled; None where they can."""

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
    def prepare(self, model: WithLoss, make_optimizer: MakeOptimizer) -> None:
        """Spread the model over the ranks, and its optimizer with it.

        The model must have been loaded after this object was made, because ZeRO-3 shards on loading.
        """

    def whole_models(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, models are built whole on every rank, whatever `prepare` makes of them. Not collective."""
        return contextlib.nullcontext()

    def compile_when_called(self, shape: tuple[int, ...]) -> None:
        """Compile passes of training over blocks of a shape, (B, T), when the first comes. Not collective."""
        self.with_loss.compile_whole(shape, multiple=self._head_multiple)

    @property
    def _head_multiple(self) -> int:
        """Of how many logits a compiled head computes: a GPU's tensor cores take twice as long for 50,257 as 50,304."""
        return 128 if self._use_gpu and self._job.train.precision in ("bf16", "fp16") else 1

    @contextlib.contextmanager
    def one_pass(self, *, last: bool) -> Iterator[nn.Module]:
        """The model for one forward and backward pass; `last` is the one after which gradients are complete."""
        yield self.model

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a loss; over the ranks the mean is taken."""
        loss.backward()  # type: ignore[no-untyped-call]

    def shared_figures(self) -> list[Tensor]:
        """Clip the gradient, where `step` does not, and give figures of it that every rank must have alike, if any.

        Called once before each `step`. They are on the device, each (), and are exchanged with those of the loop,
        because an exchange of their own, or another wait for the device, would cost as much again. Not collective.
        """
        return []

    def check_shared(self, sums: list[float]) -> None:
        """Take the sums of `shared_figures` over the ranks. Not collective.

        Raises:
            RunError: the ranks do not have the same gradient; on every rank.
        """
        assert not sums

    @abstractmethod
    def step(self, learning_rate: float, *, drop: bool = False) -> float:
        """Clip, unless `shared_figures` has; update the weights, forget the gradient.

        Returns:
            the gradient's 2-norm before clipping.

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
        """The pieces of weights, optimizer and buffers that this rank holds: views that change with the next `step`."""
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
        for state in self._plain_optimizer.state.values():
            if "step" in state:
                state["step"].fill_(num_updates)

    @property
    def num_updates(self) -> int:
        """Updates that the optimizer counted; 0 where it counts none. Not collective."""
        return max((int(state["step"]) for state in self._plain_optimizer.state.values() if "step" in state), default=0)

    def scaler_state(self) -> dict[str, float]:
        """State of the loss scaler; empty where there is none. Not collective."""
        return {}

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer itself."""
        return self.optimizer

    @functools.cached_property
    def _states(self) -> dict[int, tuple[str, ...]]:
        """Names of the state tensors of the optimizer's parameters, by their ids, as far as its groups have them."""
        return {id(p): states_of(group) for group in self._plain_optimizer.param_groups for p in group["params"]}

    def _fragment_of(self, name: str, start: int, parameter: Any, part: slice, **options: Any) -> Fragment:
        """A part of a parameter of the optimizer, with its state: zeros before the first update, as optimizers begin.

        Args:
            name: the model's parameter, of which the part begins at the element `start`.
        """
        # ZeRO-3 shows its optimizer one parameter at a time; there all have the same states.
        states = self._states.get(id(parameter)) or states_of(self._plain_optimizer.param_groups[0])
        state = self._plain_optimizer.state[parameter]
        if not state:
            state.update(first_state(parameter, states))
        elif problem := why_not_saved(state, states, parameter):
            raise RunError(f"train.optimizer {self._job.train.optimizer} {problem}: a checkpoint would lack it")
        tensors = {"weight": parameter, **{kind: state[kind] for kind in states if kind != "step"}}
        flat = {kind: local_shard(tensor.detach()).view(-1)[part] for kind, tensor in tensors.items()}
        return Fragment(name, start, flat, **options)

    @property
    def with_loss(self) -> WithLoss:
        """What `prepare` was given; not collective unless sharded."""
        wrapper: Any = self.model
        module: WithLoss = getattr(wrapper, "module", wrapper)
        return module

    @property
    def local_model(self) -> nn.Module:
        """What a forward pass outside of training runs; not collective unless sharded."""
        return self.model if self.sharded else self.with_loss

    @property
    def plain_model(self) -> nn.Module:
        """The transformers model itself."""
        return self.with_loss.model

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

    def seed(self, seed: int) -> None:
        """Seed what a pass draws, its dropout; as `torch.manual_seed`, in a tenth of the time. Not collective."""
        torch.default_generator.manual_seed(seed)
        if self._use_gpu:
            torch.cuda.manual_seed(seed)

    def all_reduce(self, values: list[float], on_device: Sequence[Tensor] = ()) -> list[float]:
        """The sums of each value over the ranks, in float64.

        Args:
            on_device: more values, each (), whose sums come after those of `values`; the device is waited for once.
        """
        if self.world_size == 1 and not on_device:
            return values
        # A copy from pinned memory waits for nothing.
        tensor = torch.tensor(values, dtype=torch.float64, pin_memory=self._use_gpu).to(self.device, non_blocking=True)
        if on_device:
            tensor = torch.cat([tensor, torch.stack([value.double() for value in on_device])])
        if self.world_size > 1:
            dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def gather(self, value: _Value) -> list[_Value]:
        """What every rank has, by rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def any_rank(self, found: bool) -> bool:
        """Whether something is so on any rank; the same answer on every rank."""
        return self.all_reduce([float(found)])[0] > 0

    def to_device(self, ids: npt.NDArray[np.int64]) -> Tensor:
        """Ids on the device, which is not waited for. Not collective."""
        host = torch.from_numpy(ids)
        return host.pin_memory().to(self.device, non_blocking=True) if self._use_gpu else host

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    @abstractmethod
    def gradient_norm(self) -> float:
        """The 2-norm of the gradient as the optimizer would see it, which is forgotten."""

    def plain_gradient_norm(self, loss_of: Callable[[nn.Module], Tensor]) -> float | None:
        """The norm that `gradient_norm` should return after a pass with this loss; None where it is not computed."""
        return None

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


def local_shard(tensor: Any) -> Tensor:
    """This rank's shard of a tensor, or the tensor where it is not sharded."""
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
