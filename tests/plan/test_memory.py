"""The memory of a step that a plan says, against what autograd saves and what torch allocates."""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.autograd import profiler
from transformers import AutoConfig

from clm_dist.config.job import JobConfig
from clm_dist.plan.activations import Arithmetic, layer_bytes
from clm_dist.plan.families import architecture_of, family_values, known_families
from clm_dist.plan.memory import Memory, Setting, estimate_memory, largest_micro_size
from clm_dist.train.forward import WithLoss
from clm_dist.train.local import run_ranks
from clm_dist.train.model import autocast, build_model, recompute_activations
from clm_dist.train.optim import build_optimizer
from clm_dist.train.strategies.build import build_strategy
from clm_dist.train.strategies.environment import forget_accelerate
from tests.support.training import STRATEGIES

_BLOCKS, _SIZE = 2, 32
ARITHMETICS = {
    "fp32": Arithmetic(is_half=False, is_autocast=False, is_gpu=False),
    "autocast": Arithmetic(is_half=True, is_autocast=True, is_gpu=False),
    "bf16": Arithmetic(is_half=True, is_autocast=False, is_gpu=False),
}


def _config(family: str, num_layers: int, attention: str | None) -> Any:
    """A small configuration without dropout."""
    values = family_values()[family]
    given: dict[str, Any] = {
        "vocab_size": 11,
        "hidden_size": 64,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "max_position_embeddings": _SIZE,
        "intermediate_size": 192,
    }
    optional = {"num_key_value_heads": 2, "head_dim": 16, "dropout": 0.0, "attention_dropout": 0.0}
    given |= {name: value for name, value in optional.items() if name in values["defaults"]}
    given = {values["names"].get(name, name): value for name, value in given.items()}
    if family == "gpt2":
        given["embd_pdrop"] = 0.0
    if family == "gpt_neo":
        given["attention_types"] = [[["global"], num_layers]]
    return AutoConfig.for_model(
        family, bos_token_id=0, eos_token_id=0, pad_token_id=None, attn_implementation=attention, **given
    )


def _saved_bytes(config: Any, arithmetic: str) -> int:
    """Bytes that autograd keeps for the backward pass, without parameters."""
    torch.manual_seed(0)
    model = build_model(config).to(torch.bfloat16 if arithmetic == "bf16" else torch.float32)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids_BT = torch.randint(0, 11, (_BLOCKS, _SIZE))
    casts = autocast("bf16" if arithmetic == "autocast" else "fp32", torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), casts:
        WithLoss(model)(ids_BT)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("arithmetic", "attention"), [*((name, None) for name in ARITHMETICS), ("fp32", "eager"), ("bf16", "eager")]
)
@pytest.mark.parametrize("family", known_families())
def test_a_layer_keeps_what_autograd_saves(family: str, arithmetic: str, attention: str | None) -> None:
    model = architecture_of(_config(family, 1, attention).to_dict())
    assert model is not None
    two, one = (_saved_bytes(_config(family, number, attention), arithmetic) for number in (2, 1))
    saved = two - one
    if arithmetic == "autocast":
        # Beside the activations it keeps its copies of weights.
        saved -= 2 * model.layer_matrices
    is_eager = attention == "eager"
    said = layer_bytes(model, _SIZE, ARITHMETICS[arithmetic], is_eager=is_eager, is_compiled=False) * _BLOCKS * _SIZE
    if family == "gpt2" and is_eager and arithmetic == "bf16":
        # Its plain attention computes the softmax in half precision, as no other does: rather too much is said.
        assert saved < said < 1.3 * saved
    else:
        assert said == pytest.approx(saved, rel=0.07)


_DEEP: dict[str, Any] = {
    "model_type": "gpt2",
    "vocab_size": 1000,
    "n_embd": 256,
    "n_layer": 6,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
}
_GATED: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
_CAPPED = _GATED | {
    "model_type": "gemma2",
    "vocab_size": 32_000,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "pad_token_id": None,
}
_SHAPES = {
    "state": (_DEEP, 1, 8),
    "activations": (_DEEP | {"n_embd": 64, "n_layer": 4}, 64, 64),
    "gated": (_GATED, 64, 64),
    "head": (_DEEP | {"n_layer": 1, "vocab_size": 32_000}, 4, 8),
    "few": (_DEEP | {"n_layer": 1, "vocab_size": 32_000}, 2, 8),
    "capped": (_CAPPED, 8, 64),
}
CASES = [
    (strategy, precision, recomputes, shape)
    for strategy in STRATEGIES
    for precision in ("fp32", "bf16")
    for recomputes in (False, True)
    for shape in _SHAPES
    # Of a model that is nearly one matrix, ZeRO-3 in fp32 is said to take 13 % more than it does.
    if (strategy, precision, shape) not in (("zero3", "fp32", "head"), ("zero3", "fp32", "few"))
]


def _allocated(
    rank: int, world_size: int, cases: list[tuple[str, str, bool, str]]
) -> dict[tuple[str, str, bool, str], int]:
    """The most bytes that torch had allocated at once, in steps of each case."""
    return {case: _most_allocated(rank, world_size, *case) for case in cases}


