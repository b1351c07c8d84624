"""A commented job file to start from: the packaged quickstart, and every other field with its default."""

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from clm_dist.config import yaml_text
from clm_dist.config.describe import yaml_value
from clm_dist.config.job import ClusterConfig, JobConfig
from clm_dist.config.packaged import JOBS
from clm_dist.config.schema import section_of

_HEAD = """\
# A job of clm-dist, which runs as it is: clm-dist run {name}.yaml
# For your own text, set data.source to files, data.path to them (texts/*.jsonl) and data.text to the field of the text.
# A line such as `#seed: 42` shows a field's default: remove its # to set the field, and the # of its section, if any.
# `clm-dist schema` prints all fields, those of cluster.slurm and cluster.k8s as well.
"""
_WIDTH = 110


def render_job(name: str) -> str:
    """The text of a job file: the fields of the quickstart, and all others as comments with their defaults."""
    start = yaml_text.load((JOBS / "quickstart.yaml").read_text(encoding="utf-8"))
    return _HEAD.format(name=name) + "\n".join(_fields(JobConfig, start | {"name": name}, "")) + "\n"


def _fields(section: type[BaseModel], start: Mapping[str, Any] | None, indent: str) -> Iterator[str]:
    """The lines of a section.

    Args:
        start: the values that are set; None where the section is not.
    """
    for name, field in section.model_fields.items():
        if section is ClusterConfig and name in ("slurm", "k8s"):
            continue
        inner = section_of(section, name)
        is_set = start is not None and name in start
        about = " ".join((field.description or (inner.__doc__ if inner else None) or "").split())
        default = None if field.is_required() else yaml_value(field.get_default(call_default_factory=True))
        if is_set and inner is None and default is not None:
            about += f" The default is {default}."
        yield from ("", *_comment(about, indent)) if not indent else _comment(about, indent)
        mark = "" if is_set else "#"
        if inner is not None:
            yield f"{indent}{mark}{name}:"
            yield from _fields(inner, start[name] if start is not None and is_set else None, f"{indent}  ")
        else:
            yield f"{indent}{mark}{name}: {yaml_value(start[name]) if start is not None and is_set else default}"


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, _WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)
