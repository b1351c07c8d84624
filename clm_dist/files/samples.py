"""The content of samples.json: what a run's model writes after one prompt, before and after training."""

from typing import NotRequired, TypedDict

from clm_dist.files.atomic import read_json, write_json
from clm_dist.files.run_dir import RunDir


class Samples(TypedDict):
    """Each text begins with the prompt."""

    prompt: str
    seed: int
    before: NotRequired[str]
    """By the model that training starts from; missing where that could not be loaded."""
    after: str


def read_samples(run: RunDir) -> Samples | None:
    """The samples of a run; None where it has none."""
    samples: Samples | None = read_json(run.samples) if run.samples.is_file() else None
    return samples


def write_samples(run: RunDir, samples: Samples) -> None:
    write_json(run.samples, samples)
