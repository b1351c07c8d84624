"""The fields of a job file: their names, and their JSON Schema."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from clm_dist.config.job import JobConfig


def job_schema() -> dict[str, Any]:
    """JSON Schema of a job file, for editors."""
    schema = JobConfig.model_json_schema()
    schema["properties"]["extends"] = {"type": "string", "description": "Job file that this one changes."}
    # A field that is missing in a file may be in the file that it extends.
    schema.pop("required", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def field_names(section: type[BaseModel] = JobConfig, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of a job."""
    for name in section.model_fields:
        inner = section_of(section, name)
        yield from field_names(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]


def field_values(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, value and default of every field of a job; the default of a field that must be set is `...`."""
    values = section.model_dump(mode="json")
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from field_values(value, f"{prefix}{name}.")
        else:
            default = ... if field.is_required() else field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", values[name], default


def section_of(model: type[BaseModel], field: str) -> type[BaseModel] | None:
    """The model behind a field's annotation, `Section` or `Section | None`."""
    annotation = model.model_fields[field].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
