"""torch's own fully_shard (FSDP2)."""

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clm_dist.train.checkpointing.fragments import Fragment
from clm_dist.train.forward import WithLoss
from clm_dist.train.strategies.base import MakeOptimizer, Strategy


class FullyShard(Strategy):
    """torch's own fully_shard (FSDP2): weights, gradients and optimizer are sharded.

    Accelerate's FSDP2 is fully_shard as well on GPUs and does nothing at all on CPU, so it is called here directly:
    one path, the same on both.
    """

    sharded = True

    def _build_accelerator(self) -> Any:
        from accelerate import Accelerator

        return Accelerator(cpu=not self._use_gpu)

    def prepare(self, model: WithLoss, make_optimizer: MakeOptimizer) -> None:
        # Sharded, they have other classes.
        self._blocks = _gathered_alone(model.model)
        shard(
            model.model,
            self.device,
            self.world_size,
            bf16=self._job.train.precision == "bf16",
            offload=self._job.cluster.offload == "all",
        )
        self.model = model
        # Named here: after an evaluation some modules show whole weights in the place of shards.
        self._shards = {name: p for name, p in self.plain_model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(self.model)

    def compile_when_called(self, shape: tuple[int, ...]) -> None:
        self.with_loss.compile_parts(shape, self._blocks, multiple=self._head_multiple)

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

    def full_weights(self) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights: Any = get_model_state_dict(self.plain_model, options=options)
        return dict(weights)

    def _parameter_fragments(self) -> Iterable[Fragment]:
        for name, parameter in self._shards.items():
            # Rows, as torch.chunk deals them out.
            rows, row_size = parameter.shape[0], math.prod(parameter.shape[1:])
            first = min(self.rank * -(-rows // self.world_size), rows)
            yield self._fragment_of(name, first * row_size, parameter, slice(None))

    def release(self) -> None:
        del self._shards, self._blocks
        super().release()


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
    for module in _gathered_alone(model):
        fully_shard(module, **settings)
    fully_shard(model, **settings)
    return model


def _gathered_alone(model: nn.Module) -> list[nn.Module]:
    """The transformer blocks, which are gathered one at a time, from the inside out: some models nest them."""
    block_names = set(getattr(model, "_no_split_modules", None) or ())
    uses = _num_uses(model)
    # What is used elsewhere too, such as a tied embedding, must be gathered with all that use it: with the model.
    return [
        module
        for module in reversed(list(model.modules()))
        if type(module).__name__ in block_names and all(uses[p] == n for p, n in _num_uses(module).items())
    ]


def _num_uses(module: nn.Module) -> Counter[nn.Parameter]:
    """How often each parameter stands in a module."""
    return Counter(parameter for _, parameter in module.named_parameters(remove_duplicate=False))
