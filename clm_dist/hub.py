"""The model to the Hub: pushed, checked there, and never lost when the Hub fails.

`hub.json` in the run directory says what was pushed and what is still to push:
`{"repo", "private", "pushed": [{"repo", "asked", "step", "commit", "url", "time"}],
"pending": {"step", "path", "error"} | null}`; the outer `repo` and `private` are those of the last push that was tried,
`asked` is the repository as it was named, perhaps without its user.
"""

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from clm_dist.config.job import JobConfig
from clm_dist.errors import ClmDistError, ConfigError, HubError, first_line
from clm_dist.files.atomic import damaged, read_json, write_json
from clm_dist.files.run_dir import RunDir
from clm_dist.files.storage import http_status, is_passing

logger = logging.getLogger(__name__)

# Few: the library's own tries, where it has any, take 23 s.
RETRY_DELAYS_S: Sequence[float] = (2, 8)

T = TypeVar("T")


def check_access(job: JobConfig) -> str | None:
    """The repository that the job will push to, checked before any GPU is held; None where the Hub does not answer.

    Raises:
        ConfigError: no repository can have its name, there is no token, or the Hub refuses it.
    """
    try:
        return repo_of(job)
    except HubError as error:
        logger.warning("%s; training goes on, the push is tried when it is due", error)
        return None


def check_card(front_matter: str) -> None:
    """Have the Hub validate the front matter of a model card, which it would refuse with the first push.

    Raises:
        ConfigError: it refuses it. A Hub that does not answer says nothing.
    """
    from huggingface_hub import RepoCard

    try:
        RepoCard(f"---\n{front_matter}---\n").validate(repo_type="model")
    except ValueError as error:
        raise ConfigError(
            f"the Hub refuses the model card ({first_line(error)}); mend what it names; hub.language and "
            "hub.license are the job's own, see https://huggingface.co/docs/hub/model-cards",
            field="hub",
        ) from None
    except Exception as error:  # the transport's errors have no common base that is public
        logger.warning("the Hub does not validate the model card: %s", first_line(error))


def repo_of(job: JobConfig, repo: str | None = None) -> str:
    """The repository's full name: the one that is named, with the token's user where it names none.

    Raises:
        ConfigError: no repository can have this name, there is no token, or the Hub refuses it.
        HubError: the Hub does not answer.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    repo = _valid_name(job, repo)
    if get_token() is None:
        raise ConfigError(
            "there is no Hub token to push with; run `hf auth login` or set HF_TOKEN, or set hub.push to never",
            field="hub.push",
        )
    try:
        # Also where the name is full: a token that is refused must not show only when the model is trained.
        account = HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise ConfigError(
                "the Hub refuses the token; log in again with `hf auth login` or set another HF_TOKEN", field="hub.push"
            ) from None
        raise HubError(f"the Hub does not say whose token this is: {first_line(error)}") from error
    except Exception as error:  # the transport's errors have no common base that is public
        raise HubError(f"the Hub is not reachable: {first_line(error)}") from error
    if not _may_write(account):
        raise ConfigError(
            f"the Hub token of {account['name']} may only read, and a push needs the permission repo.write; make a "
            "token that may write at https://huggingface.co/settings/tokens and log in with it (`hf auth login`), or "
            "set hub.push to never",
            field="hub.push",
        )
    return repo if "/" in repo else f"{account['name']}/{repo}"


def _may_write(account: Mapping[str, Any]) -> bool:
    """Whether a token may write to any repository; what the Hub does not say counts as yes, and a push then tells."""
    token = account.get("auth", {}).get("accessToken") or {}
    if token.get("role") != "fineGrained":
        return bool(token.get("role") != "read")
    scopes = token.get("fineGrained", {}).get("scoped")
    return scopes is None or any("repo.write" in scope.get("permissions", ()) for scope in scopes)


def find_repo(job: JobConfig, repo: str | None = None) -> str | None:
    """The repository's full name; None where it cannot be told now, for a reason that a push then says."""
    with contextlib.suppress(ConfigError, HubError):
        return repo_of(job, repo)
    return None


def _valid_name(job: JobConfig, repo: str | None) -> str:
    """The repository as it is named. Raises ConfigError where the Hub takes no such name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    name = repo or job.hub.repo or job.name
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        given = "--repo" if repo else "hub.repo" if job.hub.repo else "name"
        raise ConfigError(
            f"{given} {name} cannot name a repository of the Hub: {first_line(error)}; set hub.repo to user/name",
            field=None if repo else given,
        ) from None
    return name


def pushed_url(job: JobConfig, run: RunDir, step: int) -> str | None:
    """Where the job's repository has the model of a step already; None where it is still to push."""
    target = job.hub.repo or job.name
    for entry in _state(run)["pushed"]:
        # A job may leave out the user, whom only the Hub knows: then what was asked for is compared.
        name = entry["repo"] if "/" in target else entry["asked"]
        if (name, entry["step"]) == (target, step):
            return str(entry["url"])
    return None


