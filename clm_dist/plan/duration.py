"""Seconds of a step: arithmetic, and what is exchanged between workers beside it.

The arithmetic is 6N + 12LTd operations a token (Chowdhery et al. 2022, "PaLM", appendix B) at a share of the devices'
peak, the MFU. That share is not computed here: it is measured, or assumed from what was measured before.
"""

from dataclasses import dataclass

from clm_dist.devices import Device
from clm_dist.metrics import flops_per_token
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.memory import Setting

EAGER_MFU, COMPILED_MFU = (0.10, 0.20), (0.30, 0.42)
"""Shares of the bf16 peak from small to large models. Measured on one H200 with models of 82 and 124 million
parameters: 0.11 and 0.14, compiled loops 0.32 to 0.41."""
_RECOMPUTED = 4 / 3
"""Work of a step that computes activations twice, over that of one that keeps them."""
_BACKWARD = 2 / 3
"""Share of a pass that is its backward pass, during which gradients are exchanged."""


@dataclass(frozen=True)
class Network:
    """The bandwidth between workers, bytes a second in one direction."""

    gpus_per_node: int
    link: float
    """Of a GPU to the others of its host."""
    between_nodes: float
    """Of a host to others."""

    def bandwidth(self, world_size: int) -> float:
        """Of a ring through all workers: that of its slowest part (NCCL's tests, PERFORMANCE.md)."""
        return self.link if world_size <= self.gpus_per_node else min(self.link, self.between_nodes)


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step."""

    compute: float
    exchange: float
    """Of all exchanges, most of which may go on while passes are computed."""
    waiting: float
    """The part of `exchange` that nothing is computed beside."""

    @property
    def total(self) -> float:
        return self.compute + self.waiting


def assumed_mfu(setting: Setting) -> tuple[float, float]:
    """The MFU between which a run is taken to be that was not measured."""
    return COMPILED_MFU if setting.is_compiled else EAGER_MFU


def token_flops(model: Architecture, block_size: int) -> float:
    """Operations to train on one token."""
    return flops_per_token(model.num_parameters, model.num_layers, model.hidden, block_size)


def tokens_per_second(model: Architecture, setting: Setting, device: Device, mfu: float) -> float:
    """Tokens that one worker trains on in a second while it waits for no other."""
    rate = mfu * device.peak_flops(setting.precision) / token_flops(model, setting.block_size)
    return rate / _RECOMPUTED if setting.gradient_checkpointing else rate


def step_time(model: Architecture, setting: Setting, rate: float, network: Network) -> StepTime:
    """The seconds of a step of which every worker computes `setting.passes` passes.

    Args:
        rate: tokens a second of a worker that waits for no other.
    """
    compute = setting.blocks_of_step * setting.block_size / rate
    exchange = exchanged_bytes(model, setting) / network.bandwidth(setting.world_size)
    # DistributedDataParallel exchanges in the last backward pass; ZeRO 1 and 2 wait (`overlap_comm` is off); ZeRO-3 and
    # FSDP2 gather and reduce beside every pass.
    beside = {"ddp": _BACKWARD / setting.passes, "zero1": 0.0, "zero2": 0.0, "zero3": 1.0, "fsdp2": 1.0}
    waiting = max(0.0, exchange - beside[setting.strategy] * compute)
    return StepTime(compute, exchange, waiting)


def exchanged_bytes(model: Architecture, setting: Setting) -> float:
    """Bytes that each worker sends in a step.

    A ring's all-gather or reduce-scatter of S bytes sends (W - 1) / W of S from each of W workers, its all-reduce twice
    as much (Patarasuk and Yuan 2009); which of them a strategy needs is in Rajbhandari et al. 2020, section 7.
    """
    number, passes, size = model.num_parameters, setting.passes, setting.arithmetic.size
    volumes = {
        "ddp": 2 * 4 * number,
        "zero1": 2 * size * number,
        "zero2": (passes + 1) * size * number,
        "zero3": 3 * passes * size * number,
        # It reduces gradients in fp32.
        "fsdp2": passes * (2 * size + 4) * number,
    }
    return volumes[setting.strategy] * (setting.world_size - 1) / setting.world_size
