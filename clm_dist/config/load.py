"""Job files: read and merged, checked with file and line, saved and compared."""

import contextlib
import difflib
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from clm_dist.config import yaml_text
from clm_dist.config.blame import describe_problem, where_set
from clm_dist.config.job import JobConfig
from clm_dist.config.packaged import describe_packaged, find_job
from clm_dist.config.paths import local_path
from clm_dist.config.shown import shown
from clm_dist.errors import ClmDistError, ConfigError, first_line

# What YAML raises over a text that a person wrote, also for numbers of thousands of digits and nesting of thousands of
# levels.
_MALFORMED = (yaml.YAMLError, ValueError, TypeError, RecursionError)
_MOST_BYTES = 1 << 20
_PATH_MAX = 4096
_MOST_PROBLEMS = 10


@dataclass(frozen=True)
class Job:
    """A checked job, and where each of its fields was written."""

    config: JobConfig
    origins: Mapping[str, str]

    def where(self, field: str) -> str | None:
        """Where a field was set, `jobs/a.yaml:12` or `--set train.epochs=1`; None for a default."""
        return where_set(self.origins, field)


def load_job(path: Path, overrides: Sequence[str] = ()) -> Job:
    """The job of a file, of the files that it extends, and of `section.field=value` overrides, in that order.

    Args:
        path: of a file, or where no such file exists the name of a packaged job.

    Raises:
        ConfigError: a file is missing or does not parse, files extend each other in a circle, or a key
            or a value is wrong; the message names file and line.
    """
    path = find_job(path, str(path))
    merged: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for file, values, lines in _extension_chain(path):
        values.pop("extends", None)
        merged = _merged(merged, values)
        origins |= {field: f"{file}:{line}" for field, line in lines.items()}
    return make_job(merged, overrides, origins=origins, path=path)


def make_job(
    values: Mapping[str, Any], overrides: Sequence[str] = (), *, origins: Mapping[str, str] | None = None, path: Path
) -> Job:
    """The job of values, nested as in a job file, with `section.field=value` overrides.

    Args:
        origins: where fields were written.
        path: what an error names where a field has no origin.
    """
    merged: Any = values
    origins = dict(origins or {})
    for override in overrides:
        field, equals, _ = override.partition("=")
        place = f"--set {shown(override)}"
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", field):
            raise ConfigError(
                f"{place}: write it as section.field=value, for example --set train.epochs=1; a list is set as a "
                "whole, --set tracking=[tensorboard]"
            )
        try:
            change = yaml_text.load(override[len(field) + 1 :])
        except _MALFORMED as error:
            raise ConfigError(f"{place}: {_reason(error)}") from None
        for part in reversed(field.split(".")):
            change = {part: change}
        merged = _merged(merged, change)
        origins[field] = place
    return Job(_with_absolute_paths(_validated(merged, origins, path), origins), origins)


@contextlib.contextmanager
def located(job: Job) -> Iterator[None]:
    """Begin an error of a field with the file and the line that set the field."""
    try:
        yield
    except ClmDistError as error:
        where = job.where(error.field) if error.field else None
        if where is None:
            raise
        raise error.at(where) from error


def read_saved_job(path: Path) -> JobConfig:
    """The resolved job that a run directory holds, also as an earlier version wrote it.

    Options of sbatch that this version refuses are left out: nothing that is done with a saved job needs them.
    """
    values, lines = _parse(path, _read(path, ""))
    cluster, checkpoint = values.get("cluster"), values.get("checkpoint")
    if isinstance(cluster, dict):
        cluster.pop("max_restarts", None)  # it is train.max_failures now
        for section, removed in (("slurm", ("conda", "modules")), ("k8s", ("scheduler",))):
            if isinstance(cluster.get(section), dict):
                for key in removed:
                    cluster[section].pop(key, None)
    if isinstance(checkpoint, dict) and checkpoint.get("keep") == 1:
        checkpoint["keep"] = 2
    origins = {field: f"{path}:{line}" for field, line in lines.items()}
    try:
        config = _validated(values, origins, path)
    except ConfigError:
        slurm: Any = cluster.get("slurm") if isinstance(cluster, dict) else None
        prepare: Any = slurm.get("prepare") if isinstance(slurm, dict) else None
        for options_of in (slurm, prepare):
            if isinstance(options_of, dict):
                options_of.pop("options", None)
        config = _validated(values, origins, path)
    return _with_absolute_paths(config, origins)


