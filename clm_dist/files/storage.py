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
    if any(_needs_a_person(cause) for cause in chain(error)):
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
    status = http_status(error)
    if status is not None:
        return not is_passing(status)
    return isinstance(error, _MEND_FIRST) or "Credential" in type(error).__name__


def is_passing(status: int) -> bool:
    """Whether a server that answers with this HTTP status may answer otherwise later."""
    return status in (408, 425, 429) or status >= 500


def http_status(error: BaseException) -> int | None:
    """The status with which a server answered, wherever a library keeps it; None where it did not."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode") or 0) or None
    # aiohttp and gcsfs keep it in the error; requests and httpx in its response.
    kept = (getattr(error, "status", None), getattr(error, "code", None), getattr(response, "status_code", None))
    return next((status for status in kept if isinstance(status, int)), None)
