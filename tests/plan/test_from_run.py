"""The speed of a job from another run's records."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from clm_dist.config.job import JobConfig
from clm_dist.devices import DEVICES, device_of
from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.metrics import flops_per_token
from clm_dist.plan.architecture import Architecture
from clm_dist.plan.duration import Network, exchanged_bytes, step_time
from clm_dist.plan.families import architecture_of
from clm_dist.plan.from_run import speed_of_run
from clm_dist.plan.memory import Setting
from clm_dist.plan.speed import interval_of_steps, measure

H100, H200 = (next(device for device in DEVICES if device.name == name) for name in ("h100-80", "h200"))


def _start(**values: Any) -> dict[str, Any]:
    record = {"kind": "start", "step": 0, "num_steps": 100, "time": 0.0, "pid": 1, "workers": 2, "strategy": "ddp"}
    return record | {"device": "CPU", "owes_evaluation": False, "startup": 21.0, "micro_size": 4} | values


def _step(number: int, seconds: float = 0.5, tokens: int = 2048, **values: Any) -> dict[str, Any]:
    record = {"kind": "step", "step": number, "epoch": 0.1, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0}
    return record | {"tokens": tokens, "seconds": seconds, "tokens_per_s": tokens / seconds, "mfu": None} | values


def _eval(seconds: float = 2.0, num_tokens: int = 12_700) -> dict[str, Any]:
    record = {"kind": "eval", "step": 0, "epoch": 0.0, "loss": 3.0, "perplexity": 20.0, "bits_per_byte": 1.0}
    return record | {"num_tokens": num_tokens, "seconds": seconds}


def _job(**sections: Any) -> JobConfig:
    values: dict[str, Any] = {
        "name": "subset",
        "data": {"source": "builtin", "text": "text", "block_size": 128},
        "tokenizer": {"path": "gpt2"},
        "model": {"config": {"model_type": "gpt2", "vocab_size": 50257}},
        "batch": {"global_size": 16, "micro_size": 4},
        "train": {"precision": "bf16"},
        "cluster": {"workers": 2},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    return JobConfig.model_validate(values)


def _run(directory: Path, job: JobConfig, records: list[dict[str, Any]]) -> Path:
    run = RunDir(directory / "subset")
    run.root.mkdir(parents=True)
    run.job.write_text(yaml.safe_dump(job.model_dump(mode="json")))
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run.root


def _gpt2(**values: Any) -> Architecture:
    found = architecture_of({"model_type": "gpt2"} | values)
    assert found is not None
    return found


GPT2 = _gpt2()


def test_a_speed_is_that_of_the_steps_on_the_last_workers() -> None:
    slow = [_start(workers=8), _eval(seconds=99.0), *(_step(n, seconds=5.0, memory_bytes=99) for n in range(1, 20))]
    found = measure([*slow, _start(startup=33.0), _step(20, seconds=9.0), *(_step(n) for n in range(21, 41)), _eval()])  # type: ignore[list-item]
    assert found is not None
    # The first twentieth is left out, and with it the step that is slow.
    assert (found.low + found.high) / 2 == pytest.approx(2048 / 0.5 / 2, rel=0.02)
    assert (found.num_steps, found.start_s, found.workers) == (19, 33.0, 2)
    assert found.eval_seconds == (2.0, 12_700)
    assert found.memory_bytes is None


def test_starts_on_the_same_workers_are_measured_together() -> None:
    records = [
        _start(),
        *(_step(n) for n in range(1, 41)),
        _eval(),
        _start(),
        *(_step(n) for n in range(41, 45)),
        _eval(),
    ]
    found = measure(records)  # type: ignore[arg-type]
    assert found is not None
    # Of each start the first twentieth is left out.
    assert (found.num_steps, found.eval_seconds) == (38 + 3, (4.0, 25_400))


def test_an_interval_is_two_standard_deviations_and_never_nothing() -> None:
    low, high = interval_of_steps([(100, 1.0)] * 40, 1)
    assert (low, high) == pytest.approx((97, 103))
    low, high = interval_of_steps([(100, 1.0), (100, 1.25)] * 10, 1)
    # The speeds are 100 and 80; of twenty of each the standard deviation is 10.26.
    assert high - low == pytest.approx(4 * 10.26, rel=0.01)
    assert (low + high) / 2 == pytest.approx(2000 / 22.5)


def test_the_same_job_on_more_data_has_the_speed_of_the_run(tmp_path: Path) -> None:
    path = _run(tmp_path, _job(), [_start(), *(_step(n) for n in range(1, 60)), _eval()])
    found = speed_of_run(path, _job(), GPT2, None, 12.5e9)
    assert found.speed.middle == pytest.approx(2048, rel=0.01)
    # 127 of a block's 128 tokens are predicted.
    assert found.speed.eval_tokens_per_s == pytest.approx(12_800 / 2 / 2)
    assert found.speed.start_s == 21
    assert (found.device, found.workers_per_node, found.notes) == (None, 2, ())
    assert found.speed.how == f"measured in 56 steps of {path}, on 2 x CPU"


@pytest.mark.parametrize(
    ("sections", "blocks"),
    [
        ({"train": {"optimizer": "lion"}}, 4),
        ({"eval": {"micro_size": 64}}, 4),
        ({"train": {"gradient_checkpointing": True}}, None),
        ({"batch": {"micro_size": 8}}, None),
    ],
)
def test_memory_is_that_of_the_run_where_all_is_the_same_that_it_depends_on(
    sections: dict[str, dict[str, Any]], blocks: int | None, tmp_path: Path
) -> None:
    path = _run(tmp_path, _job(), [_start(), *(_step(n, memory_bytes=99) for n in range(1, 60)), _eval()])
    same = speed_of_run(path, _job(), GPT2, None, 12.5e9).speed
    other = speed_of_run(path, _job(**sections), GPT2, None, 12.5e9).speed
    assert (same.memory_bytes, same.micro_size) == (99, 4)
    assert (other.memory_bytes, other.micro_size) == (None, blocks)


def test_the_options_of_an_optimizer_are_part_of_it(tmp_path: Path) -> None:
    one, other = (_job(train={"optimizer": "lion", "optimizer_options": {"x": x}}) for x in (1, 2))
    path = _run(tmp_path, one, [_start(), *(_step(n, memory_bytes=99) for n in range(1, 60)), _eval()])
    assert speed_of_run(path, one, GPT2, None, 12.5e9).speed.memory_bytes == 99
    assert speed_of_run(path, other, GPT2, None, 12.5e9).speed.memory_bytes is None


def test_a_larger_model_takes_as_much_longer_as_it_computes(tmp_path: Path) -> None:
    path = _run(tmp_path, _job(), [_start(), *(_step(n) for n in range(1, 60))])
    larger = _gpt2(n_layer=24)
    job = _job(model={"config": {"model_type": "gpt2", "vocab_size": 50257, "n_layer": 24}})
    found = speed_of_run(path, job, larger, None, 12.5e9)
    operations = [flops_per_token(m.num_parameters, m.num_layers, m.hidden, 128) for m in (GPT2, larger)]
    assert found.speed.middle == pytest.approx(2048 * operations[0] / operations[1], rel=0.01)


def test_what_differs_and_may_change_the_speed_is_said(tmp_path: Path) -> None:
    path = _run(tmp_path, _job(), [_start(), *(_step(n) for n in range(1, 60))])
    job = _job(train={"compile": True}, batch={"micro_size": 8})
    notes = speed_of_run(path, job, GPT2, None, 12.5e9).notes
    assert [note.partition(":")[0] for note in notes] == [
        "train.compile is False, and True here",
        "batch.micro_size is 4, and 8 here",
    ]


def test_from_one_gpu_to_another_the_speed_goes_with_their_peaks(tmp_path: Path) -> None:
    records = [_start(workers=1, device="NVIDIA A100-SXM4-80GB"), *(_step(n) for n in range(1, 60))]
    path = _run(tmp_path, _job(), records)
    found = speed_of_run(path, _job(), GPT2, H100, 12.5e9)
    assert found.speed.middle == pytest.approx(4096 * 989 / 312, rel=0.01)
    assert any("scaled by the peaks" in note for note in found.notes)
    assert found.device == device_of("NVIDIA A100-SXM4-80GB")
    unknown = _run(tmp_path / "other", _job(), [_start(workers=1, device="NVIDIA X1"), *records[1:]])
    found = speed_of_run(unknown, _job(), GPT2, H100, 12.5e9)
    assert found.speed.middle == pytest.approx(4096, rel=0.01)
    assert any("NVIDIA X1, which is not known here" in note for note in found.notes)
    assert (found.device, found.is_gpu) == (None, True)


def test_a_run_on_cpus_says_nothing_of_gpus(tmp_path: Path) -> None:
    path = _run(tmp_path, _job(), [_start(), *(_step(n) for n in range(1, 60))])
    with pytest.raises(ConfigError, match="measured on a CPU, which says nothing of h100-80"):
        speed_of_run(path, _job(), GPT2, H100, 12.5e9)


def test_waiting_for_others_is_taken_out_of_the_speed_of_a_worker(tmp_path: Path) -> None:
    """Sixteen GPUs on two hosts whose network is slow: with it, the step takes as long as it did."""
    job = _job(cluster={"workers": 16, "strategy": "zero2"}, batch={"global_size": 256, "micro_size": 16})
    between_nodes = 1e9
    setting = Setting.of_job(job, 16, is_gpu=True)
    network = Network(8, H200.link, between_nodes)
    alone = 100_000.0
    seconds = step_time(GPT2, setting, alone, network).total
    assert seconds > 1.5 * setting.micro_size * 128 / alone
    assert exchanged_bytes(GPT2, setting) > 0
    hosts = ["a"] * 8 + ["b"] * 8
    start = _start(workers=16, device="NVIDIA H200", hosts=hosts, micro_size=16)
    path = _run(tmp_path, job, [start, *(_step(n, seconds=seconds, tokens=256 * 128) for n in range(1, 60))])
    found = speed_of_run(path, job, GPT2, None, between_nodes)
    assert found.speed.middle == pytest.approx(alone, rel=0.01)
    assert found.workers_per_node == 8


def test_a_run_that_says_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--from nowhere is no run directory"):
        speed_of_run(Path("nowhere"), _job(), GPT2, None, 12.5e9)
    path = _run(tmp_path, _job(), [_start(), _step(1), _step(2)])
    with pytest.raises(ConfigError, match="has trained too few steps"):
        speed_of_run(path, _job(), GPT2, None, 12.5e9)
