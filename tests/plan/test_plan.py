"""The arithmetic of a plan: steps, time, cost, what is exchanged, disk, and which strategy it names."""

from dataclasses import replace
from typing import Any

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.devices import DEVICES, Device
from clm_dist.errors import ConfigError
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.choices import advise, choices_of
from clm_dist.plan.counts import Count, Counts
from clm_dist.plan.duration import Network, exchanged_bytes, step_time
from clm_dist.plan.families import architecture_of
from clm_dist.plan.memory import Setting, largest_micro_size
from clm_dist.plan.plan import Plan, make_plan
from clm_dist.plan.speed import Speed
from clm_dist.plan.target import Target
from clm_dist.train.probe import passes_of

H100 = next(device for device in DEVICES if device.name == "h100-80")
T4 = next(device for device in DEVICES if device.name == "t4")
SPEED = Speed(10_000, 10_000, "measured")


def _job(**sections: Any) -> JobConfig:
    values: dict[str, Any] = {
        "name": "planned",
        "data": {"source": "builtin", "text": "text", "block_size": 128},
        "tokenizer": {"path": "gpt2"},
        "model": {"config": {"model_type": "gpt2"}},
        "batch": {"global_size": 256, "micro_size": 4},
        "train": {"precision": "bf16"},
        "cluster": {"workers": 8},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return JobConfig.model_validate(values)


def _gpt2(**values: Any) -> Architecture:
    found = architecture_of({"model_type": "gpt2"} | values)
    assert found is not None
    return found


def _counts(train: float = 10_000, evaluated: float = 1000) -> Counts:
    train_count, eval_count = (Count(number, number, number) for number in (train, evaluated))
    return Counts(train_count, eval_count, True, False, "counted", 50257)


def _plan(job: JobConfig, **options: Any) -> Plan:
    target = options.pop("target", None) or Target(H100, 8, (1, 2), 12.5e9, price=2.0)
    counts = options.pop("counts", None) or _counts()
    return make_plan(job, options.pop("model", None) or _gpt2(), counts, target, **options)


def test_steps_and_evaluations_are_those_of_the_run() -> None:
    plan = _plan(_job(), speed=SPEED)
    # 10,000 blocks in batches of 256: 40 an epoch, three epochs; baseline, one an epoch, the written model.
    assert (plan.steps_per_epoch, plan.steps, plan.evaluations) == (40, 120, 5)
    assert plan.tokens == 120 * 256 * 128
    plan = _plan(_job(train={"max_steps": 50}, eval={"every": 20}), speed=SPEED)
    assert (plan.steps, plan.evaluations) == (50, 3 + 2)


def test_the_time_is_that_of_steps_evaluations_and_start() -> None:
    speed = replace(SPEED, eval_tokens_per_s=50_000.0, start_s=7.0)
    (one, two) = _plan(_job(), speed=speed, target=Target(None, 8, (1, 2), 1e15, price=2.0)).scales
    steps = 120 * 256 * 128 / (8 * 10_000)
    evaluations = 5 * 1000 * 128 / (8 * 50_000)
    assert one.seconds == pytest.approx((steps + evaluations + 7 + 12,) * 2)
    assert two.seconds == pytest.approx(((steps + evaluations) / 2 + 7 + 12,) * 2, rel=1e-3)
    assert one.gpu_hours[0] == pytest.approx(one.seconds[0] * 8 / 3600)
    assert one.cost is not None
    assert one.cost[0] == pytest.approx(2 * one.gpu_hours[0])
    assert (one.passes, two.passes) == (8, 4)
    # Without a measured speed an evaluation is the third of a training pass that goes forward.
    (plain, _) = _plan(_job(), speed=SPEED, target=Target(None, 8, (1, 2), 1e15)).scales
    assert plain.seconds[0] == pytest.approx(steps + 5 * 1000 * 128 / (8 * 30_000) + 25)


def test_an_interval_of_the_speed_is_one_of_the_time() -> None:
    (scale, _) = _plan(_job(), speed=Speed(9_000, 11_000, "measured")).scales
    assert scale.seconds[0] < scale.seconds[1]


def test_passes_that_do_not_divide_evenly_cost_a_whole_one() -> None:
    """65 micro-batches on 64 workers are two passes, of which the second computes one."""
    job = _job(batch={"global_size": 65 * 4})
    (scale,) = _plan(job, speed=SPEED, target=Target(None, 64, (1,), 1e15)).scales
    assert scale.passes == 2
    assert scale.efficiency == pytest.approx(65 / 128, rel=0.02)


def test_a_short_last_pass_spares_time_to_a_single_worker_only() -> None:
    """Ten blocks in passes of eight: a worker computes ten; and of two workers one computes eight."""
    one, two = (Target(None, number, (1,), 1e15) for number in (1, 2))
    job = _job(batch={"global_size": 10, "micro_size": 8}, cluster={"workers": 2})
    assert _plan(job, speed=SPEED, target=one).scales[0].tokens_per_s == pytest.approx(10_000)
    assert _plan(job, speed=SPEED, target=two).scales[0].tokens_per_s == pytest.approx(10_000 * 10 / 8)
    # The default micro-batch is larger than this step.
    small = _job(batch={"global_size": 4, "micro_size": 8}, cluster={"workers": 1})
    assert _plan(small, speed=SPEED, target=one).scales[0].tokens_per_s == pytest.approx(10_000)
    assert _plan(small).setting.micro_size == 4


def test_blocks_of_a_pass_that_a_run_finds_are_those_that_fit() -> None:
    auto = _job(batch={"global_size": 256, "micro_size": "auto"}, cluster={"workers": 4})
    one = Target(Device("small", ("small",), 8 * 10**9, 1e12, 1e12, 1e12), 4, (1, 2), 12.5e9)
    plan = _plan(auto, speed=SPEED, target=one)
    most = largest_micro_size(_gpt2(), Setting.of_job(auto, 4, is_gpu=True), 8 * 10**9)
    assert 1 < plan.setting.micro_size <= most < 64
    # As even as a run makes them.
    assert plan.setting.micro_size == auto.batch.even_micro_size(most, 4)
    assert plan.setting.passes == -(-256 // (4 * plan.setting.micro_size))
    assert plan.scales[1].passes == -(-256 // (8 * auto.batch.even_micro_size(most, 8)))
    assert any("a pass has the blocks that fit small here; a run tries it" in note for note in plan.notes)
    # Fewer workers hold more of a strategy that shares it out, and a run on them finds fewer blocks.
    large = _gpt2(n_layer=24, n_embd=1024, n_head=16)
    eight = Target(replace(H100, memory_bytes=8e9), 4, (1, 4), 1e9)
    scales = []
    for workers in (4, 16):
        cluster = {"workers": workers, "strategy": "zero3"}
        shared = _job(batch={"global_size": 2048, "micro_size": "auto"}, cluster=cluster)
        plan = _plan(shared, model=large, speed=SPEED, target=eight)
        assert all(scale.fits for scale in plan.scales)
        assert not any("a larger batch.micro_size" in note for note in plan.notes)
        scales.append(plan.scales)
    assert scales[0] == scales[1]
    few, many = (2048 // (scale.workers * scale.passes) for scale in scales[0])
    assert few < many
    plan = _plan(auto, speed=SPEED, target=one)
    named = _plan(_job(batch={"global_size": 256, "micro_size": plan.setting.micro_size}), speed=SPEED, target=one)
    assert named.scales[0].seconds == plan.scales[0].seconds
    # What a probe found, and where nothing is known.
    assert _plan(auto, speed=replace(SPEED, micro_size=16), target=one).setting.micro_size == 16
    unknown = _plan(auto, speed=SPEED, target=Target(None, 4, (1,), 12.5e9))
    assert unknown.setting.micro_size == 1
    assert "batch.micro_size is auto, and 1 is taken: name a GPU" in unknown.notes[-1]


def test_a_probe_computes_the_passes_of_the_job() -> None:
    def passes(global_size: int, micro_size: int, workers: int) -> list[int]:
        return passes_of(
            _job(batch={"global_size": global_size, "micro_size": micro_size}, cluster={"workers": workers})
        )

    assert passes(10, 8, 1) == [8, 2]
    assert passes(4, 8, 1) == [4]
    assert passes(10, 8, 2) == [8]
    # As many as each of sixteen workers, where one GPU is measured.
    assert passes(256, 4, 16) == [4] * 4


def test_nodes_with_too_many_workers_are_named() -> None:
    plan = _plan(_job(), speed=SPEED, target=Target(H100, 8, (1, 8, 16), 12.5e9))
    assert [scale.nodes for scale in plan.scales] == [1, 8]
    assert plan.too_many == (16,)


@pytest.mark.parametrize(
    ("strategy", "passes", "bytes_a_parameter"),
    [("ddp", 3, 8), ("zero1", 3, 4), ("zero2", 3, 8), ("zero3", 3, 18), ("fsdp2", 3, 24)],
)
def test_workers_exchange_what_their_strategy_needs(strategy: str, passes: int, bytes_a_parameter: int) -> None:
    model = _gpt2()
    setting = Setting(strategy, 4, 1, 128, passes=passes, precision="bf16")
    assert exchanged_bytes(model, setting) == pytest.approx(bytes_a_parameter * model.num_parameters * 3 / 4)
    assert exchanged_bytes(model, replace(setting, world_size=1)) == 0


def test_workers_wait_for_what_is_not_exchanged_beside_the_passes() -> None:
    model = _gpt2()
    network = Network(8, 1e11, 1e9)
    setting = Setting("ddp", 16, 4, 128, passes=2)
    step = step_time(model, setting, 1e4, network)
    assert step.exchange == pytest.approx(exchanged_bytes(model, setting) / 1e9)
    # The backward pass of the second of two is a third of the step.
    assert step.waiting == pytest.approx(max(0, step.exchange - step.compute / 3))
    in_one_host = step_time(model, replace(setting, world_size=8), 1e4, network)
    assert in_one_host.exchange == pytest.approx(exchanged_bytes(model, replace(setting, world_size=8)) / 1e11)


def test_a_slow_network_is_said() -> None:
    job = _job(cluster={"strategy": "fsdp2", "workers": 16})
    plan = _plan(job, speed=replace(SPEED, low=1e6, high=1e6), target=Target(H100, 8, (2,), 1e9))
    assert plan.scales[0].waiting > 0.5
    (note,) = plan.notes
    assert note.startswith("on 2 nodes workers wait for each other in ")
    assert "a larger batch.micro_size (up to " in note


def test_a_speed_is_assumed_only_where_one_was_measured() -> None:
    eager, compiled = _plan(_job()), _plan(_job(train={"compile": True}))
    assert eager.speed is not None and compiled.speed is not None
    # 6N + 12LTd operations a token at 10 to 20 % of 989e12.
    flops = 6 * 124_439_808 + 12 * 12 * 128 * 768
    assert eager.speed.low == pytest.approx(0.1 * 989e12 / flops)
    assert compiled.speed.high == pytest.approx(0.42 * 989e12 / flops)
    assert "assumed from measurements on one H200" in eager.speed.how
    given = _plan(_job(), mfu=(0.5, 0.5)).speed
    assert given is not None
    assert given.low == given.high == pytest.approx(0.5 * 989e12 / flops)
    recomputed = _plan(_job(train={"gradient_checkpointing": True}), mfu=(0.5, 0.5)).speed
    assert recomputed is not None
    assert recomputed.low == pytest.approx(given.low * 3 / 4)
    for plan, why in (
        (_plan(_job(train={"precision": "fp32"})), "was not measured; set train.precision to bf16"),
        (_plan(_job(), model=_gpt2(n_layer=2, n_embd=64, n_head=2)), "models below 50 million parameters"),
    ):
        assert plan.speed is None
        assert plan.scales == ()
        assert any(why in note for note in plan.notes)


def test_the_advice_names_what_makes_the_shortest_steps() -> None:
    one_host = Target(H100, 8, (1,), 12.5e9)
    # Beside NVLink nothing has to wait, and what comes first is taken.
    assert _plan(_job(), target=one_host).advice == "ddp fits, and nothing that fits makes shorter steps"
    # In bf16 ZeRO exchanges half as much, which counts between hosts.
    slow = _plan(_job(cluster={"workers": 16}), target=Target(H100, 8, (2,), 12.5e9)).advice
    assert slow == "ddp fits; so does zero1, which makes shorter steps"
    recomputed = _plan(_job(train={"gradient_checkpointing": True}), target=one_host).advice
    assert recomputed == "ddp with train.gradient_checkpointing fits; so does ddp, which makes shorter steps"
    llama = architecture_of({"model_type": "llama"})
    assert "ddp does not fit; take " in _plan(_job(), model=llama, target=one_host).advice
    small = replace(H100, memory_bytes=2 * 2**30)
    assert _plan(_job(), model=llama, target=Target(small, 8, (1,), 12.5e9)).advice.startswith("nothing fits")
    assert _plan(_job(), target=Target(None, 8, (1,), 12.5e9)).advice == "name a GPU with --gpu to see what fits"
    medium = Target(replace(H100, memory_bytes=12 * 2**30), 8, (1,), 12.5e9)
    too_large = _plan(_job(batch={"global_size": 8192, "micro_size": 1024}), target=medium).advice
    assert too_large.startswith("batch.micro_size 1024 fits nowhere; take ddp")


def test_nodes_on_which_a_job_does_not_fit_are_marked() -> None:
    llama = architecture_of({"model_type": "llama"})
    job = _job(cluster={"strategy": "fsdp2", "workers": 64}, batch={"global_size": 512, "micro_size": 4})
    scales = _plan(job, model=llama, target=Target(replace(H100, memory_bytes=40 * 2**30), 1, (1, 64), 12.5e9)).scales
    assert [scale.fits for scale in scales] == [False, True]
    assert scales[0].memory.total > scales[1].memory.total
    assert all(scale.fits is None for scale in _plan(_job(), speed=SPEED, target=Target(None, 1, (1,), 1e9)).scales)


def test_what_compiles_by_itself_is_as_long_as_that_pays() -> None:
    auto = _job(train={"compile": "auto"}, cluster={"workers": 1})
    short, long = (_plan(auto, counts=_counts(number)) for number in (10_000, 1_000_000))
    assert (short.setting.is_compiled, long.setting.is_compiled) == (False, True)
    assert "10 to 20 %" in short.speed.how if short.speed else False
    zero3 = _plan(_job(train={"compile": True}, cluster={"strategy": "zero3"}))
    ddp = _plan(_job(train={"compile": True}))
    assert not zero3.setting.is_compiled
    # Other strategies of the same job are compiled as they would be.
    assert zero3.choices[0].memory == ddp.choices[0].memory


def test_an_evaluation_that_takes_more_than_training_counts() -> None:
    small, large = (_plan(_job(eval={"micro_size": size})).choices[0].memory for size in (8, 4096))
    # Logits in bf16, and two tensors in fp32 for the tokens whose loss is computed at once.
    assert large.loss == 50257 * (4096 * 128 * 2 + 256 * 8)
    assert large.total > 50 * 2**30 > small.total


def test_blocks_above_the_models_context_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.block_size is 2048, above the model's context of 1024"):
        _plan(_job(data={"block_size": 2048}))


def test_a_gpu_without_bf16_is_said() -> None:
    on_t4 = Target(T4, 1, (1,), 1e9)
    plan = _plan(_job(), target=on_t4)
    assert plan.speed is None
    assert any("has no bf16" in note for note in plan.notes)
    assert _plan(_job(), target=on_t4, mfu=(0.1, 0.1)).speed is not None
    assert _plan(_job(train={"precision": "fp16"}), target=on_t4).speed is not None


def test_the_disk_holds_blocks_checkpoints_and_the_model() -> None:
    number = 124_439_808
    disk = _plan(_job()).disk
    assert disk.store == 11_000 * 128 * 2
    assert disk.while_preparing == disk.store
    assert disk.checkpoint == 12 * number
    # Two newest, the best, and the one that is written.
    assert disk.checkpoints == 4 * 12 * number
    assert disk.model == 4 * number
    assert disk.total == 2 * disk.store + disk.checkpoints + disk.model
    kept = _plan(_job(train={"keep": "best"}, checkpoint={"keep": 5}, cluster={"strategy": "zero2"}), counts=_many())
    assert kept.disk.checkpoints == 8 * 12 * number
    assert kept.disk.model == 2 * number
    assert kept.disk.store == 11_000 * 128 * 4
    assert kept.disk.while_preparing == 0


def _many() -> Counts:
    return replace(_counts(), vocabulary=128_256, is_prepared=True)


def test_recomputing_comes_before_offloading() -> None:
    """What is offloaded goes over PCIe twice a step; recomputing costs a third more time."""
    setting = Setting("ddp", 8, 4, 128)
    found = choices_of(_gpt2(), setting, H100)
    fitting = [("ddp", "none", True), ("zero2", "optimizer", False)]
    few = [replace(one, fits=(one.strategy, one.offload, one.gradient_checkpointing) in fitting) for one in found]
    said = advise(setting, few, H100, lambda choice: 4 / 3 if choice.gradient_checkpointing else 1.0)
    assert "take ddp with train.gradient_checkpointing" in said
