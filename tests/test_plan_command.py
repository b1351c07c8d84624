"""`clm-dist plan`: what it prints, what it loads, and what it refuses."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clm_dist.config.job import JobConfig
from clm_dist.files.atomic import read_json
from clm_dist.files.plan_file import read_plan
from clm_dist.files.run_dir import RunDir
from clm_dist.quantities import show_bytes
from tests.conftest import MakeJob, WriteJob
from tests.support.command import Said, cells, clm_dist, modules_of
from tests.support.runs import metrics_of

PlanCommand = Callable[..., Said]
GPU = ("--gpu", "h100-80", "--mfu", "0.1-0.2")


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stores: Path) -> PlanCommand:
    return lambda *arguments: clm_dist(capsys, monkeypatch, "plan", *arguments, "--store", stores)


def _values(said: Said) -> Any:
    assert said.code == 0, said.err
    return json.loads(said.out)


def test_a_plan_is_what_the_run_was(plan: PlanCommand, finished_run: RunDir) -> None:
    """Steps, tokens, parameters, blocks, evaluations and bytes of a run that is done."""
    values = _values(plan(finished_run.job, "--json"))
    result = read_json(finished_run.result)
    weights = finished_run.final / "model.safetensors"
    assert values["steps"] == result["train"]["steps"]
    assert values["evaluations"] == len(result["evals"]) + 2
    assert values["counts"]["is_prepared"]
    assert values["disk"]["model"] == pytest.approx(weights.stat().st_size, rel=0.05)
    checkpoint = next(finished_run.checkpoints.glob("step-*"))
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    assert values["disk"]["checkpoint"] == pytest.approx(size, rel=0.15)


def test_a_plan_is_readable_at_80_columns(
    plan: PlanCommand, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clm_dist.progress.out.width", 80, raising=False)
    said = plan(write_job("batch.global_size=512"), *GPU, "--price", "2.5", "--set", "train.precision=bf16")
    assert said.code == 0, said.err
    assert said.out.startswith("tiny: gpt2, ")
    tables = [line for line in said.out.splitlines() if line.startswith("  ")]
    assert tables
    assert max(map(len, tables)) <= 80
    for part in ("weights", "optimizer", "logits and loss", "at most at once", "of h100-80", "ddp *", "fsdp2", "cost"):
        assert part in said.out
    assert re.search(r"^speed:  .* tokens/s a worker: 10 to 20 % of the peak, as given$", said.out, re.MULTILINE)


def test_json_has_intervals_and_totals(plan: PlanCommand, write_job: WriteJob) -> None:
    values = _values(plan(write_job("batch.global_size=512"), *GPU, "--price", "2", "--nodes", "1,4", "--json"))
    assert [scale["nodes"] for scale in values["scales"]] == [1, 4]
    low, high = values["scales"][0]["cost"]
    assert 0 < low <= high
    assert all(choice["memory"]["total"] > 0 for choice in values["choices"])
    assert values["disk"]["total"] > values["disk"]["checkpoints"]


def test_a_plan_of_prepared_blocks_loads_neither_torch_nor_ray(
    write_job: WriteJob, make_job: MakeJob, prepared: Callable[[JobConfig], Path], stores: Path
) -> None:
    prepared(make_job())
    out, modules = modules_of("plan", write_job(), *GPU, "--store", stores)
    assert "prepared in" in out
    assert not {name.partition(".")[0] for name in modules} & {"torch", "ray", "transformers", "datasets", "deepspeed"}


def test_the_speed_of_a_run_is_that_of_the_plan(plan: PlanCommand, finished_run: RunDir) -> None:
    values = _values(plan(finished_run.job, "--from", finished_run.root, "--json"))
    (scale,) = values["scales"]
    assert (scale["nodes"], scale["workers"]) == (1, 1)
    speed = values["speed"]
    assert speed["low"] < speed["high"]
    assert str(finished_run.root) in speed["how"]
    said = plan(finished_run.job, "--from", finished_run.root)
    assert "worker-hours" in said.out
    refused = plan(finished_run.job, "--from", finished_run.root, "--gpu", "h100-80")
    assert refused.code == 2
    assert "says nothing of h100-80" in refused.err


def test_the_loss_is_that_of_a_curve_through_runs(plan: PlanCommand, finished_run: RunDir, tmp_path: Path) -> None:
    """Of a run, and of a copy of it on half the data with a loss that is higher."""
    half = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "half")))
    data, result = read_json(half.data), read_json(half.result)
    data["splits"]["train"]["num_blocks"] //= 2
    result["final"]["loss"] += 0.3
    result["final"]["epoch"] *= 2
    losses = np.load(half.eval_losses)
    np.save(half.eval_losses, losses + 0.3 * losses[:, 1:] * [1, 0])
    half.data.write_text(json.dumps(data))
    half.result.write_text(json.dumps(result))
    runs = ("--losses", half.root, "--losses", finished_run.root)
    values = _values(plan(finished_run.job, *runs, "--json"))["loss"]
    loss, last = values["expected"]["loss"], result["final"]["loss"] - 0.3
    assert [point["loss"] for point in values["points"]] == pytest.approx([last + 0.3, last])
    assert loss["low"] < last < loss["high"]
    lines = plan(finished_run.job, *runs).out.splitlines()
    (line,) = (number for number, line in enumerate(lines) if line.startswith("loss:"))
    assert lines[line].startswith(f"loss:   {loss['value']:.3f} ({loss['low']:.3f} to {loss['high']:.3f}), perplexity ")
    assert "95 % interval of a power law through 2 runs, at 1 times the tokens of the largest" in lines[line + 1]
    assert lines[line + 2].endswith("like theirs, and if another seed changes the loss by 0.02 nats;")
    assert _values(plan(finished_run.job, "--json"))["loss"] is None


def test_a_probe_measures_here(plan: PlanCommand, write_job: WriteJob) -> None:
    values = _values(plan(write_job("batch.global_size=16"), "--probe", "3", "--json"))
    assert "measured here in" in values["speed"]["how"]
    assert 0 < values["speed"]["low"] < values["speed"]["high"]
    assert values["speed"]["memory_bytes"] > 2**26
    assert values["speed"]["eval_tokens_per_s"] > 0
    (sizes,) = (note for note in values["notes"] if "by batch.micro_size" in note)
    assert re.search(r"4: [\d,]+, 8: [\d,]+.*the fastest is \d", sizes)


def test_a_model_without_a_formula_is_built_without_weights(plan: PlanCommand, write_job: WriteJob) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = '{"model_type": "bloom", "n_layer": 2, "hidden_size": 32, "n_head": 2}'
    values = _values(plan(write_job(f"model.config={config}"), "--json"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("bloom", n_layer=2, hidden_size=32, n_head=2, vocab_size=300)
        )
    assert values["num_parameters"] == model.num_parameters()
    assert any("bloom has no formula here" in note for note in values["notes"])


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--gpu", "h1000"), "the GPU h1000 is not known; take one of b200, h200, "),
        (("--memory-gib", "24"), "--tflops is missing"),
        (("--tflops", "100"), "--memory-gib is missing"),
        ((*GPU, "--nodes", "one"), "--nodes one is not a list of numbers; write 1,2,4,8"),
        ((*GPU, "--nodes", "0"), "--nodes 0 is not a list of numbers"),
        (("--gpu", "h100-80", "--mfu", "40"), "--mfu 40 is not a share of the peak; write 0.4, or 0.3-0.5"),
        (("--gpu", "h100-80", "--mfu", "0.5-0.4"), "--mfu 0.5-0.4 is not a share"),
        (("--probe", "5", "--from", "runs/x"), "--probe and --from say where the speed is from"),
        (("--mfu", "0.5", "--from", "runs/x"), "--mfu and --from say where the speed is from"),
        ((*GPU, "--price", "inf"), "--price inf is not a number"),
        (("--memory-gib", "80", "--tflops", "inf"), "--tflops inf is not a number"),
        (("--set", "model.config.n_head=0"), "model.config: n_head is 0, and should be a number from 1 on"),
        (("--set", "model.config.n_layer=-3"), "model.config: n_layer is -3"),
        (("--set", "model.config.n_embd=4096.5"), "model.config: n_embd is 4096.5"),
        (("--set", "model.config.n_embd=abc"), "model.config: n_embd is 'abc'"),
        (("--set", "model.config={model_type: reformer}"), "no reformer can be built"),
        (("--set", "data.block_size=128"), "data.block_size is 128, above the model's context of 64"),
        (("--losses", "runs/nothing", "--losses", "runs/nothing"), "runs/nothing is no run directory"),
        (("--losses", "runs/nothing"), "--losses takes two or more runs on parts of the data"),
        (("--from", "runs/nothing"), "--from runs/nothing is no run directory"),
        (("--probe", "2", "--gpu", "h100-80"), "measured on a CPU, which says nothing of h100-80"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_refused(
    plan: PlanCommand, write_job: WriteJob, arguments: tuple[str, ...], problem: str
) -> None:
    said = plan(write_job(), *arguments)
    assert said.code == 2
    assert problem in said.err.replace("\n", " ")


def test_a_model_that_is_not_there_is_refused(plan: PlanCommand, write_job: WriteJob, tmp_path: Path) -> None:
    said = plan(write_job(), "--set", "model.config=null", "--set", f"model.path={tmp_path}")
    assert said.code == 2
    assert "has no config.json that can be read" in said.err.replace("\n", " ")


def test_an_embedding_that_is_enlarged_has_the_rows_of_the_tokenizer(
    plan: PlanCommand, write_job: WriteJob, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "vocab_size": 100}')
    job = write_job("model.config=null", f"model.path={tmp_path}")
    plain, enlarged = (_values(plan(job, "--json", "--set", f"model.resize={value}")) for value in ("false", "true"))
    assert enlarged["num_parameters"] - plain["num_parameters"] == 200 * 32


def test_a_gpu_of_ones_own_has_the_memory_and_the_peak_that_are_said(plan: PlanCommand, write_job: WriteJob) -> None:
    def planned(memory_gib: str, tflops: str, setting: str = "train.precision=bf16") -> Any:
        said = ("--mfu", "0.5", "--gpus-per-node", "1", "--json", "--memory-gib", memory_gib, "--tflops", tflops)
        return _values(plan(write_job(setting), *said))

    assert planned("80", "100")["speed"] == planned("80", "100", "train.precision=tf32")["speed"]
    none, enough = planned("0.5", "100"), planned("24", "200")
    # CUDA alone takes more than half a GiB.
    assert none["advice"].startswith("nothing fits")
    assert enough["advice"].startswith("ddp fits")
    assert enough["speed"]["low"] == pytest.approx(2 * none["speed"]["low"])


@pytest.mark.parametrize("cluster", ["slurm", "k8s"])
def test_a_submission_prints_its_plan_first(
    cluster: str, write_job: WriteJob, stores: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = write_job(
        "cluster.slurm.nodes=2",
        "cluster.slurm.gpus_per_node=1",
        "cluster.k8s.pods=2",
        "cluster.k8s.gpus_per_pod=1",
        "cluster.workers=2",
        "train.precision=bf16",
    )
    options = ("--dry-run", *(("--store", stores) if cluster == "slurm" else ("--image", "i", "--claim", "c")))
    plain = clm_dist(capsys, monkeypatch, "submit", cluster, job, *options)
    assert plain.code == 0, plain.err
    planned = clm_dist(capsys, monkeypatch, "submit", cluster, job, *options, "--plan", "a100-80")
    # What is submitted stays the same, and alone on standard output.
    assert (planned.code, planned.out) == (0, plain.out)
    assert "memory of a100-80: ddp on 2 workers" in planned.err
    refused = clm_dist(capsys, monkeypatch, "submit", cluster, job, *options, "--plan", "a1000")
    assert refused.code == 2
    assert "the GPU a1000 is not known" in refused.err


def test_a_saved_plan_stands_in_the_report_of_its_run(
    plan: PlanCommand, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan that is made before its run, with the speed of another one."""
    runs = run.root.parent.rename(run.root.parent.with_name("it's the 'runs'"))
    measured, planned = RunDir(runs / "tiny"), RunDir(runs / "again")
    options = ("--set", "name=again", "--from", measured.root, "--runs", runs, "--save")
    said = plan(measured.job, *options, "--json")
    values = _values(said)
    saved = read_plan(planned)
    assert isinstance(saved, dict)
    assert saved["plan"] == values
    assert said.err == (
        f"the plan is in {planned.plan}; `clm-dist report {shlex.quote(str(planned.root))}` shows it beside what came\n"
    )
    # There is no run yet.
    refused = clm_dist(capsys, monkeypatch, "report", planned.root)
    assert (refused.code, "has a plan, and its run has not begun; start it with `clm-dist run" in refused.err) == (
        2,
        True,
    )
    status = clm_dist(capsys, monkeypatch, "status", "again", "--runs", runs)
    assert cells(status.out, "again") == ["again", "not begun", "", "", ""]
    assert re.search(r"^again: planned \S+ s \(", status.out, re.MULTILINE)
    # It is the run itself.
    shutil.copytree(measured.root, planned.root, dirs_exist_ok=True)
    said = clm_dist(capsys, monkeypatch, "report", planned.root)
    lines = [re.split(r"  +", line.strip()) for line in said.out.splitlines()]
    found = {line[0]: line[1:] for line in lines if line[-1].endswith(("the interval", "as planned"))}
    assert list(found) == ["time", "tokens/s", "memory of a worker", "worker-hours", "steps"]
    assert found["steps"] == ["24", "24", "as planned"]
    assert found["tokens/s"][2].endswith("inside the interval")
    assert found["memory of a worker"][2] == "inside the interval"
    page = planned.report.read_text()
    assert "Beside the plan" in page
    assert f'<td class="text">{found["time"][0]}</td>' in page
    status = clm_dist(capsys, monkeypatch, "status", "again", "--runs", runs)
    assert re.search(r"^again: planned .*; took \S+ s, (in|out)side the interval$", status.out, re.MULTILINE)


