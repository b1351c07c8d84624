"""Whatever is wrong with a job: exit code 2, one message with cause, fix and place, and nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from clm_dist.config.load import job_text
from clm_dist.files.run_dir import RunDir
from clm_dist.train.ray.cluster import Cluster
from tests.conftest import MakeJob, WriteJob
from tests.support.command import Said, clm_dist

Run = Callable[..., Said]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, stores: Path) -> Run:
    """`clm-dist run` with `--set` settings; checks that a wrong job leaves no run and no part of a store behind."""

    def call(job: Path, *settings: str, options: tuple[str, ...] = ()) -> Said:
        sets = [part for setting in settings for part in ("--set", setting)]
        runs, before = tmp_path / "runs", set(stores.iterdir())
        said = clm_dist(capsys, monkeypatch, "run", job, *sets, "--runs", runs, "--store", stores, *options)
        assert said.code == 2, said.err
        assert "Traceback" not in said.err
        assert said.err.count("error: ") == 1
        left = [path for path in runs.glob("*") if not path.name.startswith(".")]
        assert not left or "exists with another job" in said.err
        made = [path for path in stores.iterdir() if path.is_dir() and path not in before]
        assert all((store / "manifest.json").is_file() for store in made)
        return said

    return call


def test_a_wrong_key_ends_in_2_before_anything_is_loaded(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("name: a\ndata: {source: builtin}\nmodel: {path: gpt2}\ntrain:\n  epoch: 3\n")
    command = [sys.executable, "-X", "importtime", "-m", "clm_dist", "run", str(job)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert f"error: {job}:5: unknown key train.epoch; did you mean epochs?" in ended.stderr
    loaded = {line.split("|")[-1].strip() for line in ended.stderr.splitlines() if line.startswith("import time")}
    assert not loaded & {"torch", "ray", "transformers", "datasets"}


def test_data_paths_and_files(run: Run, write_job: WriteJob, tmp_path: Path, cluster: Cluster) -> None:
    job = write_job()
    line = next(n for n, text in enumerate(job.read_text().splitlines(), 1) if "path:" in text and "corpus" in text)
    assert "matches no file" in run(job, f"data.path={tmp_path}/none*.jsonl").err
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": \n')
    assert f"{broken}:2: not a JSON record" in run(job, f"data.path={broken}").err
    said = run(job, "data.text=answers.body")
    assert "--set data.text=answers.body: data.text answers.body is not in" in said.err
    assert "its fields are: topic, text" in said.err
    # A field of the file itself is named with its line.
    job.write_text(job.read_text().replace("corpus.jsonl", "gone.jsonl"))
    assert f"error: {job}:{line}: data.path" in run(job).err


def test_texts_that_do_not_fill_a_block(run: Run, write_job: WriteJob, tmp_path: Path, cluster: Cluster) -> None:
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"word {i}"}) + "\n" for i in range(5)))
    said = run(write_job(), f"data.path={short}")
    assert "less than one block of 32; take more records, lower data.block_size" in said.err
    short.write_text('{"text": ""}\n{"text": null}\n' * 5)
    assert "is empty in all" in run(write_job(), f"data.path={short}").err
    said = run(write_job(), "data.split='train[:2]'", "data.split_method=hash", "data.eval_fraction=0.001")
    assert "--set data.eval_fraction=0.001: data.eval_fraction 0.001 cannot split 2 records" in said.err


def test_a_block_above_the_model_s_context(run: Run, write_job: WriteJob) -> None:
    said = run(write_job(), "data.block_size=65")
    assert "--set data.block_size=65: data.block_size is 65, above the model's context of 64; set" in said.err


def test_a_model_that_is_nowhere(run: Run, write_job: WriteJob, tmp_path: Path) -> None:
    said = run(write_job(), "model.config=null", "model.path=nobody/nothing")
    assert "model.path nobody/nothing is neither a model's directory nor reachable on the Hub" in said.err
    (tmp_path / "empty").mkdir()
    said = run(write_job(), "model.config=null", f"model.path={tmp_path / 'empty'}")
    assert f"error: --set model.path={tmp_path}/empty: model.path {tmp_path}/empty: Unrecognized model in" in said.err


def test_a_model_configuration_with_a_wrong_key(run: Run, write_job: WriteJob) -> None:
    said = run(write_job(), "model.config.n_layers=3")
    assert "unknown key model.config.n_layers of GPT2Config; did you mean n_layer?" in said.err
    assert "model.config" in run(write_job(), "model.config.model_type=gtp2").err
    assert "is no causal language model" in run(write_job(), "model.config={model_type: t5}").err


def test_a_tokenizer_larger_than_the_model(run: Run, write_job: WriteJob, cluster: Cluster) -> None:
    said = run(write_job(), "model.config.vocab_size=256")
    assert (
        "the blocks hold the id 299 ('or'), and the embedding of the model has 256 rows; leave vocab_size out"
        in said.err
    )


def test_a_tokenizer_too_large_to_train(run: Run, write_job: WriteJob) -> None:
    for size in (10**9, 10**30):
        said = run(write_job(), f"tokenizer.train.vocab_size={size}")
        assert f"tokenizer.train.vocab_size is {size}: input should be less than or equal to 16777216" in said.err


def test_a_data_set_that_is_nowhere(run: Run, write_job: WriteJob, cluster: Cluster) -> None:
    said = run(write_job(), "data.source=hub", "data.dataset=nobody/nothing", "data.split=train")
    assert "--set data.dataset=nobody/nothing: data.dataset nobody/nothing is not reachable on the Hub" in said.err


def test_more_workers_than_the_machine_has_cpus_or_gpus(run: Run, write_job: WriteJob, cluster: Cluster) -> None:
    settings = ("cluster.workers=1000", "batch.global_size=1000", "batch.micro_size=1")
    said = run(write_job(), *settings)
    assert "--set cluster.workers=1000: cluster.workers 1000 x 1 CPU need 1000, " in said.err
    assert "set cluster.workers to" in said.err
    said = run(write_job(), "cluster.gpus_per_worker=1")
    assert "cluster.workers 1 x 1 GPU need 1, " in said.err
    assert "has 0; use a cluster with GPUs" in said.err


def test_a_run_of_the_same_name_with_another_job(
    run: Run, write_job: WriteJob, make_job: MakeJob, tmp_path: Path
) -> None:
    existing = tmp_path / "runs" / "tiny"
    existing.mkdir(parents=True)
    (existing / "job.yaml").write_text(job_text(make_job("train.epochs=9")))
    said = run(write_job())
    assert f"the run {existing} exists with another job (different: train.epochs)" in said.err
    assert all(way in said.err for way in ("--resume", "--overwrite", "--set name="))


def test_an_unwritable_runs_directory(run: Run, write_job: WriteJob, tmp_path: Path, cluster: Cluster) -> None:
    (tmp_path / "file").write_text("")
    said = run(write_job(), options=("--runs", str(tmp_path / "file" / "runs")))
    assert "cannot write" in said.err
    assert "--runs or --store" in said.err


def test_a_tracker_that_is_not_installed(run: Run, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert (
        "tracking has tensorboard, but tensorboardX is not installed" in run(write_job(), "tracking=[tensorboard]").err
    )


def test_a_tracker_without_a_login(run: Run, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", sys)  # is installed
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert (
        "tracking has mlflow, but MLFLOW_TRACKING_URI is not set; set it to"
        in run(write_job(), "tracking=[mlflow]").err
    )


def test_a_push_without_a_token(run: Run, write_job: WriteJob, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert (
        "--set hub.push=end: there is no Hub token to push with; run `hf auth login`"
        in run(write_job(), "hub.push=end").err
    )


def test_commands_on_what_is_no_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, make_job: MakeJob
) -> None:
    for command in ("report", "push"):
        said = clm_dist(capsys, monkeypatch, command, tmp_path / "none")
        assert (said.code, "is no run directory" in said.err) == (2, True)
    said = clm_dist(capsys, monkeypatch, "evaluate", tmp_path / "none")
    assert "say what to evaluate it on: --job JOB, --file PATH or --blocks DIR" in said.err
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "job.yaml").write_text(job_text(make_job()))
    for command, *options in (["generate", "--prompt", "a"], ["evaluate"]):
        said = clm_dist(capsys, monkeypatch, command, tmp_path / "tiny", *options)
        assert (said.code, "has no final model yet" in said.err) == (2, True)
    assert "has no result yet" in clm_dist(capsys, monkeypatch, "report", tmp_path / "tiny").err
    said = clm_dist(capsys, monkeypatch, "generate", "nobody/nothing", "--prompt", "a")
    assert (said.code, "neither a directory nor reachable on the Hub" in said.err) == (2, True)
    job = tmp_path / "job.yaml"
    job.write_text(job_text(make_job("data.seed=77")))
    said = clm_dist(capsys, monkeypatch, "train", job, "--runs", tmp_path / "runs", "--store", tmp_path / "stores")
    assert (said.code, "run `clm-dist prepare`" in said.err) == (2, True)


@pytest.mark.parametrize("content", ["null", "[]", '{"name": ', '{"status": "done"}'])
def test_a_damaged_result_is_named_by_each_command(
    finished_run: RunDir,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    content: str,
) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "runs" / "tiny")))
    run.result.write_text(content)
    again = "remove it, and the command that wrote it writes it again"
    for command in (
        ["run", run.job, "--runs", run.root.parent],
        ["report", run.root],
        ["push", run.root],
        ["generate", run.root, "--prompt", "a"],
        ["evaluate", run.root],
    ):
        said = clm_dist(capsys, monkeypatch, *command)
        assert said.code == 2
        assert f"error: {run.result} is damaged: " in said.err
        assert said.err.endswith(f"; {again}\n")


def test_sections_of_a_saved_job_that_are_none_are_named(
    finished_run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(finished_run.root, tmp_path / "runs" / "tiny")))
    job = yaml.safe_load(run.job.read_text())
    job["cluster"]["slurm"] = True
    run.job.write_text(yaml.safe_dump(job))
    said = clm_dist(capsys, monkeypatch, "run", run.job, "--runs", run.root.parent)
    assert (said.code, f"{run.job}:" in said.err, "cluster.slurm is True" in said.err) == (2, True, True)
    job["cluster"]["slurm"], job["model"]["config"] = {}, True
    run.job.write_text(yaml.safe_dump(job))
    said = clm_dist(capsys, monkeypatch, "run", run.job, "--runs", run.root.parent)
    assert (said.code, f"{run.job}:" in said.err, "model.config is True" in said.err) == (2, True, True)


def test_a_tracker_or_an_optimizer_that_no_package_offers(run: Run, write_job: WriteJob) -> None:
    for setting, message in (
        ("tracking=[wandbb]", "tracking wandbb is offered by no installed package (entry points clm_dist.trac"),
        (
            "train.optimizer=lionn",
            "train.optimizer lionn is offered by no installed package (entry points clm_dist.o",
        ),
    ):
        assert f"--set {setting}: {message}" in run(write_job(), setting).err
