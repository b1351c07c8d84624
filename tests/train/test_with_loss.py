"""A model with its loss in one module: which passes are compiled, in what shape, with a padded head."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from clm_dist.train import forward
from clm_dist.train.forward import WithLoss, block_logits
from clm_dist.train.loss import next_token_loss
from clm_dist.train.model import build_model
from clm_dist.train.strategies.base import Strategy
from tests.conftest import MakeJob
from tests.support.architectures import ARCHITECTURES


def build(config: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model: Any = build_model(
        CONFIG_MAPPING[config["model_type"]](**{k: v for k, v in config.items() if k != "model_type"})
    )
    return WithLoss(model).train()


def losses_and_gradients(model: WithLoss, ids_BT: Tensor) -> list[Tensor]:
    torch.manual_seed(0)
    losses = model(ids_BT)[0]
    return [losses, *torch.autograd.grad(losses.sum(), list(model.parameters()))]


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "cohere", "granite", "phi"])
def test_a_padded_head_computes_the_same(kind: str, parts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied or not, with a bias, with logits that are capped or scaled."""
    monkeypatch.setattr(forward, "compile_function", lambda function: function)
    vocab_size = 300
    config = {"model_type": kind, **ARCHITECTURES[kind], "vocab_size": vocab_size}
    ids_BT = torch.randint(vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, padded = build(config), build(config)
    if parts:
        padded.compile_parts((2, 16), [], multiple=128)
    else:
        padded.compile_whole((2, 16), multiple=128)
    sizes: list[int] = []

    def watched(logits_BTV: Tensor, ids_BT: Tensor, end: int | None) -> Tensor:
        sizes.append(logits_BTV.shape[-1])
        return next_token_loss(logits_BTV, ids_BT, end)

    monkeypatch.setattr(forward, "next_token_loss", watched)
    for one, other in zip(losses_and_gradients(plain, ids_BT), losses_and_gradients(padded, ids_BT), strict=True):
        assert (one - other).abs().max() <= 1e-6 * one.abs().max()
    padded(ids_BT[:1])
    # Other passes know nothing of it.
    padded(ids_BT[:, :8])
    padded.eval()(ids_BT)
    assert sizes == [300, 384, 384, 300, 300]
    padded.train()(ids_BT)
    assert block_logits(padded, ids_BT, None).shape[-1] == vocab_size
    assert padded.model.get_output_embeddings().weight.shape[0] == vocab_size


def test_a_short_batch_is_filled_up_with_blocks_that_count_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "compile_function", lambda function: function)
    ids_BT = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    plain, compiled = (build({"model_type": "llama", **ARCHITECTURES["llama"], "vocab_size": 300}) for _ in range(2))
    compiled.compile_whole((8, 16))
    for one, other in zip(losses_and_gradients(plain, ids_BT), losses_and_gradients(compiled, ids_BT), strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-6 * one.abs().max()


def test_the_loss_of_a_router_sees_no_block_that_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "compile_function", lambda function: function)
    model = build(
        {"model_type": "mixtral", **ARCHITECTURES["mixtral"], "vocab_size": 300, "output_router_logits": True}
    )
    ids_BT = torch.randint(300, (3, 16), generator=torch.Generator().manual_seed(0))
    before = model(ids_BT)[1]
    model.compile_whole((8, 16))
    assert model(ids_BT)[1] == before


def test_a_head_is_padded_for_tensor_cores_alone(make_job: MakeJob) -> None:
    for use_gpu, precision, multiple in (
        (True, "bf16", 128),
        (True, "fp16", 128),
        (True, "fp32", 1),
        (False, "bf16", 1),
    ):
        strategy: Any = SimpleNamespace(_use_gpu=use_gpu, _job=make_job(f"train.precision={precision}"))
        assert Strategy._head_multiple.fget(strategy) == multiple  # type: ignore[attr-defined]


def test_parts_are_compiled_in_whole_passes_of_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def compile_it(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(function.__name__)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(forward, "compile_function", compile_it)
    model = build({"model_type": "gpt2", **ARCHITECTURES["gpt2"]})
    model.compile_parts((2, 16), model.model.transformer.h)
    ids_BT = torch.zeros(2, 16, dtype=torch.int64)
    model(ids_BT)
    block_logits(model, ids_BT, None)
    assert calls == ["forward"] * len(model.model.transformer.h) + ["_loss"]
    model(ids_BT[:, :8])
    model.eval()(ids_BT)
    model.train().uncompile()
    model(ids_BT)
    assert len(calls) == len(model.model.transformer.h) + 1
