"""What is tried before the first step ends a run that cannot be trained."""

from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.train import trial
from tests.conftest import MakeJob
from tests.support.training import train_one


def test_a_model_that_sees_later_tokens_is_not_trained(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job("model.config={model_type: xlnet, d_model: 32, n_layer: 1, n_head: 2, d_inner: 64}")
    with pytest.raises(ConfigError, match="XLNetLMHeadModel sees the tokens that it is to predict") as said:
        train_one(job, RunDir(tmp_path), prepared(job))
    assert said.value.field == "model"


@pytest.mark.parametrize("mask", [True, False])
def test_documents_that_mix_end_a_run_that_masks_them(
    make_job: MakeJob,
    prepared: Callable[[JobConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    mask: bool,
) -> None:
    job = make_job("train.max_steps=1", f"data.document_mask={str(mask).lower()}")
    monkeypatch.setattr(trial, "find_mixing", lambda *_, **__: "documents mix")
    outcome = train_one(job, RunDir(tmp_path), prepared(job))
    assert (outcome.status, outcome.error) == (("failed", "documents mix") if mask else ("done", None))
