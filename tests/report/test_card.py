"""The model card: what the Hub reads of it, what people read, and what it does not tell."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from clm_dist import hub
from clm_dist.config.load import load_job, read_saved_job
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Manifest
from clm_dist.files.result import read_result
from clm_dist.files.run_dir import RunDir
from clm_dist.files.samples import write_samples
from clm_dist.report.card import render_card, render_front_matter, write_card
from clm_dist.report.table import rows
from tests.conftest import ROOT, MakeJob
from tests.support.fake_hub import FakeHub
from tests.support.runs import metrics_of

GUIDE = ROOT / "jobs" / "eli5-guide.yaml"


@pytest.fixture
def result(finished_run: RunDir) -> Any:
    return read_result(finished_run.root)


def section(card: str, heading: str) -> str:
    return card.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def block_of(card: str, heading: str, language: str) -> str:
    """The code in a section."""
    return section(card, heading).split(f"```{language}\n")[1].split("\n```")[0]


def test_the_card_has_front_matter_that_the_hub_reads_and_the_figures(finished_run: RunDir, result: Any) -> None:
    card = render_card(read_saved_job(finished_run.job), result)
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "text-generation"
    assert "base_model" not in front
    metrics = {m["type"]: m["value"] for m in front["model-index"][0]["results"][0]["metrics"]}
    assert metrics["perplexity"] == result["final"]["perplexity"]
    table = card[card.index("| evaluation |") :].splitlines()[: 2 + len(rows(result))]
    assert {line.count("|") for line in table} == {9}


def test_the_card_of_a_hub_job_links_model_and_data_set(result: Any) -> None:
    job = load_job(GUIDE).config
    card = render_card(job, result)
    front = yaml.safe_load(card.split("---")[1])
    assert (front["base_model"], front["datasets"]) == ("distilbert/distilgpt2", ["dany0407/eli5_category"])


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (("data.eval_split=validation1",), "dany0407/eli5_category, validation1"),
        (("data.source=files", "data.path=a/b.txt", "data.eval_path=[a/c.txt, d.txt]"), "c.txt, d.txt"),
        (("data.source=files", "data.path=a/b", "data.eval_split='train[5000:]'"), "b, train[5000:]"),
        (("data.source=builtin", "data.eval_split='train[5000:]'"), "train[5000:]"),
    ],
)
def test_the_card_says_which_records_were_for_evaluation(result: Any, settings: tuple[str, ...], name: str) -> None:
    path = GUIDE
    assert (
        "tokens of the 20% of the records that were held out (random split), in blocks of 128 tokens."
        in render_card(load_job(path).config, result)
    )
    card = render_card(load_job(path, settings).config, result)
    assert f"tokens of records of their own (`{name}`), in blocks of 128 tokens. The baseline" in card
    assert yaml.safe_load(card.split("---")[1])["model-index"][0]["results"][0]["dataset"]["name"] == name


def test_the_hub_s_own_reader_finds_the_figures(finished_run: RunDir, result: Any) -> None:
    job = read_saved_job(finished_run.job)
    job = job.model_copy(update={"hub": job.hub.model_copy(update={"language": ["en", "de"], "license": "mit"})})
    data: Any = ModelCard(render_card(job, result)).data
    assert (data.language, data.license, data.pipeline_tag) == (["en", "de"], "mit", "text-generation")
    found = {one.metric_type: one.metric_value for one in data.eval_results}
    assert found == {name: result["final"][name] for name in ("perplexity", "loss", "bits_per_byte")}


def test_a_training_loss_is_the_mean_since_the_evaluation_before(finished_run: RunDir, result: Any) -> None:
    steps = [record for record in metrics_of(finished_run.metrics) if record["kind"] == "step"]
    expected = []
    for first, last in ((0, 12), (12, 24)):
        some = [step for step in steps if first < step["step"] <= last]
        expected.append(sum(s["tokens"] * s["loss"] for s in some) / sum(s["tokens"] for s in some))
    assert result["train_losses"] == pytest.approx(expected, rel=1e-12)
    table = section(render_card(read_saved_job(finished_run.job), result), "Evaluation")
    assert f"| epoch 1 | 12 | 1.00 | {expected[0]:.4f} | {result['evals'][0]['loss']:.4f} |" in table
    assert f"| final | 24 | 2.00 | {expected[1]:.4f} | {result['final']['loss']:.4f} |" in table
    assert "| baseline | 0 | 0.00 | - |" in table
    # A result that an earlier version wrote has none.
    del result["train_losses"]
    assert "training loss" not in render_card(read_saved_job(finished_run.job), result)


def test_a_card_tells_what_the_job_says_and_shows(run: RunDir, result: Any, stores: Path, make_job: MakeJob) -> None:
    saved = read_saved_job(run.job)
    job = saved.model_copy(update={"hub": make_job("hub={repo: alice/tiny, limitations: It cannot count.}").hub})
    write_samples(run, {"prompt": "a`b|c", "seed": 7, "before": "no ```\nsense", "after": "some\x1b sense"})
    manifest = Manifest.read(stores / result["data"] / "manifest.json")
    manifest.write(run.data)
    write_card(run.final, run, job, result)
    card = (run.final / "README.md").read_text()
    assert section(card, "Limitations").strip() == "It cannot count."
    assert "    no ```\n    sense" in section(card, "Sample")
    assert "    some\\x1b sense" in section(card, "Sample")
    assert "`` a`b\\|c ``" in section(card, "Sample")
    train = manifest.splits["train"]
    counts = f"| train | {train.num_records} | 0 | {train.num_documents} | {train.num_tokens:,} |"
    assert counts in section(card, "Data")
    assert f"- workers: {result['workers']} (ddp)" in section(card, "Training")
    assert "- hardware: CPU" in section(card, "Training")
    picture = (run.final / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n")
    assert struct.unpack(">II", picture[16:24]) == (1200, 600)
    assert "![Loss by step](loss.png)" in card
    # Nothing to draw, of a run whose records are gone.
    run.metrics.unlink()
    write_card(run.final, run, job, result)
    assert not (run.final / "loss.png").exists()
    assert "loss.png" not in (run.final / "README.md").read_text()


def test_the_job_in_a_card_is_the_job_that_was_run(result: Any, make_job: MakeJob, tmp_path: Path) -> None:
    settings = ("data.min_score=3", "train.keep=best", "cluster.slurm.account=secret", "data.text='{a} ```` {b}'")
    job = load_job(GUIDE, [*settings, "data.score=answers.score"]).config
    card = render_card(job, result)
    assert "secret" not in card
    (tmp_path / "job.yaml").write_text(section(card, "Reproduce").split("`````yaml\n")[1].split("\n`````")[0])
    reproduced = load_job(tmp_path / "job.yaml").config
    told = ("name", "data", "tokenizer", "model", "batch", "train", "eval")
    assert all(getattr(reproduced, name) == getattr(job, name) for name in told)
    # The command is in the words of a shell.
    assert "```bash\nclm-dist run job.yaml\n```" in card


def test_the_job_in_a_card_has_the_blocks_of_a_pass_that_the_run_found(
    run: RunDir, result: Any, make_job: MakeJob
) -> None:
    for named in ("auto", "8"):
        job = make_job(f"batch.micro_size={named}")
        write_card(run.final, run, job, result)
        assert "micro_size: auto" not in (run.final / "README.md").read_text()
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    for record in records:
        if record["kind"] == "start":
            record["micro_size"] = 3
    run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    write_card(run.final, run, job, result)
    assert "micro_size: 3" in (run.final / "README.md").read_text()


def test_a_card_names_no_local_directory(result: Any, make_job: MakeJob, tmp_path: Path) -> None:
    for name in ("models/mine", "words/mine", "data"):
        (tmp_path / "private" / name).mkdir(parents=True)
    at = tmp_path / "private"
    job = make_job(
        f"model={{path: {at}/models/mine, config: null}}",
        f"tokenizer={{path: {at}/words/mine, train: null}}",
        f"data.path=[{at}/data/a.jsonl, {at}/data/b.jsonl]",
        f"data.eval_path={at}/data/c.jsonl",
        f"checkpoint.path={at}/checkpoints",
    )
    card = render_card(job, result)
    assert "private" not in card
    assert "trained from `mine`, on `a.jsonl, b.jsonl`" in card
    assert yaml.safe_load(block_of(card, "Reproduce", "yaml"))["data"]["eval_path"] == "c.jsonl"
    assert "base_model" not in yaml.safe_load(card.split("---")[1])


def test_the_snippet_of_a_card_runs(run: RunDir, result: Any) -> None:
    code = block_of(render_card(read_saved_job(run.job), result, repo=str(run.final)), "Usage", "python")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")


def test_front_matter_that_the_hub_refuses_is_found_before_a_run_starts(
    fake_hub: FakeHub, make_job: MakeJob, caplog: pytest.LogCaptureFixture
) -> None:
    front = render_front_matter(make_job("hub.license=free"))
    hub.check_card(front)
    fake_hub.fail("POST /api/validate-yaml", 400)
    with pytest.raises(ConfigError, match=r"the Hub refuses the model card .* mend what it names; hub.language and"):
        hub.check_card(front)
    fake_hub.fail("POST /api/validate-yaml", 503)
    hub.check_card(front)
    assert "does not validate the model card" in caplog.text


def test_a_directory_with_a_data_set_is_no_data_set_of_the_hub(
    result: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "acme" / "secret").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("acme/secret", f"{tmp_path}/acme/secret"):
        job = load_job(GUIDE, [f"data.dataset={name}", "data.eval_split=validation"]).config
        shutil.rmtree(tmp_path / "acme", ignore_errors=True)
        # It may be gone when the card is written.
        card = render_card(job, result)
        (tmp_path / "acme" / "secret").mkdir(parents=True)
        assert "datasets" not in yaml.safe_load(card.split("---")[1])
        assert str(tmp_path) not in card
        assert "acme" not in card
        assert yaml.safe_load(block_of(card, "Reproduce", "yaml"))["data"]["dataset"] == "secret"


def test_names_in_a_card_are_names_and_no_markup(result: Any, make_job: MakeJob) -> None:
    job = make_job("data.path=['<img src=x>.jsonl', \"a|b](javascript:1)\\n## Boo.jsonl\", 's3://secret-bucket']")
    card = render_card(job, result)
    assert "\n## Boo" not in card.replace(block_of(card, "Reproduce", "yaml"), "")
    assert "`<img src=x>.jsonl, a\\|b](javascript:1)\\n## Boo.jsonl, a URL`" in card
    assert "secret-bucket" not in card


def test_a_snippet_names_no_stranger_s_model(result: Any, make_job: MakeJob) -> None:
    for settings, repo, place in (
        (("name=gpt2",), None, "path/to/this/directory"),
        (("hub.repo=tiny",), None, "path/to/this/directory"),
        (("hub.repo=alice/tiny",), None, "alice/tiny"),
        ((), "alice/other", "alice/other"),
    ):
        card = render_card(make_job(*settings), result, repo=repo)
        assert f'model="{place}"' in block_of(card, "Usage", "python")


def test_a_picture_that_cannot_be_drawn_takes_nothing_from_the_card(
    run: RunDir, result: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import matplotlib

    # A person's own settings say nothing of it.
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    job = read_saved_job(run.job)
    write_card(run.final, run, job, result)
    assert (run.final / "loss.png").exists()

    def fail(*_: object) -> None:
        raise RuntimeError("no fonts")

    monkeypatch.setattr("clm_dist.report.picture._draw", fail)
    write_card(run.final, run, job, result)
    assert not (run.final / "loss.png").exists()
    assert "loss.png" not in (run.final / "README.md").read_text()
    assert "the card has no picture: no fonts" in caplog.text


def test_a_name_that_is_not_utf_8_is_escaped(result: Any, make_job: MakeJob) -> None:
    assert "\\udcff" in render_card(make_job(), result | {"versions": {"odd": "\udcff"}})


def test_a_card_names_the_optimizer_with_its_options(result: Any, make_job: MakeJob) -> None:
    lion = ("train.optimizer=lion", "train.optimizer_options={beta: 0.5}", "train.weight_decay=0.25")
    for settings, optimizer in (
        ((), "AdamW, betas 0.9 and 0.999, weight decay 0.01"),
        (lion, "lion, beta 0.5, weight decay 0.25"),
    ):
        assert f"- optimizer: {optimizer}\n" in render_card(make_job(*settings), result)
