"""Errors of the Hub's clients, by who must act."""

import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from clm_dist.errors import FULL, ClmDistError, ConfigError, HubError, describe_os_error, first_line
from clm_dist.files.atomic import system_error
from clm_dist.files.storage import chain, http_status, is_passing

logger = logging.getLogger(__name__)

T = TypeVar("T")


def downloading(load: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """The value of a call that downloads from the Hub.

    Large files come from Xet's servers, which a firewall may not let through though the Hub itself is reached: where
    that fails, the call is made once more, and everything else of this process comes from the Hub alone.
    """
    from huggingface_hub import constants

    try:
        return load(*arguments, **options)
    except Exception as error:  # of the transport, of Xet, or what a library made of it
        if constants.HF_HUB_DISABLE_XET or not _is_of_xet(error):
            raise
        *_, cause = chain(error)
        logger.warning("Xet fails (%s); files are downloaded from the Hub itself", first_line(cause))
        constants.HF_HUB_DISABLE_XET = True
    return load(*arguments, **options)


def _is_of_xet(error: BaseException) -> bool:
    """Whether an error comes out of a download from Xet; its client's errors have no class of their own."""
    frames = (frame for cause in chain(error) for frame, _ in traceback.walk_tb(cause.__traceback__))
    return any(frame.f_code.co_name == "xet_get" for frame in frames)


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