def push(
    job: JobConfig,
    run: RunDir,
    directory: Path,
    step: int,
    *,
    repo: str | None = None,
    private: bool | None = None,
) -> str:
    """Push a model's directory, check that the Hub has every byte of it, and give its address.

    What fails for a passing reason is tried again; what fails for good is pending in hub.json. A name that the Hub
    does not take is refused before hub.json is touched.

    Args:
        repo: instead of the job's.
        private: instead of the job's; only where the repository does not exist yet.

    Raises:
        HubError, ConfigError: the push failed; the directory is whole.
    """
    private = job.hub.private if private is None else private
    state = _state(run) | {"repo": _valid_name(job, repo), "private": private}
    state["pending"] = {"step": step, "path": str(directory), "error": "the push did not end"}
    write_json(run.hub, state, private=True)
    try:
        state["repo"] = full_name = _retrying(lambda: repo_of(job, repo))
        commit, url = _retrying(lambda: _upload(full_name, directory, step, private))
    except Exception as error:  # whatever a push raises, the run's work must be left pending, not lost
        described = error if isinstance(error, ClmDistError) else _describe(error, str(state["repo"]))
        state["pending"]["error"] = str(described)
        write_json(run.hub, state, private=True)
        raise described from error
    when = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    asked = repo or job.hub.repo or job.name
    state["pushed"].append(
        {"repo": full_name, "asked": asked, "step": step, "commit": commit, "url": url, "time": when}
    )
    state["pending"] = None
    write_json(run.hub, state, private=True)
    return url


def files_to_push(directory: Path) -> list[tuple[str, int]]:
    """Name and size in bytes of every file that a push of a model's directory uploads."""
    return [(str(path.relative_to(directory)), path.stat().st_size) for path in _files(directory)]


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _state(run: RunDir) -> dict[str, Any]:
    """The content of hub.json. Raises ConfigError where it is damaged."""
    state: dict[str, Any] = read_json(run.hub) if run.hub.exists() else {"pushed": []}
    try:
        complete = all(entry.keys() >= {"repo", "asked", "step", "url"} for entry in state["pushed"])
    except (KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise damaged(run.hub, "it does not list what was pushed")
    return state


def _upload(repo: str, directory: Path, step: int, private: bool) -> tuple[str, str]:
    """The commit and the address of a directory's upload. Uploading again what is there commits nothing."""
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    commit = api.upload_folder(repo_id=repo, folder_path=directory, commit_message=f"Model after step {step}")
    there = {file.path: file for file in api.list_repo_tree(repo, recursive=True, revision=commit.oid)}
    for path in _files(directory):
        name = str(path.relative_to(directory))
        if name not in there or not _same(path, there[name]):
            raise HubError(f"the Hub's {repo} does not hold {name} as it was pushed")
    return commit.oid, str(url)


def _same(path: Path, file: Any) -> bool:
    """Whether a file of the Hub has the bytes of a local one, by the hash that the Hub reports."""
    if file.lfs:
        with path.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest() == str(file.lfs.sha256)
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == str(file.blob_id)


def _retrying(action: Callable[[], T]) -> T:
    """The action's value, tried again where it fails for a reason that passes.

    huggingface_hub itself retries some requests and not others: a commit without Xet, or creating a repository, is
    tried once.
    """
    for delay in RETRY_DELAYS_S:
        try:
            return action()
        except Exception as error:  # judged below
            status = http_status(error)
            if isinstance(error, ConfigError) or (status is not None and not is_passing(status)):
                raise
            logger.warning("the push failed (%s), next try in %s s", first_line(error), delay)
            time.sleep(delay)
    return action()


def _describe(error: Exception, repo: str) -> ClmDistError:
    status = http_status(error)
    if status == 401:
        return ConfigError("the Hub refuses the token; log in again with `hf auth login` or set another HF_TOKEN")
    if status == 403:
        return ConfigError(
            f"the token may not write to {repo}; use a token with write access to it, or set hub.repo", field="hub.repo"
        )
    message = f"the push to {repo} failed: {first_line(error)}"
    return HubError(message) if status is None or is_passing(status) else ConfigError(message)
