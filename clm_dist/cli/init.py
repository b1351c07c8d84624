"""The command `init`."""

from pathlib import Path
from typing import Annotated

import typer

from clm_dist.config.load import load_job
from clm_dist.config.packaged import JOBS
from clm_dist.config.shown import shown
from clm_dist.config.template import render_job
from clm_dist.errors import ConfigError


def init(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the run; the file is NAME.yaml, here.")] = "mine",
) -> None:
    """Write a commented job file to start from."""
    path = Path(f"{name}.yaml")
    try:
        load_job(JOBS / "quickstart.yaml", [f"name={name}"])
    except ConfigError:
        raise ConfigError(
            f"{shown(repr(name))} cannot be the name of a run, of letters, digits, '.', '_' and '-', at most 96, that "
            "begins with a letter or a digit; name another: clm-dist init NAME"
        ) from None
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(render_job(name))
    except FileExistsError:
        raise ConfigError(f"{path} exists and is not overwritten; name another: clm-dist init NAME") from None
    except OSError as error:
        raise ConfigError(
            f"cannot write {path}: {error.strerror}; run this in a directory that you may write to"
        ) from None
    typer.echo(f"wrote {path}; edit it, then: clm-dist run {path}")
