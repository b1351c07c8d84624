"""The code of a working tree for pods whose image has an older one (`submit k8s --sync`).

The job's ConfigMap, which holds 1 MiB at most, has it as a zip file that Python imports from. All processes of the pods
use it instead of the image's code, Ray's workers included; a runtime environment of Ray would reach only the workers.
"""

import base64
import io
import subprocess
import zipfile
from pathlib import Path

from clm_dist.errors import ConfigError
from clm_dist.submit.k8s.request import Code

_MOST_BYTES = 900_000
"""Limit of the zip file; the ConfigMap also holds the job file."""


def pack(directory: Path) -> Code:
    """The files of the package that git tracks in the repository of a directory, in their present state.

    Raises:
        ConfigError: the directory is not in a repository of clm_dist, or the package is too large.
    """
    try:
        root = Path(_git(directory, "rev-parse", "--show-toplevel").strip())
        commit = _git(root, "rev-parse", "--short=12", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise ConfigError(
            f"--sync packs the git repository of the current directory, and git finds none: {said.strip()}; run "
            "this in a clone of clm_dist, or submit without --sync"
        ) from None
    names = _git(root, "ls-files", "-z", "clm_dist").split("\0")[:-1]
    if "clm_dist/__init__.py" not in names:
        raise ConfigError(
            f"--sync packs the repository {root}, which is not one of clm_dist; run this in a clone of it"
        )
    if new := _git(root, "ls-files", "-z", "--others", "--exclude-standard", "clm_dist/*.py").split("\0")[0]:
        raise ConfigError(f"--sync packs what git tracks, and {new} is new; run `git add`, or remove it")
    for name in names:
        if (root / name).is_symlink():
            raise ConfigError(f"--sync follows no links, and {name} is one; put a file in its place")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            file = root / name
            if file.is_file():  # it may have been removed
                # ZipInfo has a fixed time, so the same files make the same bytes.
                archive.writestr(zipfile.ZipInfo(name), file.read_bytes(), zipfile.ZIP_DEFLATED)
    size = packed.tell()
    if size > _MOST_BYTES:
        raise ConfigError(
            f"--sync: the files that git tracks in {root}/clm_dist are {size:,} bytes when packed, and {_MOST_BYTES:,} "
            "at most fit; untrack large ones, or build an image (k8s/README.md)"
        )
    changed = "-changed" if _git(root, "status", "--porcelain", "--untracked-files=no").strip() else ""
    return Code(base64.b64encode(packed.getvalue()).decode(), f"{commit}{changed}")


def _git(directory: Path, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
