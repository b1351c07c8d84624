"""A job as strangers may read it: ids of the Hub, names without directories, nothing of a cluster or an account."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clm_dist.config.job import JobConfig
from clm_dist.config.schema import field_values

_PATHS = ("data.dataset", "data.path", "data.eval_path", "model.path", "tokenizer.path")
"""Fields that may hold a local path, of which the name alone is told."""
_UNTOLD = ("cluster.slurm.", "cluster.k8s.", "checkpoint.path", "hub.", "data.options")
"""Fields that belong to a cluster or an account, or that may name what is private."""


def public_fields(job: JobConfig) -> Iterator[tuple[str, Any, Any]]:
    """Dotted name, value and default of the fields of a job that strangers may read."""
    for name, value, default in field_values(job):
        if not name.startswith(_UNTOLD):
            yield name, _without_directories(value) if name in _PATHS else value, default


def changed_fields(job: JobConfig) -> dict[str, Any]:
    """The public fields of a job that are not at their defaults, nested as in a job file."""
    told: dict[str, Any] = {}
    for name, value, default in public_fields(job):
        if value == default:
            continue
        *sections, field = name.split(".")
        place = told
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    return told


def _without_directories(paths: Any) -> Any:
    if isinstance(paths, str):
        return paths if _is_hub_id(paths) else _name(paths)
    return [_without_directories(path) for path in paths] if isinstance(paths, list) else paths


def hub_model(job: JobConfig) -> str | None:
    """The Hub's id of the model that training began with. The Hub would take a local path for a wrong one."""
    return job.model.path if job.model.path and _is_hub_id(job.model.path) else None


def hub_dataset(job: JobConfig) -> str | None:
    """The Hub's id of the data set; None where the data come from elsewhere, such as a directory."""
    dataset = job.data.dataset if job.data.source == "hub" else None
    return dataset if dataset and _is_hub_id(dataset) else None


def data_name(job: JobConfig) -> str:
    """The data set and its split, or the names of the files."""
    data = job.data
    if data.source == "hub":
        return f"{_without_directories(data.dataset)}, {data.split}"
    if data.source == "builtin":
        return "the Python language reference (pydoc_data.topics)"
    if data.source == "plugin":
        return f"{data.plugin}, {data.split}"
    return _names(data.path)


def eval_name(job: JobConfig) -> str:
    """The files or the split that the eval records are; empty where they are a share of the records."""
    data = job.data
    if not data.has_own_eval:
        return ""
    files = _names(data.eval_path or data.path)
    of = {"hub": _without_directories(data.dataset), "files": files, "plugin": data.plugin}.get(data.source)
    named = [of, data.eval_split]
    return ", ".join(name for name in named if name)


def _names(paths: str | list[str] | None) -> str:
    return ", ".join(_name(path) for path in ([paths] if isinstance(paths, str) else paths or []))


def _name(path: str) -> str:
    """The name of a file; of a URL without its query, which may have a signature that opens the file."""
    return Path(urlsplit(path).path).name or "a URL" if "://" in path else Path(path).name


def _is_hub_id(path: str) -> bool:
    """Whether a model or a data set is named as on the Hub, and no directory is here under that name."""
    is_id = re.fullmatch(r"(?:[\w-][\w.-]*/)?[\w-][\w.-]*", path, re.ASCII) is not None
    return is_id and not Path(path).exists()
