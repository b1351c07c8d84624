"""Which error a fault of a storage or of the Hub becomes: by who must act."""

import errno
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from datasets.exceptions import DatasetGenerationError

from clm_dist.config.job import JobConfig
from clm_dist.errors import ClmDistError, ConfigError, HubError, StorageError
from clm_dist.files.hub_errors import describe_hub_error
from clm_dist.files.storage import reaching
from clm_dist.generate import generate
from clm_dist.prepare.sources import _reaching
from clm_dist.pretrained.tokenizer import locate_tokenizer
from clm_dist.pretrained.weights import load_pretrained
from clm_dist.train.model import load_config
from tests.conftest import MakeJob


def answered(number: int, **kept: Any) -> Exception:
    """An error of a server that answered with an HTTP status, as one kind of library keeps it."""
    error = Exception(f"HTTP {number}")
    for name, value in kept.items():
        setattr(error, name, value)
    return error


class NoCredentialsError(Exception):
    """Named as botocore's."""


FAULTS = {
    "a package that is missing": (ImportError("No module named s3fs"), ConfigError),
    "an unknown protocol": (ValueError("Protocol not known: nonsense"), ConfigError),
    "a bucket that is missing": (FileNotFoundError("the specified bucket does not exist"), ConfigError),
    "a right that is missing": (PermissionError("Access Denied"), ConfigError),
    "no credentials": (NoCredentialsError("Unable to locate credentials"), ConfigError),
    "403 of botocore": (answered(403, response={"ResponseMetadata": {"HTTPStatusCode": 403}}), ConfigError),
    "503 of botocore": (answered(503, response={"ResponseMetadata": {"HTTPStatusCode": 503}}), StorageError),
    "429 of aiohttp": (answered(429, status=429), StorageError),
    "404 of gcsfs": (answered(404, code=404), ConfigError),
    "500 of requests": (answered(500, response=SimpleNamespace(status_code=500)), StorageError),
    "no network": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), StorageError),
    "no answer": (TimeoutError("timed out"), StorageError),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_a_storage_is_told_by_who_must_act(fault: str) -> None:
    error, kind = FAULTS[fault]
    with (
        pytest.raises(kind, match=r"^data.path s3://b/x: ") as caught,
        reaching("data.path s3://b/x", field="data.path"),
    ):
        raise error
    assert type(caught.value) is kind
    assert caught.value.field == "data.path"


def test_what_was_handled_before_does_not_make_a_passing_fault_final() -> None:
    with pytest.raises(StorageError), reaching("data.path s3://b/x"):
        try:
            raise FileNotFoundError("no listing is cached")
        except FileNotFoundError:
            raise TimeoutError("timed out")  # noqa: B904  # as libraries do


class TransportError(Exception):
    """Named as the base of the errors of the Hub's HTTP client."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (TransportError("connection refused"), HubError),
        (answered(503, response=SimpleNamespace(status_code=503)), HubError),
        (answered(404, response=SimpleNamespace(status_code=404)), ConfigError),
        (OSError("nobody/nothing is not a valid model identifier"), ConfigError),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), StorageError),
        (RuntimeError("Data processing error: File error: No space left on device (os error 28)"), StorageError),
        (OSError("Not enough disk space. Needed: 3 GiB"), StorageError),
    ],
)
def test_a_fault_of_the_hub_is_told_by_who_must_act(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    outer = OSError("cannot load")
    outer.__cause__ = error
    assert type(describe_hub_error(outer, "the model is not reachable", field="model.path")) is kind
    # Without a network by choice nothing comes back later, and a full disk is full all the same.
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    expected = StorageError if kind is StorageError else ConfigError
    assert type(describe_hub_error(outer, "the model is not reachable")) is expected


def test_a_disk_that_fills_up_while_a_data_set_is_read_is_no_fault_of_the_data_set(make_job: MakeJob) -> None:
    data = make_job("data.source=hub", "data.path=null", "data.dataset=nobody/nothing").data
    broken = DatasetGenerationError("An error occurred while generating the dataset")
    broken.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(StorageError, match=r"no space left while writing .*; free some space, .* HF_HOME"),
        _reaching(data),
    ):
        raise broken


def test_an_error_keeps_its_field_on_its_way_from_another_process() -> None:
    error = pickle.loads(pickle.dumps(StorageError("no space left", field="checkpoint.path")))
    assert (type(error), str(error), error.field) == (StorageError, "no space left", "checkpoint.path")
    placed = error.at("jobs/a.yaml:7")
    assert (str(placed), placed.field) == ("jobs/a.yaml:7: no space left", "checkpoint.path")


@pytest.mark.parametrize(
    ("asks", "library"),
    [
        (lambda job: load_config(job), "transformers.AutoConfig.from_pretrained"),
        (lambda job: load_pretrained("nobody/nothing"), "transformers.AutoConfig.from_pretrained"),
        (
            lambda job: list(generate("nobody/nothing", ["The"], seed=0, sampling=None)),
            "transformers.AutoTokenizer.from_pretrained",
        ),
        (lambda job: locate_tokenizer("nobody/nothing", "tokenizer.path"), "huggingface_hub.snapshot_download"),
    ],
    ids=["load_config", "load_pretrained", "generate", "locate_tokenizer"],
)
@pytest.mark.parametrize("is_away", [True, False])
def test_whoever_asks_the_hub_tells_whether_it_is_away(
    asks: Callable[[JobConfig], Any], library: str, is_away: bool, make_job: MakeJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        cause: Exception = ConnectionRefusedError("refused") if is_away else ValueError("no such model")
        raise OSError("cannot load nobody/nothing") from cause

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr(library, fail)
    job = make_job("model.config=null", "model.path=nobody/nothing")
    with pytest.raises(ClmDistError, match="nobody/nothing is neither ") as caught:
        asks(job)
    assert type(caught.value) is (HubError if is_away else ConfigError)
