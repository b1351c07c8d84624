"""Whether the Hub answers for what a job names, and whether its token may push."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from clm_dist.config.job import JobConfig
from clm_dist.doctor.bounded import begin
from clm_dist.doctor.environment import is_offline
from clm_dist.doctor.finding import Finding, error, note, ok, unchecked, warning
from clm_dist.errors import ConfigError, HubError, first_line

_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Answer:
    """What a node learned of a name of the Hub."""

    name: str
    kind: str
    """`model` or `dataset`."""
    is_cached: bool
    """Whether a part of it is in the cache of this node; of a data set that is not known."""
    is_there: bool = False
    problem: str | None = None
    is_away: bool = False
    """Whether the problem may pass."""


def ask_hub(models: tuple[str, ...], dataset: str | None, offline: bool, data_offline: bool) -> list[Answer]:
    """Ask the Hub for the names of a job at once, within seconds. Loads no torch and downloads nothing."""
    # In threads that nobody waits for: a server may send a byte now and then for ever.
    answers = [begin(_ask, model, "model", offline) for model in models]
    answers += [begin(_ask, dataset, "dataset", data_offline)] if dataset else []
    return [answer.result() for answer in answers]


def _ask(name: str, kind: str, offline: bool) -> Answer:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError

    from clm_dist.files.hub_errors import is_hub_away

    is_cached = kind == "model" and _is_cached(name)
    if offline:
        return Answer(name, kind, is_cached)
    ask = HfApi().model_info if kind == "model" else HfApi().dataset_info
    try:
        ask(name, timeout=_TIMEOUT_S)
    except HFValidationError as problem:
        return Answer(name, kind, is_cached, problem=f"not a name of the Hub: {first_line(problem)}")
    except Exception as problem:  # the transport's errors have no common base that is public
        return Answer(name, kind, is_cached, problem=first_line(problem), is_away=is_hub_away(problem))
    return Answer(name, kind, is_cached, is_there=True)


def _is_cached(model: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(Exception):  # of a name that cannot be one
        return any(isinstance(try_to_load_from_cache(model, name), str) for name in ("config.json", "tokenizer.json"))
    return False


def judge_answers(answers: list[Answer]) -> Iterator[Finding]:
    """The findings of one node."""
    for answer in answers:
        what = {"model": "model", "dataset": "data set"}[answer.kind]
        if answer.is_there:
            yield ok("hub", f"the {what} {answer.name} is there")
        elif answer.problem is None:
            yield from _judge_offline(answer, what)
        elif answer.is_away and answer.is_cached:
            yield warning(
                "hub",
                f"the Hub does not answer for the {what} {answer.name}: {answer.problem}",
                "the copy in the cache of this node is used, if it is whole",
                "look at the network, or set HF_HUB_OFFLINE=1 to use the cache alone",
            )
        else:
            yield error(
                "hub",
                f"the {what} {answer.name}: {answer.problem}",
                "what the job names must be downloaded before the run",
                "look at the network and its proxies, or try again later"
                if answer.is_away
                else "mend the name in the job, log in with `hf auth login`, or ask for access on its page",
                passes=answer.is_away,
            )


def _judge_offline(answer: Answer, what: str) -> Iterator[Finding]:
    offline = "HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set"
    if answer.is_cached:
        yield note("hub", f"{offline}: the {what} {answer.name} comes from the cache of this node")
    elif answer.kind == "model":
        yield error(
            "hub",
            f"{offline}, and the {what} {answer.name} is not in the cache of this node",
            "the run ends when it loads it",
            f"unset the variable, or `hf download {answer.name}` on a machine with a network and the same HF_HOME",
        )
    else:
        yield unchecked("hub", f"the {what} {answer.name}, because {offline}: the run needs a copy in the cache")


def check_push(job: JobConfig, variables: Mapping[str, str]) -> Iterator[Finding]:
    """Whether the job may push; asks the Hub whose token this is."""
    from clm_dist.hub import repo_of

    if is_offline(variables):
        return
    try:
        yield ok("hub", f"the token may push to {repo_of(job)}")
    except ConfigError as problem:
        yield error("hub", str(problem), "a run that pushes is refused before it trains", "see the message")
    except HubError as problem:
        yield warning(
            "hub",
            str(problem),
            "the run trains all the same, and its push stays pending",
            "`clm-dist push RUN` when the Hub answers",
        )
