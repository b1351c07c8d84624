"""The size of a job's model: `python -m clm_dist.doctor.model_size`, because torch and transformers take seconds."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from clm_dist.config.job import JobConfig
from clm_dist.doctor.finding import Finding, error, ok, unchecked
from clm_dist.errors import ClmDistError, TryAgainError
from clm_dist.plan.disk import estimate_disk


@dataclass(frozen=True)
class Size:
    """What was found of a model."""

    num_parameters: int | None = None
    problem: str | None = None
    """Why a run with it would be refused."""
    passes: bool = False
    """Whether the problem may pass."""


def find_size(job: JobConfig, timeout_s: float) -> Size | None:
    """Check and measure a job's model in a process of its own; None where that takes too long."""
    # Nothing is imported from the working directory.
    command = [sys.executable, "-P", "-m", "clm_dist.doctor.model_size"]
    try:
        ended = subprocess.run(command, input=job.model_dump_json(), capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return None
    try:
        return Size(**json.loads(ended.stdout.splitlines()[-1]))
    except (ValueError, IndexError, TypeError):
        *_, last = ["it ends without a word", *filter(None, ended.stderr.splitlines())]
        return Size(problem=f"the model cannot be looked at: {last}")


def measure_size(job: JobConfig) -> Size:
    """Build the model without weights; imports torch and transformers."""
    from clm_dist.train.model import check_model, load_config

    try:
        check_model(job)
    except ClmDistError as problem:
        return Size(problem=str(problem), passes=isinstance(problem, TryAgainError))
    import torch

    from clm_dist.train.model import build_model

    config = load_config(job)
    trained, text = job.tokenizer.train, config.get_text_config()
    if trained is not None and "vocab_size" not in (job.model.config or {}):
        # The tokenizer that is trained decides it.
        text.vocab_size = trained.vocab_size
        text.pad_token_id = None
    with torch.device("meta"):
        return Size(sum(parameter.numel() for parameter in build_model(config).parameters()))


def estimate_disk_needs(job: JobConfig, num_parameters: int) -> dict[str, int]:
    """Bytes that a run writes at most, by the name of the place: its checkpoints and its model, twice where it replaces
    another. Blocks and logs are not in it.
    """
    disk = estimate_disk(job, num_parameters)
    checkpoints, models = int(disk.checkpoints), int(2 * disk.model)
    if job.checkpoint.path is None:
        return {"runs": checkpoints + models}
    return {"checkpoints": checkpoints, "runs": models}


def judge_size(found: Size | None) -> Iterator[Finding]:
    if found is None:
        yield unchecked("job", "the model and the size of its checkpoints, because that took too long")
    elif found.problem:
        why, mend = "a run is refused before it trains", "see the message"
        yield error("job", found.problem, why, mend, passes=found.passes)
    elif found.num_parameters is not None:
        yield ok("job", f"the model can be built: {found.num_parameters:,} parameters")


def main() -> None:
    job = JobConfig.model_validate_json(sys.stdin.read())
    print(json.dumps(asdict(measure_size(job))), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
