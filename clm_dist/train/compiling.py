"""Compiling the passes of training with torch.compile: whether it is worth it, and the proof that it may be trusted.

Compiled, a pass is one graph from ids to losses (blocks of the model for themselves under FSDP2). Where a model cannot
be compiled, or computes something else then, its passes run as before; that is said and ends no run.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, linear

from clm_dist.config.job import JobConfig
from clm_dist.errors import first_line
from clm_dist.files.markers import TrainerState
from clm_dist.train.batches import pass_seed
from clm_dist.train.compile_cost import is_worth_it
from clm_dist.train.forward import compile_function
from clm_dist.train.strategies.base import Strategy, local_shard

logger = logging.getLogger(__name__)

# Largest share by which losses and gradients of a compiled pass may differ by rounding.
_ROUNDED = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 1e-2, "fp16": 1e-2}
_OF_GRADIENT = 5
# Where dropout draws, it draws otherwise in a compiled pass: the share for the mean loss, and the least cosine of the
# angle between the figures of the gradients.
_DRAWN = 0.05
_SAME_DIRECTION = 0.5


@dataclass(frozen=True)
class Compilation:
    """Whether the passes of a run are compiled."""

    compiled: bool = False
    note: str | None = None
    """For the user: the seconds that it took, or why they are not."""

    def describe(self, before: TrainerState | None) -> str | None:
        """The note, and what a run that goes on from a checkpoint should know."""
        if before is None or before.compiled == self.compiled:
            return self.note
        changed = (
            f"Until step {before.step} passes were {'' if before.compiled else 'not '}compiled, which rounds otherwise"
        )
        return f"{self.note}. {changed}" if self.note else changed


@dataclass(frozen=True)
class _Tried:
    """What one pass computed on this rank, of its gradients as far as the strategy has not taken them away by then."""

    losses: Tensor
    """(B, T - 1), on the CPU."""
    checksum: int
    """Of the bits of the gradients."""
    figures: Tensor
    """For each parameter the norm of its gradient, and a sum of it in which each element has another weight in
    [-1, 1], (2, P) float64: a gradient with another sign or in another place has another."""
    norm: float
    """Of the whole gradient, over all ranks."""

    def is_as(self, other: "_Tried", *, rounded: float, draws: bool) -> bool:
        """Whether the other is the same pass, but for rounding or, roughly, for what dropout draws."""
        allowed = _DRAWN if draws else rounded
        mean = self.losses.mean()
        if not abs(other.losses.mean() - mean) <= allowed * abs(mean):
            return False
        if not math.isfinite(self.norm):
            # In fp16 the first gradients may overflow.
            return True
        if not abs(other.norm - self.norm) <= _OF_GRADIENT * allowed * self.norm:
            return False
        norms, sums = self.figures
        if draws:
            cosine = float(cosine_similarity(sums, other.figures[1], dim=0))
            return cosine > _SAME_DIRECTION or not norms.any()
        # Of a gradient that is 0 but for rounding nothing can be said.
        bounds = _OF_GRADIENT * allowed * (norms + norms.norm())
        per_token = (other.losses - self.losses).abs().max() <= _OF_GRADIENT * allowed * self.losses.abs().max()
        return bool(per_token and ((other.figures[1] - sums).abs() <= bounds).all())

    def is_same(self, other: "_Tried") -> bool:
        """Whether they are equal to the last bit."""
        same_norm = self.norm == other.norm or not math.isfinite(self.norm)
        return torch.equal(self.losses, other.losses) and self.checksum == other.checksum and same_norm


def try_compiling(
    job: JobConfig,
    strategy: Strategy,
    ids: npt.NDArray[np.int64],
    document_end: int | None,
    *,
    seconds_at_peak: float | None,
) -> Compilation:
    """Compile the passes of a run as `train.compile` says. Collective; called before a checkpoint is loaded.

    Args:
        ids: the blocks of a whole micro-batch, the same on every rank, (B, T).
        seconds_at_peak: that the run's passes would take at a GPU's full peak; None where it has none that is known.
    """
    wanted = job.train.compile
    # GPUs may be of several kinds.
    if not wanted or (wanted == "auto" and strategy.any_rank(not is_worth_it(seconds_at_peak))):
        return Compilation()
    if strategy.why_not_compiled:
        return Compilation(note=f"Passes are not compiled: {strategy.why_not_compiled}")
    began = time.perf_counter()
    with reproducible(True):
        problem, is_exact = _try(job, strategy, ids, document_end)
    if not problem and not is_exact and wanted == "auto":
        problem = (
            "compiled, their last bits differ each time, and so would those of a run that is resumed; "
            "train.compile: true takes that"
        )
    if problem:
        strategy.with_loss.uncompile()
        # Of the pass that failed.
        strategy.optimizer.zero_grad()
        return Compilation(note=f"Passes are not compiled: {problem}")
    note = f"Passes of training are compiled, in {time.perf_counter() - began:.0f} s"
    if not is_exact:
        note += ". They are not the same to the last bit each time, so neither is a run that is resumed"
    return Compilation(compiled=True, note=note)


@contextlib.contextmanager
def reproducible(on: bool) -> Iterator[None]:
    """Inside, if `on`, no kernel is taken that adds in another order each time, where there is another.

    The compiled gradient of an embedding is one, on a CPU with several threads too.
    """
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]


def _try(
    job: JobConfig, strategy: Strategy, ids: npt.NDArray[np.int64], document_end: int | None
) -> tuple[str | None, bool]:
    """The problem of compiled passes, and whether they are the same to the last bit each time. Collective."""
    # A pass that is not compiled takes more memory.
    few = ids[: -(-len(ids) // 4)] if strategy.with_loss.fills_short_batches else ids
    plain, redrawn = (_try_pass(job, strategy, few, document_end, micro_batch=m) for m in (0, 1))
    draws = strategy.any_rank(not torch.equal(plain.losses, redrawn.losses))

    # What one rank alone lacks, such as a compiler, must be seen before a pass in which the others would wait for it.
    problem = _problem_of(lambda: _compile_something(strategy.device))
    if not strategy.any_rank(problem is not None):
        strategy.compile_when_called(ids.shape)
        problem = _problem_of(lambda: _compute(job, strategy, ids, document_end, micro_batch=0, scale=0.0, last=False))
        if not strategy.any_rank(problem is not None):
            tried = _try_pass(job, strategy, few, document_end, micro_batch=0)
            one, other = (_try_pass(job, strategy, ids, document_end, micro_batch=0) for _ in range(2))
            is_exact = not strategy.any_rank(not one.is_same(other))
            if not plain.is_as(tried, rounded=_ROUNDED[job.train.precision], draws=draws):
                problem = (
                    f"compiled, the first has a loss of {tried.losses.mean():.6g} and a gradient of norm "
                    f"{tried.norm:.6g}, else {plain.losses.mean():.6g} and {plain.norm:.6g}, or they differ in parts"
                )
            if not strategy.any_rank(problem is not None):
                return None, is_exact
    return problem or "another worker cannot compile them", False


def _problem_of(call: Callable[[], object]) -> str | None:
    """What failed in a call, in a line: that which the compiler met, where its error wraps one."""
    try:
        call()
    except Exception as error:  # whatever the compiler, or the code that it writes, raises
        logger.debug("a pass could not be compiled", exc_info=True)
        cause = getattr(error, "inner_exception", error)
        return f"{type(cause).__name__}, {first_line(cause)}"
    return None


def _compile_something(device: torch.device) -> None:
    """Compile and compute a little on this rank alone."""
    weight = torch.ones(8, 8, device=device, requires_grad=True)
    compile_function(lambda w: linear(w, w).tanh().sum())(weight).backward()


def _try_pass(
    job: JobConfig, strategy: Strategy, ids: npt.NDArray[np.int64], document_end: int | None, *, micro_batch: int
) -> _Tried:
    """A pass over blocks with the seed of a micro-batch; its gradient is forgotten. Collective."""
    named = [(name, p) for name, p in strategy.plain_model.named_parameters() if p.requires_grad]
    checksums = dict.fromkeys((name for name, _ in named), 0)
    figures = {name: (0.0, 0.0) for name, _ in named}

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                gradient = local_shard(parameter.grad).flatten()
                checksums[name], figures[name] = _checksum(gradient), _figures(gradient)

        return hook

    hooks = [p.register_post_accumulate_grad_hook(keep(name)) for name, p in named]  # type: ignore[no-untyped-call]
    try:
        losses = _compute(job, strategy, ids, document_end, micro_batch=micro_batch)
    finally:
        for hook in hooks:
            hook.remove()
    by_parameter = torch.tensor(list(figures.values()), dtype=torch.float64).T
    return _Tried(losses, sum(checksums.values()), by_parameter, strategy.gradient_norm())


def _compute(
    job: JobConfig,
    strategy: Strategy,
    ids: npt.NDArray[np.int64],
    document_end: int | None,
    *,
    micro_batch: int,
    scale: float = 1.0,
    last: bool = True,
) -> Tensor:
    """The losses of a pass forward and backward, (B, T - 1), on the CPU. Collective."""
    strategy.model.train()
    strategy.seed(pass_seed(job.train.seed, 0, micro_batch))
    with strategy.one_pass(last=last) as model:
        losses, router_loss = model(strategy.to_device(ids), document_end)
        loss = losses.mean() if router_loss is None else losses.mean() + router_loss
        strategy.backward(loss * scale)
    on_cpu: Tensor = losses.detach().cpu()
    return on_cpu


def _checksum(gradient: Tensor) -> int:
    """The sum of its bit patterns, which is the same in whatever order it is added."""
    bits = {2: torch.int16, 4: torch.int32}[gradient.element_size()]
    return int(gradient.view(bits).sum(dtype=torch.int64))


def _figures(gradient: Tensor) -> tuple[float, float]:
    weights = torch.linspace(-1, 1, gradient.numel(), device=gradient.device)
    return float(gradient.float().norm()), float(gradient.float() @ weights)
