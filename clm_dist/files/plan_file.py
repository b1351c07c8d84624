"""plan.json: what was planned for a run. `plan --save` and `submit --plan` write it; `report` and `status` read it."""

from typing import Annotated, Any, Final, Literal

from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

from clm_dist.errors import ConfigError, first_line
from clm_dist.files.atomic import make_dir, write_json
from clm_dist.files.run_dir import RunDir

FORMAT: Final = 1


class Interval(TypedDict):
    """A figure, and the interval in which it is expected."""

    value: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat


class PlannedSize(TypedDict):
    """What is planned for a number of workers."""

    workers: int
    seconds: Interval | None
    """Time from the start of the driver to the evaluation of the written model, which is what the records cover."""
    tokens_per_s: Interval | None
    """Speed of all workers together; this and the time are None where the plan has no speed."""
    memory_bytes: Interval | None
    """Memory of a worker, as the records have it; None where neither a formula nor a measurement tells it."""


class PlanFile(TypedDict):
    """The content of plan.json."""

    format: Literal[1]
    made: FiniteFloat
    """Seconds since the epoch."""
    version: str
    """Version of clm-dist that made the plan."""
    job: dict[str, Any]
    """The fields that the plan rests on; see `config.differences.computed_values`."""
    device: str
    """Name of a GPU as `--gpu` takes it, or as its driver has it; `CPU`, or `this GPU` for one that is described."""
    workers: int
    """Number of workers that the job asks for."""
    price: FiniteFloat | None
    """Price of a GPU for an hour; None where none was given."""
    steps: Interval
    evaluations: int
    """Number of evaluations, with the one before training and the one of the written model."""
    sizes: Annotated[list[PlannedSize], Field(min_length=1)]
    speed: str | None
    """Where the speed is from, in words."""
    loss: Interval | None
    """The eval loss to expect."""
    plan: dict[str, Any]
    """The object that `plan --json` prints."""


def make_room(run: RunDir) -> None:
    """Make the directory of a run, which need not have begun, for its plan.

    Raises:
        ConfigError, StorageError: it cannot be written; or something else is in the plan's place.
    """
    make_dir(run.root)
    if run.plan.exists() and not run.plan.is_file():
        raise ConfigError(f"{run.plan} is not a file, so no plan can be kept there; remove it")


def write_plan(run: RunDir, plan: PlanFile) -> None:
    """Write the plan of a run. Raises what `make_room` raises."""
    make_room(run)
    # Like job.yaml: it has fields of the job.
    write_json(run.plan, plan, private=True)


def read_plan(run: RunDir) -> PlanFile | str | None:
    """The plan of a run; why it cannot be read, in words; None where there is none."""
    try:
        text = run.plan.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{run.plan} cannot be read: {error.strerror}"
    except UnicodeDecodeError as error:
        return _damaged(run, first_line(error))
    try:
        # Unlike json's, its strings can be printed.
        values = from_json(text)
    except ValueError as error:
        return _damaged(run, first_line(error))
    if isinstance(values, dict) and values.get("format", FORMAT) != FORMAT:
        return _damaged(run, f"it has the format {values['format']}, and this version reads {FORMAT}")
    try:
        # Further keys may come from a later version.
        return TypeAdapter(PlanFile).validate_python(values)
    except ValidationError as error:
        problem = error.errors()[0]
        return _damaged(run, ": ".join(filter(None, [".".join(map(str, problem["loc"])), problem["msg"]])))


def _damaged(run: RunDir, reason: str) -> str:
    return f"{run.plan} cannot be read: {reason}; `clm-dist plan JOB --save` writes it anew"
