"""The Python interface: what `import clm_dist` offers, and the notebook that shows it."""

import inspect
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import clm_dist
from clm_dist import interface
from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.train.ray.cluster import Cluster
from tests.conftest import ROOT, WriteJob, tiny_job
from tests.support.runs import metrics_of


def test_it_loads_nothing_until_it_is_used() -> None:
    code = (
        "import sys, clm_dist\n"
        "print(sorted(name for name in sys.modules if name.startswith('clm_dist')))\n"
        "print(clm_dist.Run.__name__, {'torch', 'ray', 'transformers', 'pandas'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["['clm_dist']", "Run set()"]
    assert not hasattr(clm_dist, "trian")


def test_rooms_of_a_name_of_the_interface_are_rooms_and_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    import clm_dist.prepare.pools
    import clm_dist.run

    for name in ("prepare", "run"):
        assert inspect.ismodule(getattr(clm_dist, name))
        monkeypatch.setattr(interface, name, lambda *arguments, **options: (arguments, options))
        assert getattr(clm_dist, name)(1, quiet=True) == ((1,), {"quiet": True})


def test_a_job_is_a_file_a_name_or_values(write_job: WriteJob, corpus: Path) -> None:
    file = write_job()
    assert clm_dist.load_job(file, "train.max_steps=9") == clm_dist.load_job(tiny_job(corpus), "train.max_steps=9")
    assert clm_dist.load_job("quickstart").name == "quickstart"
    for job, message in (
        ({"name": "a"}, "job: data: Field required|job: data"),
        (tiny_job(corpus) | {"trian": {}}, "job: unknown key trian; did you mean train"),
        ("quickstrat", "did you mean quickstart"),
    ):
        with pytest.raises(ConfigError, match=message):
            clm_dist.load_job(job)
    with pytest.raises(ConfigError, match=r"--set train.epochs=x: train.epochs"):
        clm_dist.load_job(file, "train.epochs=x")


def test_a_run_is_trained_and_looked_at(
    cluster: Cluster, write_job: WriteJob, stores: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = clm_dist.load_job(write_job())
    store = clm_dist.prepare(job, stores=stores, quiet=True)
    assert store.parent == stores
    assert (store / "manifest.json").exists()
    run = clm_dist.run(job, runs=tmp_path / "runs", stores=stores, quiet=True)
    assert capsys.readouterr().out == ""
    assert run.path == tmp_path / "runs" / "tiny"
    assert run.job == job
    assert run.result["status"] == "done"
    steps = run.metrics()
    assert list(steps["step"]) == [1, 2, 3, 4, 5, 6]
    records = [record for record in metrics_of(RunDir(run.path).metrics) if record["kind"] == "eval"]
    assert run.metrics("eval").to_dict("records") == records
    evaluated = clm_dist.evaluate(run, stores=stores, quiet=True)
    assert run.result["final"]
    assert evaluated.figures["loss"] == run.result["final"]["loss"]
    assert run.model()(run.tokenizer()("a", return_tensors="pt")["input_ids"]).logits.shape[-1] == 300
    run.report().unlink()
    assert run.report().read_text().startswith("<!doctype html>")
    # It is done, and said to be the same.
    assert clm_dist.run(job, runs=tmp_path / "runs", stores=stores, quiet=True).result == run.result
    assert clm_dist.Run(str(run.path)).result == run.result


def test_what_is_no_run_is_said(tmp_path: Path, run: RunDir) -> None:
    with pytest.raises(ConfigError, match="is no run directory; name one that `clm-dist run` wrote"):
        clm_dist.Run(tmp_path)
    (run.final / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"model.safetensors .*writes the model again"):
        clm_dist.Run(run.root).model()


def test_the_notebook_runs(cluster: Cluster, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLM_DIST_STORE", str(stores))
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "docs" / "python.ipynb").read_text())["cells"]
    codes = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    # As the README's quickstart trains it whole, here a few steps will do.
    codes[0] = codes[0].replace("train.max_steps=60", "train.max_steps=2")
    assert "train.max_steps=2" in codes[0]
    names: dict[str, Any] = {}
    for code in codes:
        exec(code, names)
    assert names["run"].path == tmp_path / "runs" / "notebook"
    assert len(names["steps"]) == 2


def test_names_and_signatures_are_shown_and_functions_can_be_sent_to_processes() -> None:
    assert {"Run", "evaluate", "load_job", "prepare", "run"} <= set(dir(clm_dist))
    run: Any = getattr(clm_dist, "run")  # noqa: B009
    assert inspect.signature(run) == inspect.signature(interface.run)
    assert pickle.loads(pickle.dumps(run)) is run


def test_what_is_no_job_is_said() -> None:
    for call in (clm_dist.run, clm_dist.prepare):
        with pytest.raises(ConfigError, match=r"a job is what clm_dist.load_job returns, not str"):
            call("quickstart")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a job is a file, a name or a mapping, not int"):
        clm_dist.load_job(1)  # type: ignore[arg-type]