def test_saving_over_the_run_of_another_job_is_said(plan: PlanCommand, run: RunDir) -> None:
    said = plan(run.job, "--save", "--runs", run.root.parent, "--set", "train.max_steps=3")
    assert said.code == 0
    assert said.err.splitlines()[1] == (
        f"note: there is already a run in {run.root}: the plan is of another job than the run, and is not compared "
        "with it: train.max_steps differs"
    )
    assert len(plan(run.job, "--save", "--runs", run.root.parent).err.splitlines()) == 1


def test_a_plan_that_cannot_be_kept_says_so(plan: PlanCommand, run: RunDir, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = plan(run.job, "--save", "--runs", tmp_path / "file")
    assert (said.code, str(tmp_path / "file") in said.err) == (2, True)
    assert plan(run.job, "--runs", tmp_path / "file").code == 0
    run.plan.mkdir()
    said = plan(run.job, "--save", "--runs", run.root.parent)
    # Before anything is planned, which may take a probe.
    assert (said.code, said.out) == (2, "")
    assert f"error: {run.plan} is not a file, so no plan can be kept there; remove it" in said.err.replace("\n", " ")


def test_the_memory_of_a_run_stands_in_the_text(plan: PlanCommand, run: RunDir) -> None:
    most = max(record.get("memory_bytes", 0) for record in metrics_of(run.metrics))
    line = f"note:   the worker of rank 0 took {show_bytes(most)} in that run"
    assert line in plan(run.job, "--from", run.root).out
    assert line in plan(run.job, "--from", run.root, "--set", "batch.micro_size=8").out
    # Of a pass of another size it is not the memory of the job.
    memory = [_values(plan(run.job, "--from", run.root, "--json", *o))["speed"]["memory_bytes"] for o in _PASSES]
    assert memory == [most, None]


_PASSES = ((), ("--set", "batch.micro_size=8"))
