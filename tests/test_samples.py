"""What a run's model writes before and after training."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from clm_dist import samples
from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.errors import HubError
from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.samples import read_samples, write_samples
from clm_dist.generate import Sampling, generate
from clm_dist.progress import Silent
from clm_dist.samples import keep_samples, make_samples, show_samples
from tests.support.notes import Notes


def kept(run: RunDir) -> list[str]:
    """What is said while the samples of a run are made."""
    notes = Notes()
    keep_samples(read_saved_job(run.job), run, notes)
    return notes.notes


def shown(run: RunDir, width: int = 60) -> str:
    out = io.StringIO()
    show_samples(run, Console(file=out, width=width))
    return out.getvalue()


def test_the_text_before_is_that_of_the_model_which_was_evaluated_as_the_baseline(
    run: RunDir, prepared: Callable[[JobConfig], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from clm_dist.evaluation import evaluate_store
    from clm_dist.generate import go_on

    used: list[Any] = []

    def keep(network: Any, *arguments: Any, **options: Any) -> Any:
        used.append(network)
        return go_on(network, *arguments, **options)

    monkeypatch.setattr("clm_dist.generate.go_on", keep)
    job = read_saved_job(run.job)
    made = make_samples(job, run, Silent())
    first = next(network for network in used if network.config.use_cache is not None and not is_final(network, run))
    first.save_pretrained(tmp_path / "first")
    for file in run.final.glob("*token*"):
        (tmp_path / "first" / file.name).write_bytes(file.read_bytes())
    baseline = read_result(run.root)["baseline"]
    assert baseline
    evaluated = evaluate_store(str(tmp_path / "first"), job, prepared(job), Silent())
    assert evaluated.figures["loss"] == pytest.approx(baseline["loss"], rel=1e-6)
    sampling = Sampling(max_new_tokens=60)
    for directory, text in ((tmp_path / "first", made["before"]), (run.final, made["after"])):
        assert list(generate(str(directory), ["The"], seed=42, sampling=sampling)) == [text]
    assert made["before"] != made["after"]


def is_final(network: Any, run: RunDir) -> bool:
    from safetensors.torch import load_file

    weight = load_file(run.final / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    found: bool = network.state_dict()["transformer.h.0.attn.c_attn.weight"].cpu().equal(weight)
    return found


def test_samples_are_kept_and_shown_in_two_lines_each(run: RunDir) -> None:
    assert kept(run) == []
    out = shown(run)
    saved = json.loads(run.samples.read_text())
    assert saved == read_samples(run)
    assert (saved["prompt"], saved["seed"], set(saved)) == ("The", 42, {"prompt", "seed", "before", "after"})
    assert out.startswith("The model's text after the prompt 'The':\n  before training  The")
    assert "  after training   The" in out
    assert len(out.rstrip().splitlines()) == 5
    assert max(map(len, out.splitlines())) <= 60


def test_what_an_untrained_model_writes_leaves_the_terminal_alone(run: RunDir) -> None:
    write_samples(run, {"prompt": "The", "seed": 42, "before": "The \x1b[2J [bold]\n\n\x07", "after": "The end."})
    out = shown(run)
    assert "The \\x1b[2J [bold] \\x07" in out
    assert "\x1b" not in out


def test_a_model_that_is_gone_does_not_fail_a_run_that_is_done(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any) -> None:
        raise HubError("the Hub is away")

    monkeypatch.setattr("clm_dist.train.model.load_model", away)
    assert kept(run) == ["No text of the untouched model: the Hub is away"]
    out = shown(run)
    assert "before training" not in out
    assert "  after training  The" in out


def test_of_a_large_model_the_command_is_shown(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "_MOST_BYTES", 1000)
    assert kept(run) == []
    assert not run.samples.exists()
    assert shown(run) == f"sample: clm-dist generate {run.root} --prompt 'Once upon a time'\n"
