"""Errors of the Hub's clients, by who must act."""

from clm_dist.errors import ClmDistError, ConfigError, HubError
from clm_dist.files.storage import chain, http_status, is_passing


def describe_hub_error(error: BaseException, message: str, *, field: str | None = None) -> ClmDistError:
    """HubError where the Hub is away; ConfigError where the name, the token or a setting of this machine is wrong."""
    return (HubError if is_hub_away(error) else ConfigError)(message, field=field)


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
