"""Errors of the Hub's clients, by who must act."""

from pathlib import Path

from clm_dist.errors import FULL, ClmDistError, ConfigError, HubError, describe_os_error
from clm_dist.files.atomic import system_error
from clm_dist.files.storage import chain, http_status, is_passing


def describe_hub_error(error: BaseException, message: str, *, field: str | None = None) -> ClmDistError:
    """The error that a person understands for one of the Hub's clients.

    Returns:
        HubError where the Hub is away, StorageError where the disk for its files is full, ConfigError where the name,
        the token or a setting of this machine is wrong.
    """
    if full := describe_full_disk(error):
        return full
    return (HubError if is_hub_away(error) else ConfigError)(message, field=field)


def describe_full_disk(error: BaseException) -> ClmDistError | None:
    """The error that a person understands where the disk for the Hub's files is full; None for anything else."""
    from huggingface_hub.constants import HF_HOME

    for cause in chain(error):
        fault = system_error(cause, Path(HF_HOME))
        if isinstance(fault, OSError) and fault.errno in FULL:
            return describe_os_error(fault, Path(fault.filename or HF_HOME))
    return None


def is_hub_away(error: BaseException) -> bool:
    """Whether the Hub does not answer, or asks to come again, so that the same call may work later."""
    from huggingface_hub import is_offline_mode

    if is_offline_mode():
        return False
    causes = list(chain(error))
    if statuses := [status for cause in causes if (status := http_status(cause)) is not None]:
        return is_passing(statuses[0])
    return any(isinstance(cause, (ConnectionError, TimeoutError)) or _is_of_transport(cause) for cause in causes)


def _is_of_transport(error: BaseException) -> bool:
    # httpx and its successors are huggingface_hub's, and the package's name changes with it.
    return any(kind.__name__ == "TransportError" for kind in type(error).__mro__)
