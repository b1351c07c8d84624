"""Every rank holds everything: torch's DistributedDataParallel, through Accelerate."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clm_dist.errors import RunError
from clm_dist.train.checkpointing.fragments import Fragment
from clm_dist.train.forward import WithLoss
from clm_dist.train.model import autocast
from clm_dist.train.strategies.base import MIXED_PRECISION, REPORT_FAULT, MakeOptimizer, Strategy


class DataParallel(Strategy):
    """Every rank holds everything; gradients are averaged (torch's DistributedDataParallel, through Accelerate)."""

    _norm = math.nan
    """Of the gradient that `step` takes."""
    _own_norm: Tensor
    """The same, on the device; it must be that of every rank."""

    def _build_accelerator(self) -> Any:
        from accelerate import Accelerator
        from accelerate.utils import DistributedDataParallelKwargs

        return Accelerator(
            cpu=not self._use_gpu,  # on CPU anything else silently trains without distribution
            mixed_precision=MIXED_PRECISION[self._job.train.precision],
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )

    def prepare(self, model: WithLoss, make_optimizer: MakeOptimizer) -> None:
        # One worker has nobody to average with; DistributedDataParallel would copy and divide its gradients anyhow.
        self.model = self.accelerator.prepare_model(model, evaluation_mode=self.world_size == 1)
        self.optimizer = self.accelerator.prepare(make_optimizer(self.model))

    @contextlib.contextmanager
    def one_pass(self, *, last: bool) -> Iterator[nn.Module]:
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
            yield self.model

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def shared_figures(self) -> list[Tensor]:
        limit = float("inf") if self._max_norm is None else self._max_norm
        self._own_norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit).double()
        return [self._own_norm, self._own_norm * self._own_norm, torch.isfinite(self._own_norm)]

    def check_shared(self, sums: list[float]) -> None:
        norms, squares, num_finite = sums
        # As all have the same, this is it to the last bit, and tells what is infinite from what is no number.
        self._norm = norms / self.world_size
        variance = squares / self.world_size - self._norm * self._norm
        if num_finite not in (0, self.world_size) or variance > (1e-5 * self._norm) ** 2 + 1e-24:
            raise RunError(
                f"the ranks do not share their gradients any more: this rank's gradient norm is "
                f"{float(self._own_norm):.6g}, the mean of {self.world_size} ranks {self._norm:.6g}; nothing was saved "
                f"since. {REPORT_FAULT}"
            )

    def step(self, learning_rate: float, *, drop: bool = False) -> float:
        self._set_learning_rate(learning_rate)
        scaler = self.accelerator.scaler
        if drop:
            if scaler is not None:
                scaler.update()
        elif math.isfinite(self._norm) or scaler is not None:
            self.optimizer.step()
        self.optimizer.zero_grad()
        return self._norm

    def gradient_norm(self) -> float:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return float(norm)

    def plain_gradient_norm(self, loss_of: Callable[[nn.Module], Tensor]) -> float | None:
        model = self.local_model
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
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self.optimizer.optimizer  # type: ignore[attr-defined]  # Accelerate wraps it
        return optimizer

    def _parameter_fragments(self) -> Iterable[Fragment]:
        for name, parameter in self.plain_model.named_parameters():
            if parameter.requires_grad:
                yield self._fragment_of(name, 0, parameter, slice(None), replicated=True)

    def apply_fragments(self, num_updates: int, scaler: Mapping[str, float]) -> None:
        super().apply_fragments(num_updates, scaler)
        if self.accelerator.scaler is not None and scaler:
            self.accelerator.scaler.load_state_dict(dict(scaler))

    def scaler_state(self) -> dict[str, float]:
        return {} if self.accelerator.scaler is None else dict(self.accelerator.scaler.state_dict())
