"""Whether the trackers of a job are installed and logged in. Loads none of them, because that takes seconds."""

import importlib.util
import netrc
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from clm_dist.config.prometheus import listen_address
from clm_dist.errors import ConfigError
from clm_dist.extensions import find_extension
from clm_dist.train.trackers.services import GROUP

_MODULES = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet": "comet_ml",
    "prometheus": "prometheus_client",
}


def check_trackers(trackers: Sequence[str]) -> None:
    """Raise ConfigError where a tracker is not installed, or would have nobody to send to."""
    check_offers(trackers)
    for name in trackers:
        module = _MODULES.get(name)
        if module and importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"tracking has {name}, but {module} is not installed; pip install 'clm-dist[{name}]'",
                field="tracking",
            )
        if lack := _LACKS[name](os.environ) if name in _LACKS else None:
            raise ConfigError(f"tracking has {name}, but {lack}", field="tracking")


def check_offers(trackers: Sequence[str]) -> None:
    """Raise ConfigError where a tracker is neither built in nor offered by a package that is installed here."""
    for name in trackers:
        if name not in _MODULES:
            find_extension(GROUP, name, field="tracking", built_in=tuple(_MODULES))


def _lack_of_wandb(environment: Mapping[str, str]) -> str | None:
    if environment.keys() & {"WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"}:
        return None
    home = Path.home()
    # `wandb offline` writes the first.
    settings = [Path(environment.get("WANDB_DIR", ".")) / "wandb" / "settings", home / ".config" / "wandb" / "settings"]
    if _is_set(settings, "mode|api_key"):
        return None
    host = urlsplit(environment.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    files = [environment["NETRC"]] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(file).authenticators(host):
                return None
        except (OSError, netrc.NetrcParseError):
            continue
    return (
        f"there is no login for {host}; run `wandb login`, set WANDB_API_KEY, or set WANDB_MODE=offline to write "
        "files that `wandb beta sync` uploads later"
    )


def _lack_of_mlflow(environment: Mapping[str, str]) -> str | None:
    uri = environment.get("MLFLOW_TRACKING_URI")
    if not uri:
        return (
            "MLFLOW_TRACKING_URI is not set; set it to the address of a tracking server, for example "
            "http://127.0.0.1:5000, or with the whole of mlflow (pip install mlflow) to a file, "
            "sqlite:////home/me/mlflow.db"
        )
    # The extra has mlflow-skinny, which has no databases.
    is_database = re.match(r"(sqlite|mysql|postgresql|mssql)(\+\w+)?:", uri)
    if is_database and importlib.util.find_spec("sqlalchemy") is None:
        return "MLFLOW_TRACKING_URI is a database, for which mlflow-skinny is not enough; pip install mlflow"
    return None


def _lack_of_comet(environment: Mapping[str, str]) -> str | None:
    if environment.keys() & {"COMET_API_KEY", "COMET_START_ONLINE"}:
        return None
    files = [Path(".comet.config"), Path.home() / ".comet.config"]
    if "COMET_CONFIG" in environment:
        files.append(Path(environment["COMET_CONFIG"]).expanduser())
    if _is_set(files, "api_key"):
        return None
    return (
        "there is no API key; run `comet login`, set COMET_API_KEY, or set COMET_START_ONLINE=0 to write files that "
        "`comet upload` uploads later"
    )


def _lack_of_prometheus(environment: Mapping[str, str]) -> str | None:
    listen_address(environment)
    return None


_LACKS = {
    "wandb": _lack_of_wandb,
    "mlflow": _lack_of_mlflow,
    "comet": _lack_of_comet,
    "prometheus": _lack_of_prometheus,
}


def _is_set(files: Sequence[Path], key: str) -> bool:
    """Whether one of the settings files has a value for a key; a file that cannot be read has none."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        if re.search(rf"^\s*({key})\s*=\s*\S", text, re.MULTILINE):
            return True
    return False
