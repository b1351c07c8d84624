"""Every rank holds everything: torch's DistributedDataParallel, through Accelerate."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clm_dist.errors import RunError
from clm_dist.train.checkpointing.fragments import Fragment
from clm_dist.train.model import autocast
from clm_dist.train.strategies.base import MIXED_PRECISION, REPORT_FAULT, MakeOptimizer, Strategy


class DataParallel(Strategy):
    """Every rank holds everything; gradients are averaged (torch's DistributedDataParallel, through Accelerate)."""

    _unchecked_norm: float | None = None
    """Of the last step's gradient, until the ranks have compared it."""

    def _build_accelerator(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        return Accelerator(
            cpu=not self._use_gpu,  # on CPU anything else silently trains without distribution
            mixed_precision=MIXED_PRECISION[self._job.train.precision],
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )

    def prepare(self, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        # One worker has nobody to average with; DistributedDataParallel would copy and divide its gradients anyhow.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=self.world_size == 1)
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
        self._unchecked_norm = norm
        if drop:
            if scaler is not None:
                scaler.update()
        elif math.isfinite(norm) or scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def all_reduce(self, values: list[float]) -> list[float]:
        """The sums of each value over the ranks, in float64.

        Raises:
            RunError: the gradient of the last step had not the same norm on every rank, as where all share their
                weights and gradients. It goes along here, because an exchange of its own would cost as much again.
        """
        if self._unchecked_norm is None or self.world_size == 1:
            return super().all_reduce(values)
        norm, self._unchecked_norm = self._unchecked_norm, None
        finite = math.isfinite(norm)
        norm = norm if finite else 0.0
        *sums, norms, squares, num_finite = super().all_reduce([*values, norm, norm * norm, float(finite)])
        mean = norms / self.world_size
        variance = squares / self.world_size - mean * mean
        if num_finite not in (0, self.world_size) or variance > (1e-5 * mean) ** 2 + 1e-24:
            raise RunError(
                f"the ranks do not share their gradients any more: this rank's gradient norm is {norm:.6g}, the mean "
                f"of {self.world_size} ranks {mean:.6g}; nothing was saved since. {REPORT_FAULT}"
            )
        return sums

    def gradient_norm(self) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return float(norm)

    def _plain_gradient_norm(self, loss_of: Callable[[nn.Module], Tensor]) -> float | None:
        model = self.plain_model
        with self.autocast():
            loss = loss_of(model) * (1.0 if self.accelerator.scaler is None else self.accelerator.scaler.get_scale())
        with self.accelerator.no_sync(self.model):
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        # Reformer gives its parameters their gradients by itself.
        self.optimizer.zero_grad()
        is_whole = all(gradient is not None for gradient in gradients)
        return float(torch.nn.utils.get_total_norm(gradients)) if is_whole else None

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return autocast(self._job.train.precision, self.device)

    def full_weights(self) -> dict[str, Tensor]:
        return {name: weight.cpu() for name, weight in self.plain_model.state_dict().items()}

    @property
    def _adam(self) -> torch.optim.Optimizer:
        adam: torch.optim.Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]  # Accelerate wraps it
        return adam

    def _parameter_fragments(self) -> Iterable[Fragment]:
        # What is saved has been checked.
        self.all_reduce([])
        for name, parameter in self.plain_model.named_parameters():
            if parameter.requires_grad:
                yield self._adam_fragment(name, 0, parameter, slice(None), replicated=True)

    def apply_fragments(self, num_updates: int, scaler: Mapping[str, float]) -> None:
        super().apply_fragments(num_updates, scaler)
        if self.accelerator.scaler is not None and scaler:
            self.accelerator.scaler.load_state_dict(dict(scaler))

    def scaler_state(self) -> dict[str, float]:
        return {} if self.accelerator.scaler is None else dict(self.accelerator.scaler.state_dict())