def job_text(config: JobConfig) -> str:
    """The resolved job as YAML, which `load_job` reads back as the same job."""
    return yaml_text.dump(config.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """16 hex digits that stand for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _extension_chain(path: Path) -> list[tuple[Path, dict[str, Any], dict[str, int]]]:
    """The file and those it extends, the outermost base first, each with its values and lines."""
    chain: list[tuple[Path, dict[str, Any], dict[str, int]]] = []
    named_by = ""
    while True:
        text = _read(path, named_by)
        if any(path.samefile(seen) for seen, _, _ in chain):
            circle = " -> ".join(str(p) for p in [*(file for file, _, _ in chain), path])
            raise ConfigError(f"{named_by}extends runs in a circle: {circle}; remove one of them")
        values, lines = _parse(path, text)
        chain.append((path, values, lines))
        base = values.get("extends")
        if base is None:
            return chain[::-1]
        named_by = f"{path}:{lines['extends']}: extends: "
        if not isinstance(base, str):
            raise ConfigError(f"{named_by}must be the name of one job file, not {shown(repr(base))}")
        path = find_job(Path(os.path.normpath(path.parent / base)), base)


def _read(path: Path, named_by: str) -> str:
    try:
        about = path.stat()
        # A device or a pipe has no end.
        if not stat.S_ISREG(about.st_mode) and not stat.S_ISDIR(about.st_mode):
            raise ConfigError(f"{named_by}{path} is not a regular file; name a job file")
        if about.st_size > _MOST_BYTES:
            raise ConfigError(f"{named_by}{path} has {about.st_size:,} bytes, and a job file at most {_MOST_BYTES:,}")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        missing = f"{named_by}there is no job file {shown(str(path), _PATH_MAX)}"
        raise ConfigError(f"{missing}; {describe_packaged(path)}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a UTF-8 text file: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise ConfigError(f"{named_by}cannot read the job file {shown(str(path))}: {reason}") from None


def _parse(path: Path, text: str) -> tuple[dict[str, Any], dict[str, int]]:
    """A job file's values, and the line of each field by its dotted name."""
    lines: dict[str, int] = {}
    try:
        node = yaml_text.compose(text)
        if node is not None and not _is_job(node):
            # Not a word of it: it may be a file that is none of the reader's business.
            raise ConfigError(f"{path}: a job file is a mapping of sections (name, data, model, ...)")
        lines = dict(_lines(node))
        values = yaml_text.load(text) if node else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: not valid YAML: {_reason(error)}") from None
    except _MALFORMED as error:
        raise ConfigError(f"{path}: {_reason(error)}") from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}, lines


def _is_job(node: yaml.Node) -> bool:
    """Whether a document is a job file, perhaps with a misspelt section: a mapping with a key of one."""
    if not isinstance(node, yaml.MappingNode):
        return False
    known = ["extends", *JobConfig.model_fields]
    keys = [str(key.value) for key, _ in node.value]
    return not keys or any(difflib.get_close_matches(key, known, n=1) for key in keys)


def _lines(node: yaml.Node | None, prefix: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            field = f"{prefix}{key.value}"
            yield field, key.start_mark.line + 1
            yield from _lines(value, f"{field}.")


def _merged(base: Any, change: Any, field: str = "") -> Any:
    """A value with another over it: mappings key by key, anything else as a whole."""
    if not isinstance(base, dict) or not isinstance(change, dict):
        return change
    # model.config is one value: half of one architecture's configuration merged into another's fits neither.
    if field == ".model.config" and "model_type" in change:
        return change
    return base | {key: _merged(base.get(key), value, f"{field}.{key}") for key, value in change.items()}


def _validated(values: dict[str, Any], origins: Mapping[str, str], path: Path) -> JobConfig:
    try:
        return JobConfig.model_validate(values)
    except RecursionError as error:
        raise ConfigError(f"{path}: {_reason(error)}") from None
    except ValidationError as error:
        problems: dict[tuple[str, ...], list[str]] = {}
        for problem in error.errors(include_url=False):
            fields, message = describe_problem(dict(problem))
            problems.setdefault(fields, []).append(message)
        lines = []
        for fields, messages in problems.items():
            # A union reports one error a member: the first says the value, the others what else would do.
            also = "".join(f", or {m.split(': ', 1)[-1]}" for m in messages[1:])
            place = next((place for field in fields if (place := where_set(origins, field))), path)
            lines.append(f"{place}: {messages[0]}{also}")
        if len(lines) > _MOST_PROBLEMS:
            # One line that is missing may make each one below it wrong.
            lines[_MOST_PROBLEMS:] = [f"{path}: and {len(lines) - _MOST_PROBLEMS} more; mend the first of them first"]
        raise ConfigError("\n".join(lines)) from None


def _with_absolute_paths(config: JobConfig, origins: Mapping[str, str]) -> JobConfig:
    """The job with the directories that it names spelled out: workers run elsewhere. Hub ids stay as they are."""

    def absolute(path: str, field: str, *, only_directories: bool = False) -> str:
        if "://" in path:
            return path
        where = where_set(origins, field)
        local = local_path(path, f"{where}: {field}" if where else field)
        return path if only_directories and not local.is_dir() else str(local.absolute())

    def directory(path: str | None, field: str) -> str | None:
        return absolute(path, field, only_directories=True) if path else path

    def each(given: str | list[str] | None, field: str) -> str | list[str] | None:
        if isinstance(given, list):
            return [absolute(path, field) for path in given]
        return given if given is None else absolute(given, field)

    paths = {name: each(getattr(config.data, name), f"data.{name}") for name in ("path", "eval_path")}
    paths["dataset"] = directory(config.data.dataset, "data.dataset")
    data = config.data.model_copy(update=paths)
    tokenizer = config.tokenizer.model_copy(update={"path": directory(config.tokenizer.path, "tokenizer.path")})
    model = config.model.model_copy(update={"path": directory(config.model.path, "model.path")})
    checkpoint = config.checkpoint
    if checkpoint.path is not None:
        checkpoint = checkpoint.model_copy(update={"path": absolute(checkpoint.path, "checkpoint.path")})
    cluster = config.cluster
    if cluster.slurm.venv is not None:
        venv = absolute(cluster.slurm.venv, "cluster.slurm.venv")
        cluster = cluster.model_copy(update={"slurm": cluster.slurm.model_copy(update={"venv": venv})})
    update = {"data": data, "tokenizer": tokenizer, "model": model, "checkpoint": checkpoint, "cluster": cluster}
    return config.model_copy(update=update)


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return shown(getattr(error, "problem", None) or first_line(error))
