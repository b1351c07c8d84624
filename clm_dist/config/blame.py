"""Where a job's field was written, and what is wrong with it in words."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from clm_dist.config.job import JobConfig
from clm_dist.config.schema import section_of
from clm_dist.config.shown import shown


def describe_problem(error: dict[str, Any]) -> tuple[tuple[str, ...], str]:
    """The field at fault, with those that have a part in it, and what is wrong with it."""
    location = [str(part) for part in error["loc"]]
    if error["type"] == "job":
        return tuple(error["ctx"]["fields"]), str(error["msg"])
    field = _known_prefix(location)
    if error["type"] == "extra_forbidden":
        field = ".".join(location)
        valid = list(_model_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        advice = f"did you mean {near[0]}?" if near else f"valid keys here: {', '.join(valid)}"
        return (field,), f"unknown key {shown(field)}; {advice}"
    if error["type"] == "missing":
        return (field,), f"{field} is missing; add it to the job file"
    problem = str(error["msg"][0]).lower() + str(error["msg"][1:])
    return (field,), f"{field} is {shown(repr(error['input']))}: {problem}"


def _known_prefix(location: Sequence[str]) -> str:
    """The part of an error's location that names fields; what follows names a union's members."""
    model: type[BaseModel] | None = JobConfig
    known: list[str] = []
    for part in location:
        if model is None or part not in model.model_fields:
            break
        known.append(part)
        model = section_of(model, part)
    return ".".join(known)


def _model_at(location: Sequence[str]) -> type[BaseModel]:
    model: type[BaseModel] = JobConfig
    for part in location:
        model = section_of(model, part) or model
    return model


def where_set(origins: Mapping[str, str], field: str) -> str | None:
    """Where a field, or something in it, was overridden, else its line or that of the nearest section that has one."""
    inside = [place for name, place in origins.items() if name.startswith(f"{field}.") and place.startswith("--set ")]
    if inside:
        return inside[-1]
    while field:
        if field in origins:
            return origins[field]
        field = field.rpartition(".")[0]
    return None
