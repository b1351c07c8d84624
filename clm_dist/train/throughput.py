"""How fast a run trains, against what its devices can do."""

from dataclasses import dataclass
from typing import Any

import torch

from clm_dist.metrics import flops_per_token, model_flops_utilization
from clm_dist.train.strategies.base import Strategy


@dataclass(frozen=True)
class Throughput:
    """The figures from which an MFU is computed."""

    flops_a_token: float
    device_name: str
    num_devices: int

    @classmethod
    def of_model(cls, model: Any, block_size: int, strategy: Strategy) -> "Throughput":
        # ZeRO-3 leaves an empty tensor in a parameter's place and keeps its size beside it.
        num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        text = model.config.get_text_config()
        layers, hidden = text.num_hidden_layers, text.hidden_size
        is_gpu = strategy.device.type == "cuda"
        name = torch.cuda.get_device_name(strategy.device) if is_gpu else "CPU"
        return cls(flops_per_token(num_parameters, layers, hidden, block_size), name, strategy.world_size)

    def seconds_at_peak(self, num_tokens: float) -> float | None:
        """Seconds in which the devices could train on so many tokens; None where their peak is not known."""
        # The utilization of a second in which all of them are trained.
        return self.utilization(num_tokens)

    def utilization(self, tokens_per_s: float) -> float | None:
        return model_flops_utilization(tokens_per_s, self.flops_a_token, self.device_name, self.num_devices)
