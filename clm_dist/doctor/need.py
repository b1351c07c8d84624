"""What a job needs of the nodes that it runs on, as the checks take it."""

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from clm_dist.config.job import ClusterConfig, JobConfig
from clm_dist.files.stores import Stores


@dataclass(frozen=True)
class Place:
    """A place that a run writes to."""

    name: str
    """`runs`, `store`, ..., as people know it."""
    where: str
    """A directory, or a URL."""
    option: str
    """What names it: an option, a field or a variable."""
    is_shared: bool
    """Whether every node must see the same."""

    @property
    def is_url(self) -> bool:
        return "://" in self.where


@dataclass(frozen=True)
class Need:
    """What is asked of the nodes. Without a job, what every run needs."""

    places: tuple[Place, ...]
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    models: tuple[str, ...] = ()
    """Models and tokenizers of the Hub that every worker loads."""
    dataset: str | None = None
    """Data set of the Hub."""
    pushes: bool = False
    has_job: bool = False

    @classmethod
    def of(cls, job: JobConfig | None, runs: Path, stores: Stores) -> "Need":
        places = [
            Place("runs", str(runs), "--runs", is_shared=True),
            Place("store", str(stores), "--store", is_shared=True),
            Place("temporary files", _temporary_directory(), "TMPDIR", is_shared=False),
        ]
        if stores.url:
            places.append(Place("copies of the store", str(stores.local), "XDG_CACHE_HOME", is_shared=False))
        if job is None:
            return cls(tuple(places))
        if job.checkpoint.path is not None:
            path = job.checkpoint.path.removeprefix("file://")
            places.append(Place("checkpoints", path, "checkpoint.path", is_shared=True))
        models = [name for name in (job.model.path, job.tokenizer_path) if name and not Path(name).exists()]
        dataset = job.data.dataset if job.data.source == "hub" else None
        if models or dataset:
            home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
            kept, name = os.environ.get("HF_HUB_CACHE"), "HF_HUB_CACHE"
            if not kept:
                kept, name = home, "HF_HOME"
            places.append(Place("files of the Hub", str(Path(kept).expanduser()), name, is_shared=False))
        return cls(
            tuple(places),
            job.cluster,
            models=tuple(dict.fromkeys(models)),
            dataset=dataset,
            pushes=job.hub.push != "never",
            has_job=True,
        )


def _temporary_directory() -> str:
    try:
        return tempfile.gettempdir()
    except FileNotFoundError:  # none can be written
        return "/tmp"
