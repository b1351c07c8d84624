"""DeepSpeed ZeRO 1, 2 and 3, through Accelerate."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clm_dist.train.checkpointing.fragments import Fragment
from clm_dist.train.forward import WithLoss
from clm_dist.train.strategies.base import MIXED_PRECISION, MakeOptimizer, Strategy

_MOST_IN_BUCKET = 5 * 10**8
"""Gradients that are exchanged at once, DeepSpeed's own number."""


class Zero(Strategy):
    """DeepSpeed ZeRO 1, 2 and 3, through Accelerate (Rajbhandari et al. 2020)."""

    _drop = False

    @property
    def _stage(self) -> int:
        return int(self._job.cluster.strategy.removeprefix("zero"))

    @property
    def why_not_compiled(self) -> str | None:  # type: ignore[override]
        return "ZeRO-3 gathers weights inside of a pass" if self._stage == 3 else None

    def _build_accelerator(self) -> Any:
        import deepspeed
        from accelerate import Accelerator
        from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

        # The op would be compiled at first use, a minute or more, and gloo does its work as well.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.sharded = self._stage == 3
        return Accelerator(
            deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=self._deepspeed_config()),
            mixed_precision=MIXED_PRECISION[self._job.train.precision],
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
            "train_micro_batch_size_per_gpu": job.batch.known_micro_size,
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

    def prepare(self, model: WithLoss, make_optimizer: MakeOptimizer) -> None:
        self.optimizer = make_optimizer(model)
        update = self.optimizer.step

        def step() -> None:
            if not self._drop:
                update()

        # The engine forgets a gradient in its own step only, and calls the optimizer's there.
        self.optimizer.step = step  # type: ignore[method-assign, assignment]
        # A buffer of that size lies on each device.
        number = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        zero = self.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["reduce_bucket_size"] = min(number, _MOST_IN_BUCKET)
        # DeepSpeed's engine is the model and steps the optimizer.
        self.model, _ = self.accelerator.prepare(model, self.optimizer)

    @contextlib.contextmanager
    def whole_models(self) -> Iterator[None]:
        from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
        yield
        set_hf_deepspeed_config(self.accelerator.state.deepspeed_plugin.dschf)

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
        # The engine's are named from `WithLoss` on.
        return {name.removeprefix("model."): weight.cpu() for name, weight in (weights or {}).items()}

    @property
    def _plain_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = self._engine.optimizer.optimizer
        return optimizer

    def _parameter_fragments(self) -> Iterable[Fragment]:
        zero = self._engine.optimizer
        parameter: Any
        for name, parameter in self.plain_model.named_parameters():
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
            yield self._fragment_of(name, start, flat, slice(begin, begin + size))

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
