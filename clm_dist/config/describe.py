"""The page docs/job-file.md, from the fields: `python -m clm_dist.config.describe > docs/job-file.md`."""

import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from clm_dist.config.job import JobConfig
from clm_dist.config.schema import section_of
from clm_dist.config.section import MOST

_HEAD = """\
# The job file

YAML with these sections. Unknown keys are refused, with the nearest valid key, the file and the line. `extends: FILE`
takes all values of another job file (a path from this one's directory, or the name of a packaged job), which this one
changes; `--set section.field=value` changes both. A job file reads no environment variable and runs no code. `clm-dist
init` writes one to start from, and `clm-dist schema` prints the JSON Schema, for editors.

`clm_dist/config/describe.py` writes this page from the fields:

```
python -m clm_dist.config.describe > docs/job-file.md
```
"""
_COLUMNS = "| field | default | values | meaning |\n| --- | --- | --- | --- |"


def describe_fields() -> str:
    """The page about the job file, in Markdown."""
    return "\n".join([_HEAD, *_describe(JobConfig, "", "")]).rstrip() + "\n"


def _describe(section: type[BaseModel], prefix: str, default: str) -> Iterator[str]:
    """The table of a section's own fields, then its inner sections."""
    schema = section.model_json_schema()
    rows, inner = [], []
    for name, field in section.model_fields.items():
        text = " ".join((field.description or "").split())
        if (model := section_of(section, name)) is not None:
            # Without a docstring under the field, the section's own says it.
            is_null = not field.is_required() and field.default is None
            inner.append((name, model, text or (model.__doc__ or "").strip(), "null" if is_null else ""))
            continue
        shown = "required" if field.is_required() else f"`{yaml_value(field.get_default(call_default_factory=True))}`"
        rows.append(f"| `{name}` | {shown} | {_values(schema['properties'][name])} | {_cell(text)} |")
    if prefix:
        yield f"## {prefix}\n"
        if default:
            yield f"The default of the whole section is `{default}`.\n"
    if rows:
        yield f"{_COLUMNS}\n" + "\n".join(rows) + "\n"
    for name, model, text, inner_default in inner:
        heading, *described = _describe(model, f"{prefix}.{name}".lstrip("."), inner_default)
        yield from (heading, f"{text}\n", *described)


def _values(schema: dict[str, Any]) -> str:
    """The values that a field takes, in words."""
    alternatives = [part for part in schema.get("anyOf", [schema]) if part.get("type") != "null"]
    return " or ".join(dict.fromkeys(_alternative(part) for part in alternatives))


def _alternative(schema: dict[str, Any]) -> str:
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{yaml_value(value)}`" for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])}: {_alternative(schema['prefixItems'][0])}"
        return f"a list: {_values(schema.get('items', {}))}"
    if kind == "object":
        return "a mapping"
    words = {"string": "text", "boolean": "`true`, `false`", "integer": "integer", "number": "number"}
    return words.get(str(kind), "any value") + _range(schema)


def _range(schema: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": "> ", "minimum": "≥ ", "maximum": "≤ ", "exclusiveMaximum": "< "}
    # An upper bound far above what can be meant is not worth a reader's time.
    bounds = [f"{sign}{schema[key]}" for key, sign in signs.items() if key in schema and schema[key] < MOST]
    return f" {', '.join(bounds)}" if bounds else ""


def yaml_value(value: Any) -> str:
    """A value as a job file has it; JSON is YAML."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    return value if isinstance(value, str) and value.strip() else json.dumps(value)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(describe_fields(), end="")
