"""The base class and the types of the job file's sections."""

from collections.abc import Mapping
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

# Far above what can be meant, and small enough for every library that gets it.
MOST = 2**31
ExtensionName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
"""Name of an entry point of an installed package."""
Count = Annotated[int, Field(gt=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed that numpy, torch and datasets all take."""


def wrong(field: str, problem: str, *others: str) -> PydanticCustomError:
    """A validation error that a whole section (or the whole job) is needed to see.

    Args:
        field: the field at fault.
        others: fields that have a part in it; the first of them all that the job sets is where the error is shown.
    """
    return PydanticCustomError("job", "{problem}", {"problem": problem, "fields": [field, *others]})


def without_removed(values: Any, section: str, removed: Mapping[str, str]) -> Any:
    """The values of a section without the keys that earlier versions had, where these are not set.

    Args:
        removed: what to write instead, by key.

    Raises:
        PydanticCustomError: such a key has a value.
    """
    if not isinstance(values, dict):
        return values
    for key in removed.keys() & values.keys():
        # A job that an earlier version saved has the keys with their defaults.
        if values[key] not in (None, [], "default"):
            raise wrong(f"{section}.{key}", f"{section}.{key} does not exist any more; {removed[key]}")
    return {key: value for key, value in values.items() if key not in removed}


class Section(BaseModel):
    """A section: typed, frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        # pydantic takes `epochs: true` for 1.
        if isinstance(value, bool) and info.field_name:
            annotation = cls.model_fields[info.field_name].annotation
            if annotation is bool or bool in get_args(annotation):
                return value
            raise PydanticCustomError("bool", "input should not be true or false")
        return value