def _most_allocated(
    rank: int, world_size: int, strategy_name: str, precision: str, recomputes: bool, shape: str
) -> int:
    config, num_blocks, size = _SHAPES[shape]
    job = JobConfig.model_validate(
        {
            "name": "memory",
            "data": {"source": "builtin", "text": "text", "block_size": size},
            "tokenizer": {"train": {"vocab_size": 300}},
            "model": {"config": config},
            "batch": {"global_size": num_blocks, "micro_size": num_blocks},
            "train": {"precision": precision, "gradient_checkpointing": recomputes},
            "cluster": {"strategy": strategy_name},
        }
    )
    with _counted() as most:
        strategy = build_strategy(job, rank=rank, world_size=world_size, use_gpu=False)
        values = {name: value for name, value in config.items() if name != "model_type"}
        with strategy.whole_models():
            model = build_model(AutoConfig.for_model(config["model_type"], bos_token_id=0, eos_token_id=0, **values))
        if recomputes:
            recompute_activations(model)
        model.config.use_cache = False  # type: ignore[union-attr]  # of transformers
        strategy.prepare(WithLoss(model), lambda prepared: build_optimizer(prepared, job.train))
        del model
        strategy.model.train()
        for _ in range(3):
            with strategy.one_pass(last=True) as wrapped:
                losses = wrapped(torch.zeros((num_blocks, size), dtype=torch.long))[0]
                strategy.backward(losses.mean())
                del losses
            strategy.check_shared([float(figure) for figure in strategy.shared_figures()])
            strategy.step(1e-4)
    strategy.release()
    forget_accelerate()
    return most[0]


@contextlib.contextmanager
def _counted() -> Iterator[list[int]]:
    """Yields a list in which the most bytes that were allocated inside stand afterwards."""
    most: list[int] = []
    # What an earlier case has left would be counted when it goes.
    gc.collect()
    with profiler.profile(profile_memory=True, use_kineto=True) as profile:
        yield most
    events = profile.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = highest = 0
    for _, change in changes:
        now += change
        highest = max(highest, now)
    most.append(highest)


def _some(case: tuple[str, str, bool, str]) -> bool:
    strategy, precision, recomputes, shape = case
    return (precision == "bf16" and not recomputes and strategy != "zero1") or case == ("ddp", "fp32", True, shape)


@pytest.mark.parametrize(
    "cases", [[case for case in CASES if _some(case)], pytest.param(CASES, marks=pytest.mark.long)], ids=["some", "all"]
)
def test_a_step_takes_what_torch_allocates(cases: list[Any]) -> None:
    left = cases
    for _ in range(3):
        (allocated,) = run_ranks(_allocated, 1, left, preload=["tests.support.ranks"])
        too_high = [case for case in left if allocated[case] > 1.1 * _said(case)]
        for case in set(left) - set(too_high):
            assert _said(case) == pytest.approx(allocated[case], rel=0.1), case
        # The profiler misses that something is freed now and then, so what is measured is never too low.
        if not (left := too_high):
            return
    pytest.fail(f"too little is said of {left}")


def _said(case: tuple[str, str, bool, str]) -> float:
    strategy, precision, recomputes, shape = case
    config, num_blocks, size = _SHAPES[shape]
    model = architecture_of(config)
    assert model is not None
    setting = Setting(strategy, 1, num_blocks, size, precision=precision, gradient_checkpointing=recomputes)
    return estimate_memory(model, replace(setting, is_gpu=False)).total


def _memory(strategy: str, world_size: int, **options: Any) -> Memory:
    model = architecture_of(_DEEP)
    assert model is not None
    return estimate_memory(model, Setting(strategy, world_size, 1, 8, **options))


def test_shards_are_as_many_as_there_are_workers() -> None:
    number = 5_011_456
    assert _memory("ddp", 8).optimizer == 8 * number
    assert _memory("zero1", 8).optimizer == _memory("zero3", 8).optimizer == 12 * number / 8
    assert _memory("fsdp2", 8).optimizer == 8 * number / 8
    assert _memory("zero3", 8, precision="bf16").weights == 2 * number / 8
    assert _memory("zero3", 8, offload="all").weights == _memory("zero1", 8, offload="optimizer").optimizer == 0


def test_the_peak_that_was_measured_on_an_h200() -> None:
    """DistilGPT2's shape with 256 x 128 tokens in bf16: 31.7 GiB in plain passes, 12.8 GiB compiled.

    The loss of the plain passes then had three fp32 tensors of the size of the logits.
    """
    model = architecture_of({"model_type": "gpt2", "n_layer": 6})
    assert model is not None
    for is_compiled, measured in ((False, 31.7), (True, 12.8)):
        setting = Setting("ddp", 1, 256, 128, precision="bf16", wants_compiled=is_compiled)
        found = estimate_memory(model, setting)
        loss = found.loss if is_compiled else 256 * 128 * (3 * 4 * 50257 + (4 + 2) * 768)
        assert (found.total - found.context - found.loss + loss) / 2**30 == pytest.approx(measured, rel=0.035)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    model = architecture_of(_DEEP)
    assert model is not None
    setting = Setting("ddp", 2, 1, 64)
    limit = 4 * 2**30
    most = largest_micro_size(model, setting, limit)
    assert most > 1
    fits = [estimate_memory(model, Setting("ddp", 2, size, 64)).total <= 0.95 * limit for size in (most, most + 1)]
    assert fits == [True, False]
    assert largest_micro_size(model, setting, 2**20) == 0


def test_the_arithmetic_is_that_of_the_strategy() -> None:
    """Under ddp autocast casts; DeepSpeed and FSDP2 keep what they compute with in half precision."""
    arithmetics = {
        (name, p): Setting(name, 1, 1, 8, precision=p).arithmetic for name in STRATEGIES for p in ("fp32", "bf16")
    }
    for (name, precision), found in arithmetics.items():
        assert found.size == (2 if precision == "bf16" else 4)
        assert found.stream_size == (2 if precision == "bf16" and name != "ddp" else 4)
