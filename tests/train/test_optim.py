"""AdamW and its schedule."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from clm_dist.config.job import TrainConfig
from clm_dist.errors import ConfigError
from clm_dist.train.optim import build_optimizer, build_schedule, describe_change


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


def rates(settings: dict[str, Any], num_steps: int, *steps: int) -> list[float]:
    rate = build_schedule(TrainConfig.model_validate({"learning_rate": 1.0} | settings), num_steps)
    return [rate(step) for step in steps]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd", "polynomial"])
def test_a_schedule_for_more_steps_does_not_depend_on_where_the_run_ends(schedule: str) -> None:
    settings = {"schedule": schedule, "schedule_steps": 40, "warmup_ratio": 0.1}
    whole = rates({"schedule": schedule, "warmup_ratio": 0.1}, 40, *range(40))
    assert rates(settings, 20, *range(20)) == whole[:20]
    assert rates(settings, 40, *range(40)) == whole


def test_beyond_its_schedule_a_run_keeps_the_last_rate() -> None:
    assert rates({"schedule": "constant", "schedule_steps": 10}, 20, 9, 10, 19) == [1, 1, 1]
    assert rates({"schedule": "inverse_sqrt", "schedule_steps": 10}, 20, 11) == rates(
        {"schedule": "inverse_sqrt", "schedule_steps": 10}, 20, 10
    )
    for schedule in ("linear", "cosine", "wsd"):
        with pytest.raises(ConfigError, match="is less than the 20 steps of the run, and") as said:
            rates({"schedule": schedule, "schedule_steps": 19}, 20)
        assert said.value.field == "train.schedule_steps"


def test_a_rate_that_jumps_on_a_resume_is_said() -> None:
    def said(now: dict[str, Any], steps: int, step: int = 50, before: dict[str, Any] | None = None) -> str | None:
        old, new = (TrainConfig.model_validate({"learning_rate": 1.0} | s) for s in (before or {}, now))
        return describe_change(old, 100, new, steps, step)

    assert said({}, 100) is None
    jump = (
        "The learning rate goes on from step 50 with 0.75, not 0.5 as in the job before: its schedule was for 100 steps"
    )
    assert said({}, 200) == jump
    assert (said({}, 200, step=100) or "").startswith("The learning rate goes on from step 100 with 0.5, not 0 as in")
    keeps = ", which --set train.schedule_steps=100 keeps"
    assert (said({}, 80) or "").endswith(keeps)
    assert said({"schedule_steps": 100}, 80) is None
    long = {"schedule_steps": 200}
    assert said(long, 200, before=long) is None
    assert said({"learning_rate": 0.5}, 100) == (
        "The learning rate goes on from step 50 with 0.25, not 0.5 as in the job before"
    )
