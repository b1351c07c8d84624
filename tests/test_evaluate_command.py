"""`clm-dist evaluate`: a written model on the eval split of its own job, or of another."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.files.atomic import read_json
from clm_dist.files.run_dir import RunDir
from tests.conftest import WriteJob
from tests.support.command import Said, clm_dist

Evaluate = Callable[..., Said]


@pytest.fixture
def evaluate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, stores: Path) -> Evaluate:
    return lambda *arguments: clm_dist(capsys, monkeypatch, "evaluate", *arguments, "--store", stores)


def figures(said: Said) -> dict[str, float]:
    assert said.code == 0, said.err
    printed = json.loads(said.out)
    return {name: printed[name] for name in ("loss", "perplexity", "bits_per_byte", "num_tokens")}


@pytest.fixture
def final(finished_run: RunDir) -> dict[str, float]:
    """The figures of the run's result."""
    evaluation = read_json(finished_run.result)["final"]
    return {name: evaluation[name] for name in ("loss", "perplexity", "bits_per_byte", "num_tokens")}


def test_a_run_evaluates_to_its_result_on_its_own_blocks(
    evaluate: Evaluate, finished_run: RunDir, final: dict[str, float], stores: Path
) -> None:
    before = sorted(stores.iterdir())
    assert figures(evaluate(finished_run.root, "--json")) == final
    said = evaluate(finished_run.root)
    said_figures, said_windows, said_interval = said.out.strip().splitlines()
    assert re.fullmatch(
        re.escape(
            f"loss {final['loss']:.6g}, perplexity {final['perplexity']:.6g}, "
            f"bits per byte {final['bits_per_byte']:.6g}, accuracy X%, num tokens {final['num_tokens']:,}"
        ).replace("X", r"\d+\.\d"),
        said_figures,
    )
    assert said_windows == "windows of 32 tokens, 32 from one to the next"
    low, high = (float(number) for number in re.findall(r"\d+\.\d+", said_interval))
    assert low < final["perplexity"] < high
    assert said_interval.endswith("(95 % interval, by document: 9 of them)")
    assert sorted(stores.iterdir()) == before


def test_a_model_is_measured_on_its_own_tokens_whatever_the_job_says(
    evaluate: Evaluate, finished_run: RunDir, final: dict[str, float], write_job: WriteJob
) -> None:
    """Ids of another tokenizer would give figures that mean nothing, and exit code 0."""
    run, own = finished_run.root, finished_run.final
    assert figures(evaluate(run, "--set", "tokenizer.train.vocab_size=290", "--json")) == final
    # The records and the split are those of the run's job.
    other = write_job("tokenizer.train.vocab_size=280", "model.config.n_positions=32")
    assert figures(evaluate(run, "--job", other, "--json")) == final
    assert figures(evaluate(own, "--job", other, "--json")) == final


def test_a_job_changes_the_text_that_a_model_is_measured_on(
    evaluate: Evaluate, finished_run: RunDir, final: dict[str, float]
) -> None:
    longer = figures(evaluate(finished_run.root, "--set", "data.block_size=128", "--json"))
    assert longer["num_tokens"] != final["num_tokens"]
    assert longer["bits_per_byte"] == pytest.approx(final["bits_per_byte"], rel=0.2)


def test_blocks_above_the_model_s_context_are_refused(
    evaluate: Evaluate, finished_run: RunDir, write_job: WriteJob
) -> None:
    message = "data.block_size is 512, above the model's context of 128; set data.block_size to 128 or less"
    said = evaluate(finished_run.root, "--set", "data.block_size=512")
    assert (said.code, said.err) == (2, f"error: --set data.block_size=512: {message}\n")
    job = write_job("model.config.n_positions=1024", "data.block_size=512")
    line = next(n for n, text in enumerate(job.read_text().splitlines(), 1) if "block_size" in text)
    said = evaluate(finished_run.root, "--job", job)
    assert (said.code, said.err) == (2, f"error: {job}:{line}: {message}\n")


def test_a_model_that_is_nowhere_is_not_blamed_on_the_job(evaluate: Evaluate, write_job: WriteJob) -> None:
    said = evaluate("nobody/nothing", "--job", write_job())
    assert said.code == 2
    assert said.err.startswith("error: model.path nobody/nothing is neither a model's directory nor reachable")
    assert "MODEL ~nouser/x cannot be used as a path" in evaluate("~nouser/x", "--job", write_job()).err


def test_a_job_s_document_mask_holds_for_its_model(
    evaluate: Evaluate, finished_run: RunDir, final: dict[str, float], write_job: WriteJob
) -> None:
    masked = figures(evaluate(finished_run.root, "--set", "data.document_mask=true", "--json"))
    assert masked["num_tokens"] < final["num_tokens"]
    assert masked["loss"] != final["loss"]
    assert figures(evaluate(finished_run.root, "--job", write_job("data.document_mask=true"), "--json")) == masked
    said = evaluate(finished_run.root, "--set", "data.document_mask=true", "--set", "data.append_eos=false")
    assert said.code == 2
    assert "data.document_mask is true, but with data.append_eos false no document has an end" in said.err


def test_ids_above_the_embedding_are_named(evaluate: Evaluate, run: RunDir, write_job: WriteJob) -> None:
    file = run.final / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {"e": 600}
    file.write_text(json.dumps(content))
    for num_processes in (1, 2):
        said = evaluate(run.final, "--job", write_job(), "--workers", num_processes)
        assert said.code == 2
        assert f"the text holds the id 600, and the embedding of {run.final} has 300 rows" in said.err
