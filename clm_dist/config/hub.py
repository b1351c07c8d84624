"""The section `hub` of a job file."""

from typing import Literal

from clm_dist.config.section import Section


class HubConfig(Section):
    """Where the model is pushed."""

    push: Literal["never", "end", "epoch"] = "never"
    """When to push: never, at the end, or after every epoch as well."""
    repo: str | None = None
    """Repository, `user/name`; null takes the token's user and the job's name."""
    private: bool = True
    """Create the repository private."""
    language: str | list[str] | None = None
    """Language of the text, for the model card: an ISO 639-1 code such as `en`, or several."""
    license: str | None = None
    """Licence of the model, for the card: an identifier of the Hub, such as `apache-2.0`."""
    limitations: str | None = None
    """What the model is not good for, in Markdown, for the card."""
