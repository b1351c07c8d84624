"""Storage that fsspec reaches, and what it raises in words."""

import contextlib
from collections.abc import Iterator

from clm_dist.errors import ClmDistError, ConfigError, first_line


@contextlib.contextmanager
def reaching(what: str, *, field: str | None = None) -> Iterator[None]:
    """Turn what a storage raises into a ConfigError that says so.

    Args:
        what: the option or the field, and its URL.
        field: dotted name of the job's field, if it is one.
    """
    try:
        yield
    except ClmDistError:
        raise
    except ImportError as error:
        hint = "pip install 'clm-dist[s3]' for s3://, 'clm-dist[gs]' for gs://"
        raise ConfigError(f"{what}: {first_line(error)}; {hint}", field=field) from error
    except Exception as error:  # each kind of storage raises errors of its own
        raise ConfigError(
            f"{what}: {first_line(error)}; check the address, your network and your credentials", field=field
        ) from error
