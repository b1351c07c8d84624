"""The trained model as a plain Hugging Face directory, and the proof that it is the model that was trained."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clm_dist.config.job import JobConfig
from clm_dist.errors import RunError, first_line
from clm_dist.files.atomic import replace_dir, writing
from clm_dist.metrics import MicroLoss
from clm_dist.pretrained.portable import make_portable
from clm_dist.pretrained.weights import load_pretrained
from clm_dist.train.attention import attention_options
from clm_dist.train.evaluate import EvalSplit, evaluate_micros
from clm_dist.train.forward import WithLoss
from clm_dist.train.strategies.base import Strategy
from clm_dist.train.strategies.fsdp2 import shard


def export(strategy: Strategy, tokenizer: Path, target: Path) -> None:
    """Write weights, configuration and tokenizer; the directory is whole or it is not there. Collective."""
    weights = strategy.full_weights()
    if strategy.rank == 0:
        unfinished = target.with_name(f".{target.name}.part")
        model: Any = strategy.plain_model
        first: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            # Gathered, tied weights are tensors of their own; as one tensor they are written once.
            weights[name] = weights[first.setdefault(id(parameter), name)]
        with writing(target):
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(tokenizer, unfinished)
            model.config.use_cache = True
            model.save_pretrained(unfinished, state_dict=weights)
            model.config.use_cache = False
            for file in unfinished.glob("*.safetensors"):
                # safetensors 0.8 writes for the owner alone, whatever the umask says.
                file.chmod((unfinished / "config.json").stat().st_mode)
            make_portable(unfinished)
            replace_dir(unfinished, target)
    strategy.barrier()


def evaluate_export(
    strategy: Strategy, job: JobConfig, directory: Path, split: EvalSplit, on_micro: Callable[[int], None]
) -> list[MicroLoss]:
    """This rank's micro-batches of the eval split, by the model as it was written. Collective.

    The strategy must have released the trained model. Where its weights were sharded, these are too, so that a device
    which could train the model can also read it back; every rank first loads it into host memory.

    Raises:
        RunError: it cannot be evaluated as it is sharded.
    """
    model = load_pretrained(directory, **attention_options(job.model.attention))
    bf16 = job.train.precision == "bf16" and job.cluster.strategy == "fsdp2"
    try:
        if strategy.sharded:
            offload = job.cluster.offload == "all"
            model = shard(model, strategy.device, strategy.world_size, bf16=bf16, offload=offload)
        else:
            model.to(strategy.device)
        return evaluate_micros(
            WithLoss(model),
            split,
            device=strategy.device,
            rank=strategy.rank,
            world_size=strategy.world_size,
            in_step=strategy.sharded,
            autocast=strategy.autocast,
            on_micro=on_micro,
        )
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, NotImplementedError) as error:
        # On every rank: under ZeRO-3 it is FSDP2 that shards it here, which may not know how.
        raise RunError(
            f"the model is trained and written to {directory}, and cannot be evaluated there: {first_line(error)}; "
            f"evaluate it with `clm-dist evaluate {directory} --job ...`, or train with cluster.strategy zero2"
        ) from error
