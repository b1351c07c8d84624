"""Compiling the passes of training with torch.compile: whether it is worth it, and the proof that it may be trusted.

Compiled, a pass is one graph from ids to losses (blocks of the model for themselves under FSDP2). Where a model cannot
be compiled, or computes something else then, its passes run as before; that is said and ends no run.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from clm_dist.config.job import JobConfig
from clm_dist.errors import first_line
from clm_dist.files.markers import TrainerState
from clm_dist.train.batches import pass_seed
from clm_dist.train.strategies.base import Strategy, local_shard

logger = logging.getLogger(__name__)

# What compiling costs a GPU, and the share of a pass's time that it saves there: a third to a quarter is left.
_COST_S = 30.0
_SAVED = 0.7
# Share of a GPU's peak that passes reach before.
_USED = 0.12
# Largest share by which the mean loss of a compiled pass may differ: by rounding, or where dropout draws, because it
# draws otherwise then. The norm of a gradient may differ by more.
_ROUNDED = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 1e-2, "fp16": 1e-2}
_DRAWN = 0.05
_OF_NORM = 5


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
    """What one pass computed on this rank."""

    losses: Tensor
    """(B, T - 1), on the CPU."""
    checksum: int
    """Of the bits of this rank's gradients, as far as the strategy has not taken them away by then."""
    norm: float
    """Of the gradient, over all ranks."""

    def differs(self, other: "_Tried", share: float) -> bool:
        """Whether it is another pass, and not one that is rounded otherwise."""
        pairs = [(self.losses.mean().item(), other.losses.mean().item(), share)]
        if math.isfinite(self.norm):  # in fp16 the first gradients may overflow
            pairs.append((self.norm, other.norm, _OF_NORM * share))
        return any(not abs(a - b) <= share * abs(a) for a, b, share in pairs)

    def is_same(self, other: "_Tried") -> bool:
        """Whether they are equal to the last bit."""
        same_norm = self.norm == other.norm or not math.isfinite(self.norm)
        return torch.equal(self.losses, other.losses) and self.checksum == other.checksum and same_norm


def compile_passes(
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
    if not wanted or (wanted == "auto" and not is_worth_it(seconds_at_peak)):
        return Compilation()
    if strategy.why_not_compiled:
        return Compilation(note=f"Passes are not compiled: {strategy.why_not_compiled}")
    began = time.perf_counter()
    # Kernels that add in another order each time are not taken; where there is no other, a warning suffices.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # A pass that is not compiled takes several times the memory.
    few = ids[: -(-len(ids) // 4)] if strategy.with_loss.fills_short_batches else ids
    plain, redrawn = (_try_pass(job, strategy, few, document_end, micro_batch=m) for m in (0, 1))
    draws = strategy.any_rank(not torch.equal(plain.losses, redrawn.losses))

    strategy.compile_passes(ids.shape)
    problem: str | None = None
    try:
        # Where ranks exchange gradients after the last pass only, none waits here for one that fails.
        _compute(job, strategy, ids, document_end, micro_batch=0, scale=0.0, last=False)
    except Exception as error:  # whatever the compiler, or the code that it writes, raises
        logger.debug("a pass could not be compiled", exc_info=True)
        problem = _cause(error)
    is_exact = False
    if strategy.any_rank(problem is not None):
        problem = problem or "another worker could not compile them"
    else:
        tried = _try_pass(job, strategy, few, document_end, micro_batch=0)
        one, other = (_try_pass(job, strategy, ids, document_end, micro_batch=0) for _ in range(2))
        is_exact = not strategy.any_rank(not one.is_same(other))
        if strategy.any_rank(plain.differs(tried, _DRAWN if draws else _ROUNDED[job.train.precision])):
            problem = (
                f"compiled, the first has a loss of {tried.losses.mean():.6g} and a gradient of norm {tried.norm:.6g}, "
                f"else {plain.losses.mean():.6g} and {plain.norm:.6g}"
            )
        elif not is_exact and wanted == "auto":
            problem = (
                "compiled, their last bits differ each time, and so would those of a run that is resumed; "
                "train.compile: true takes that"
            )
    if problem:
        strategy.with_loss.uncompile()
        torch.use_deterministic_algorithms(False)
        return Compilation(note=f"Passes are not compiled: {problem}")
    note = f"Passes of training are compiled, in {time.perf_counter() - began:.0f} s"
    if not is_exact:
        note += ". They are not the same to the last bit each time, so neither is a run that is resumed"
    return Compilation(compiled=True, note=note)


def is_worth_it(seconds_at_peak: float | None) -> bool:
    """Whether compiling saves more time than it costs, for what `compile_passes` is told of a run.

    On a CPU it does not: 3 to 14 % are saved there, and 40 s lost.
    """
    return seconds_at_peak is not None and _SAVED * seconds_at_peak / _USED > _COST_S


def _cause(error: Exception) -> str:
    """What failed, in a line: that which the compiler met, where its error wraps one."""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}, {first_line(cause)}"


def _try_pass(
    job: JobConfig, strategy: Strategy, ids: npt.NDArray[np.int64], document_end: int | None, *, micro_batch: int
) -> _Tried:
    """A pass over blocks with the seed of a micro-batch; its gradient is forgotten. Collective."""
    checksums: dict[str, int] = {}

    def keep(name: str) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            if parameter.grad is not None:
                checksums[name] = _checksum(parameter.grad)

        return hook

    named = [(name, p) for name, p in strategy.plain_model.named_parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(keep(name)) for name, p in named]  # type: ignore[no-untyped-call]
    losses = _compute(job, strategy, ids, document_end, micro_batch=micro_batch)
    for hook in hooks:
        hook.remove()
    return _Tried(losses, sum(checksums.values()), strategy.gradient_norm())


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
    return int(local_shard(gradient).contiguous().view(bits).sum(dtype=torch.int64))
