"""AdamW and its schedule."""

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from clm_dist.config.job import TrainConfig
from clm_dist.train.optim import build_optimizer, build_schedule


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "polynomial", "inverse_sqrt"])
def test_the_rate_of_a_step_is_that_of_the_schedule_stepped_so_often(schedule: str) -> None:
    train = TrainConfig.model_validate({"schedule": schedule, "warmup_steps": 5, "learning_rate": 1e-3})
    rate = build_schedule(train, 40)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    stepped = get_scheduler(name, optimizer, num_warmup_steps=5, num_training_steps=40)
    for step in range(40):
        assert rate(step) == pytest.approx(stepped.get_last_lr()[0])
        optimizer.step()
        stepped.step()
    assert rate(0) == 0
    assert rate(5) == pytest.approx(1e-3)


def test_wsd_rises_holds_and_falls_to_nothing() -> None:
    train = TrainConfig.model_validate(
        {"schedule": "wsd", "warmup_ratio": 0.1, "decay_ratio": 0.25, "learning_rate": 1}
    )
    rate = build_schedule(train, 40)
    assert [rate(step) for step in range(5)] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert {rate(step) for step in range(4, 31)} == {1}
    assert [rate(step) for step in range(30, 41)] == pytest.approx([1 - step / 10 for step in range(11)])


@pytest.mark.parametrize(
    ("ratio", "num_steps", "num_warmup"), [(0.03, 1000, 30), (0.03, 1001, 31), (0, 10, 0), (0.5, 1, 1)]
)
def test_the_share_of_the_warm_up_is_rounded_up_as_transformers_does(
    ratio: float, num_steps: int, num_warmup: int
) -> None:
    from transformers import TrainingArguments

    train = TrainConfig(warmup_ratio=ratio)
    assert train.num_warmup_steps(num_steps) == num_warmup
    assert TrainingArguments(output_dir="x", warmup_steps=ratio, report_to=[]).get_warmup_steps(num_steps) == num_warmup
    whole = TrainConfig(warmup_steps=num_warmup)
    shares, steps = (build_schedule(one, num_steps) for one in (train, whole))
    assert [shares(step) for step in range(num_steps)] == [steps(step) for step in range(num_steps)]


def test_a_wsd_run_that_is_shorter_than_its_warm_up_only_rises() -> None:
    rate = build_schedule(TrainConfig(schedule="wsd", warmup_steps=20, learning_rate=1), 10)
    assert [rate(step) for step in range(10)] == pytest.approx([step / 20 for step in range(10)])


def test_the_guides_rate_falls_from_its_peak_to_nothing() -> None:
    rate = build_schedule(TrainConfig(), 100)
    assert [rate(0), rate(50)] == pytest.approx([2e-5, 1e-5])


def test_biases_and_norms_are_decayed_unless_the_job_says_otherwise() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    plain = build_optimizer(model, TrainConfig())
    assert [(len(g["params"]), g["weight_decay"]) for g in plain.param_groups] == [(4, 0.01)]
    chosen = build_optimizer(model, TrainConfig(decay_bias_and_norm=False))
    assert [(len(g["params"]), g["weight_decay"]) for g in chosen.param_groups] == [(1, 0.01), (3, 0.0)]
    assert chosen.param_groups[0]["params"][0] is model["linear"].weight


def test_the_constants_of_adam_are_the_jobs() -> None:
    train = TrainConfig(adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=0.125, learning_rate=0.25)
    (group,) = build_optimizer(nn.Linear(2, 2), train).param_groups
    assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.75), 0.125, 0.25)
