"""Pushes against a Hub server that stores, checks tokens and fails on demand."""

import io
import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from clm_dist import hub
from clm_dist.config.job import JobConfig
from clm_dist.config.load import read_saved_job
from clm_dist.errors import ConfigError, HubError
from clm_dist.files.atomic import read_json
from clm_dist.files.blocks import Manifest
from clm_dist.files.hub_errors import downloading
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.pretrained.weights import load_pretrained
from clm_dist.progress import LineProgress
from clm_dist.run import _push_epoch
from clm_dist.train.ray.cluster import Cluster
from tests.conftest import ROOT, MakeJob, WriteJob
from tests.support.command import clm_dist
from tests.support.disks import mode
from tests.support.fake_hub import FakeHub


@pytest.fixture(autouse=True)
def retry_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "RETRY_DELAYS_S", (0.01, 0.01))


def push(run: RunDir, **options: Any) -> str:
    return hub.push(read_saved_job(run.job), run, run.final, 24, **options)


def in_a_new_process(fake_hub: FakeHub, code: str) -> str:
    environment = os.environ | fake_hub.environment
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return printed.strip().splitlines()[-1]


def test_a_pushed_model_comes_back_bit_for_bit_with_its_card(
    fake_hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said = clm_dist(capsys, monkeypatch, "push", run.root)
    assert said.code == 0
    assert f"pushed to {fake_hub.url}/alice/tiny" in said.out
    assert mode(run.hub) == 0o600
    saved = tmp_path / "back"
    tokens = in_a_new_process(
        fake_hub,
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "from huggingface_hub import model_info, hf_hub_download\n"
        f"AutoModelForCausalLM.from_pretrained('alice/tiny').save_pretrained({str(saved)!r})\n"
        "info = model_info('alice/tiny')\n"
        "card = open(hf_hub_download('alice/tiny', 'README.md')).read()\n"
        "ids = AutoTokenizer.from_pretrained('alice/tiny')('the import')['input_ids']\n"
        "print(ids, info.private, '| final | 24 |' in card)",
    )
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(run.final)("the import")["input_ids"]
    assert tokens == f"{ids} True True"
    ours, theirs = load_file(run.final / "model.safetensors"), load_file(saved / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    state = read_json(run.hub)
    assert (state["repo"], state["private"], state["pending"]) == ("alice/tiny", True, None)
    assert state["pushed"][0]["step"] == 24


def test_passing_faults_are_tried_again(fake_hub: FakeHub, run: RunDir) -> None:
    for request in ("GET /api/whoami", "POST /api/repos/create", "POST .*/commit/"):
        fake_hub.fail(request)
    assert push(run).endswith("alice/tiny")
    assert read_json(run.hub)["pending"] is None


def test_a_hub_that_fails_at_the_end_leaves_the_model_whole_and_the_run_done(
    fake_hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_hub.fail("POST .*/commit/", times=99)
    files = {path: path.read_bytes() for path in run.final.iterdir() if path.suffix == ".safetensors"}
    command = ("run", run.job, "--set", "hub.push=end", "--runs", run.root.parent)
    said = clm_dist(capsys, monkeypatch, *command)
    assert said.code == 0
    assert f"push it later with `clm-dist push {run.root}`" in said.err
    assert "503" in said.err
    assert {path: path.read_bytes() for path in files} == files
    pending = read_json(run.hub)["pending"]
    assert (pending["step"], pending["path"]) == (24, str(run.final))
    assert "503" in pending["error"]

    # The command that was named, once the Hub is back; then there is nothing left to push.
    fake_hub.faults.clear()
    assert clm_dist(capsys, monkeypatch, "push", run.root).code == 0
    assert read_json(run.hub)["pending"] is None
    fake_hub.requests.clear()
    said = clm_dist(capsys, monkeypatch, *command)
    assert (said.code, f"already pushed to {fake_hub.url}/alice/tiny" in said.out) == (0, True)
    assert not [line for line in fake_hub.requests if line.startswith("POST")]


def test_a_push_elsewhere_does_not_stand_for_the_job_s_own(
    fake_hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run, repo="alice/elsewhere")
    command = ("run", run.job, "--set", "hub.push=end", "--runs", run.root.parent)
    assert f"\npushed to {fake_hub.url}/alice/tiny" in clm_dist(capsys, monkeypatch, *command).out
    pushed = [(entry["repo"], entry["step"]) for entry in read_json(run.hub)["pushed"]]
    assert pushed == [("alice/elsewhere", 24), ("alice/tiny", 24)]
    assert f"already pushed to {fake_hub.url}/alice/tiny" in clm_dist(capsys, monkeypatch, *command).out
    named = (*command, "--set", "hub.repo=alice/elsewhere")
    assert f"already pushed to {fake_hub.url}/alice/elsewhere" in clm_dist(capsys, monkeypatch, *named).out


def test_a_push_to_another_owner_is_not_the_jobs(fake_hub: FakeHub, run: RunDir) -> None:
    job = read_saved_job(run.job)
    push(run, repo="alice/tiny")
    assert hub.pushed_url(job, run, 24) is None
    push(run)
    assert hub.pushed_url(job, run, 24) == f"{fake_hub.url}/alice/tiny"


def test_what_a_job_will_push_with_is_checked_before_it_starts(
    fake_hub: FakeHub, run: RunDir, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = make_job("hub.repo=alice/tiny")
    assert hub.check_access(named) == "alice/tiny"
    for repo in ("alice/tiny/x", "alice/a b", "--"):
        with pytest.raises(ConfigError, match=f"hub.repo {repo} cannot name a repository of the Hub: ") as caught:
            hub.check_access(make_job(f"hub.repo='{repo}'"))
        assert caught.value.field == "hub.repo"
    with pytest.raises(ConfigError, match=r"name a--b cannot name a repository of the Hub: .* set hub.repo to user/"):
        hub.check_access(make_job("name=a--b"))
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match="the Hub refuses the token"):
        hub.check_access(named)


def test_a_name_that_cannot_be_is_refused_at_once_and_leaves_no_trace(
    fake_hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run)
    before = run.hub.read_text()
    fake_hub.requests.clear()
    said = clm_dist(capsys, monkeypatch, "push", run.root, "--repo", "alice/a b")
    assert (said.code, "--repo alice/a b cannot name a repository of the Hub" in said.err) == (2, True)
    assert run.hub.read_text() == before
    assert fake_hub.requests == []


def test_whatever_an_epoch_s_push_raises_is_said(
    run: RunDir,
    prepared: Callable[[JobConfig], Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise KeyError("oid")

    monkeypatch.setattr(hub, "push", fail)
    job = read_saved_job(run.job)
    log = io.StringIO()
    _push_epoch(job, run, Store(prepared(job)), run.final, 12, LineProgress(Console(file=log)))
    assert "The model of step 12 is not pushed: 'oid'" in log.getvalue()
    assert "the push of step 12 failed" in caplog.text
    assert run.final.is_dir()


@pytest.mark.slow
def test_every_epoch_is_pushed_while_training_goes_on(
    fake_hub: FakeHub,
    cluster: Cluster,
    write_job: WriteJob,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # As often as it is tried: the push of the first epoch fails for good, and the later ones go on.
    fake_hub.fail("POST .*/commit/", times=3)
    job = write_job("hub.push=epoch", "train.max_steps=36", "train.epochs=3")
    said = clm_dist(capsys, monkeypatch, "run", job, "--runs", tmp_path, "--store", tmp_path / "store")
    assert said.code == 0, said.err
    assert "The model of step 12 is not pushed: the push to alice/tiny failed" in said.err
    assert "Pushed the model of step 24 to" in said.err
    run = RunDir(tmp_path / "tiny")
    state = read_json(run.hub)
    assert ([pushed["step"] for pushed in state["pushed"]], state["pending"]) == ([24, 36], None)
    # The models of the epochs were only kept for their pushes.
    assert not run.exports.exists()
    titles = in_a_new_process(
        fake_hub,
        "from huggingface_hub import list_repo_commits\n"
        "print([c.title for c in list_repo_commits('alice/tiny') if 'step' in c.title])",
    )
    assert titles == "['Model after step 36', 'Model after step 24']"


def test_tokens_that_are_refused(
    fake_hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    push(run)
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    said = clm_dist(capsys, monkeypatch, "push", run.root, "--repo", "alice/tiny")
    assert (said.code, "the token may not write to alice/tiny" in said.err) == (2, True)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ConfigError, match=r"the Hub refuses the token; log in again with `hf auth login`"):
        push(run)
    assert "refuses the token" in read_json(run.hub)["pending"]["error"]


@pytest.mark.parametrize("token", ["hf_reads", "hf_narrow"])
def test_a_token_that_may_only_read_is_found_before_a_run(
    token: str, fake_hub: FakeHub, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_fine")
    assert hub.check_access(make_job()) == "alice/tiny"
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=r"token of alice may only read, and a push needs the permission repo.write"):
        hub.check_access(make_job())


def test_a_dry_run_shows_what_would_be_pushed(
    fake_hub: FakeHub, run: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = clm_dist(capsys, monkeypatch, "push", run.root, "--dry-run")
    assert said.code == 0
    shown = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in said.out.splitlines()[3:-3]}
    assert shown == {file.name: file.stat().st_size for file in run.final.iterdir()}
    assert "nothing was pushed to alice/tiny" in said.out
    assert not run.hub.exists()
    assert not [line for line in fake_hub.requests if not line.startswith("GET /api/whoami")]
    # What a push would end with is said after what can be told.
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = clm_dist(capsys, monkeypatch, "push", run.root, "--dry-run")
    assert (said.code, "model.safetensors" in said.out, "the Hub refuses the token" in said.err) == (2, True, True)


def test_a_hub_that_is_down_does_not_stop_a_job_from_starting(
    fake_hub: FakeHub, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert hub.check_access(read_saved_job(run.job)) is None
    with pytest.raises(HubError, match="the Hub is not reachable"):
        push(run)


def test_where_xet_cannot_be_reached_files_come_from_the_hub_itself(
    fake_hub: FakeHub, run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub import constants

    push(run)
    fake_hub.names_xet = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    model = load_pretrained("alice/tiny")
    assert "Xet fails (Client error '404 Not Found'" in caplog.text
    got = [line for line in fake_hub.requests if re.fullmatch("GET /alice/tiny/resolve/.*/model.safetensors", line)]
    assert len(got) == 1
    assert constants.HF_HUB_DISABLE_XET
    ours = load_file(run.final / "model.safetensors")
    assert model.get_parameter("transformer.h.0.attn.c_attn.weight").equal(ours["transformer.h.0.attn.c_attn.weight"])
    # What fails for another reason fails once.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    calls = []
    with pytest.raises(ZeroDivisionError):
        downloading(lambda: calls.append(1) or 1 / 0)  # type: ignore[func-returns-value]
    assert calls == [1]


def test_a_repository_may_be_public_and_named(fake_hub: FakeHub, run: RunDir) -> None:
    push(run, repo="alice/other", private=False)
    assert (
        in_a_new_process(
            fake_hub, "from huggingface_hub import model_info; print(model_info('alice/other', token=False).private)"
        )
        == "False"
    )


def test_a_data_set_of_the_hub_gives_the_blocks_of_its_file(fake_hub: FakeHub, corpus: Path, tmp_path: Path) -> None:
    """ELI5's nested shape as a Hub data set, read in a process of its own, beside the same records in a file."""
    from huggingface_hub import HfApi

    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    answers = itertools.cycle([texts[:2], texts[2:5], [], texts[5:6]])
    file = tmp_path / "train.jsonl"
    with file.open("w") as opened:
        for number, text in zip(range(120), answers, strict=False):
            opened.write(json.dumps({"q_id": f"q{number}", "answers": {"text": text, "score": [1] * len(text)}}) + "\n")
    HfApi().create_repo("alice/eli5", repo_type="dataset", private=True)
    HfApi().upload_file(path_or_fileobj=file, path_in_repo="train.jsonl", repo_id="alice/eli5", repo_type="dataset")
    settings = ("data.dataset=alice/eli5", "data.split='train[:100]'", "tokenizer.train.vocab_size=500", "model.path=x")
    prepare = [sys.executable, "-m", "clm_dist", "prepare", str(ROOT / "jobs" / "eli5-subset.yaml")]
    prepare += [part for setting in settings for part in ("--set", setting)]
    environment = os.environ | fake_hub.environment
    stores = []
    for source in ((), ("--set", "data.source=files", "--set", f"data.path={file}")):
        command = [*prepare, *source, "--store", str(tmp_path / "stores")]
        printed = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        stores.append(Path(printed.strip()))
    assert stores[0] != stores[1]
    splits = [Manifest.read(store / "manifest.json").splits for store in stores]
    assert splits[0] == splits[1]
    assert splits[0]["train"].num_records == 80
