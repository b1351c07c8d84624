"""Storage that fsspec reaches, and what it raises in words."""

import contextlib
import re
from collections.abc import Iterator

from clm_dist.errors import ClmDistError, ConfigError, StorageError, first_line

# Wrong whenever it is tried: an unknown protocol, a name or a right that is missing.
_MEND_FIRST = (ValueError, TypeError, NotImplementedError, FileNotFoundError, PermissionError, NotADirectoryError)


@contextlib.contextmanager
def reaching(what: str, *, field: str | None = None) -> Iterator[None]:
    """Turn what a storage raises into an error that says so.

    Args:
        what: the option or the field, and its URL.
        field: dotted name of the job's field, if it is one.

    Raises:
        ConfigError: the address, the rights or a package is wrong.
        StorageError: the storage does not answer, or not as it should.
    """
    try:
        yield
    except ClmDistError:
        raise
    except Exception as error:  # each kind of storage raises errors of its own
        raise describe_storage_error(error, what, field=field) from error


def describe_storage_error(error: Exception, what: str, *, field: str | None = None) -> ClmDistError:
    """The error that a person understands; see `reaching`."""
    if isinstance(error, ImportError):
        extra = re.search(r"\b(s3|gs)://", what)
        hint = f"pip install 'clm-dist[{extra[1]}]'" if extra else "install the package that it names"
        return ConfigError(f"{what}: {first_line(error)}; {hint}", field=field)
    if _needs_a_person(error):
        advice = "check the address and your credentials"
        return ConfigError(f"{what}: {first_line(error)}; {advice}", field=field)
    advice = "check the address and your network, or run the same command again later"
    return StorageError(f"{what}: {first_line(error)}; {advice}", field=field)


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from, or while they were handled."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _needs_a_person(error: BaseException) -> bool:
    statuses = (status for cause in chain(error) if (status := http_status(cause)) is not None)
    if (status := next(statuses, None)) is not None:
        return not is_passing(status)
    # What was merely handled when it was raised says nothing about it.
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _MEND_FIRST) or "Credential" in type(cause).__name__:
            return True
        cause = cause.__cause__
    return False


def is_passing(status: int) -> bool:
    """Whether a server that answers with this HTTP status may answer otherwise later."""
    return status in (408, 425, 429) or status >= 500


def http_status(error: BaseException) -> int | None:
    """The status with which a server answered, wherever a library keeps it; None where it did not."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0) or None
    # aiohttp keeps it in the error (its `code` is deprecated), gcsfs too; requests and httpx in the response.
    for holder, name in ((error, "status"), (response, "status_code"), (error, "code")):
        if isinstance(status := getattr(holder, name, None), int):
            return status
    return None
