"""What README, CONTRIBUTING, SECURITY, docs and k8s/README say is so: names, links, commands, settings, examples."""

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer

from clm_dist.cli.app import app
from clm_dist.config.describe import describe_fields
from clm_dist.config.job import JobConfig
from clm_dist.config.load import load_job, read_saved_job
from clm_dist.config.packaged import packaged_jobs
from clm_dist.config.schema import field_names, section_of
from clm_dist.files.run_dir import RunDir
from tests.conftest import ROOT, WriteJob
from tests.support.command import clm_dist

PACKAGE = ROOT / "clm_dist"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
        ROOT / "k8s" / "README.md",
        *ROOT.glob("docs/*.md"),
    ]
}
ARCHITECTURE = PAGES["docs/architecture.md"]


def blocks_of(text: str, language: str = "") -> list[str]:
    """The fenced blocks of a page that are marked with a language."""
    return [
        body for mark, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL) if mark == language
    ]


def commands_of(text: str) -> Iterator[str]:
    """The `clm-dist` commands of a page, in blocks and in the text, without comments and the shell around them."""
    for block in blocks_of(text):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line)
            yield from (part for part in re.split(r"&&|;|>", line) if re.search(r"(^|[ /])clm-dist( |$)", part))
    yield from re.findall(r"`(clm-dist [^`]*)`", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL))


def words_of(command: str) -> list[str]:
    """The arguments of a command; brackets around optional ones are removed."""
    after = re.split(r"(?:^|[ /])clm-dist(?: |$)", command, maxsplit=1)[1]
    return shlex.split(re.sub(r"(?<![\w=])\[|\](?!\S)", "", after.split(" > ")[0]))


COMMANDS = sorted({(page, command.strip()) for page, text in PAGES.items() for command in commands_of(text)})


# --- docs/architecture.md


def test_the_tree_has_every_file_of_the_package_and_no_other() -> None:
    (tree,) = (block for block in blocks_of(ARCHITECTURE) if block.startswith("clm_dist/"))
    named, path = [], {}
    for line in tree.splitlines():
        name, *phrase = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth] = name.rstrip("/")
        if not name.endswith("/"):
            named.append("/".join(path[level] for level in range(depth + 1)))
            assert phrase or name == "__init__.py", f"{name} has no phrase"
    files = {*PACKAGE.rglob("*.py"), *PACKAGE.rglob("*.in")}
    assert sorted(named) == sorted(str(file.relative_to(ROOT)) for file in files)


def test_every_file_that_the_architecture_names_is_there() -> None:
    tests = {name for name in re.findall(r"`(tests/[^`]*)`", ARCHITECTURE) if not name.endswith("/")}
    assert len(tests) > 20
    for test in tests:
        file, _, function = test.partition("::")
        assert (ROOT / file).is_file(), test
        if function:
            assert function in functions_of(file), test
    names = {path.name for path in PACKAGE.rglob("*")} | {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*")}
    for name in re.findall(r"`([\w/]+\.py)`", ARCHITECTURE):
        assert name in names or (ROOT / name).exists(), name


@cache
def functions_of(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


# --- all pages


def test_the_page_of_the_job_file_is_what_is_rendered() -> None:
    assert PAGES["docs/job-file.md"] == describe_fields(), "python -m clm_dist.config.describe > docs/job-file.md"


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", PAGES[page]):
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, link


@pytest.mark.parametrize("page", PAGES)
def test_programs_that_a_page_names_are_there(page: str) -> None:
    for module in re.findall(r"python -m ((?:tests|clm_dist)[\w.]*)", PAGES[page]):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    for name in re.findall(r"(?:python|pytest(?: -m \w+)?) ((?:benchmarks|tests)/[\w/.]+)", PAGES[page]):
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_command_has_the_options_that_it_is_shown_with(page: str, command: str) -> None:
    del page
    found: Any = typer.main.get_command(app)
    words = words_of(command)
    while words and words[0] in getattr(found, "commands", {}):
        found = found.commands[words.pop(0)]
    assert not words or words[0].startswith("-") or not hasattr(found, "commands"), f"there is no command {words[0]}"
    options = {name: option for option in found.params for name in (*option.opts, *option.secondary_opts)}
    for word in words:
        name = word.partition("=")[0]
        if name.startswith("-") and name != "--help":
            assert name in options, f"there is no option {name}"
            assert not getattr(options[name], "hidden", False), f"{name} is an old spelling"


def test_every_setting_names_a_field() -> None:
    settings = {setting for text in PAGES.values() for setting in re.findall(r"--set '?([a-z_0-9]+[\w.]*)=", text)}
    assert len(settings) > 8
    for setting in settings - {"section.field"}:
        assert is_field(setting), setting


def is_field(name: str) -> bool:
    """Whether a dotted name is a field or a section of the job file, or lies within a field that is a mapping."""
    fields = set(field_names())
    return name in fields or any(field.startswith(f"{name}.") or name.startswith(f"{field}.") for field in fields)


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_fields_name_fields(page: str) -> None:
    for section, rows in re.findall(r"^\| in `([\w.]+)` \|.*\n\|.*\n((?:\|.*\n)+)", PAGES[page], re.MULTILINE):
        model: Any = JobConfig
        for name in section.split("."):
            model = section_of(model, name)
        for row in rows.splitlines():
            first = re.split(r"(?<!\\)\|", row)[1]
            for name in re.findall(r"`(\w+)", first):
                if not re.search(rf"\(.*`-*{name}", first):
                    assert name in model.model_fields, f"{section}.{name}"


# --- examples that run here


def examples(*words: str) -> list[str]:
    """The shown commands that begin with a command's name and have all other words in them."""
    found = (command for _, command in COMMANDS if command.startswith(f"clm-dist {words[0]}"))
    return sorted({command for command in found if all(word in command for word in words[1:])})


def named_job(command: str) -> str | None:
    """The packaged job that a shown command names."""
    return next((word for word in words_of(command) if word in packaged_jobs()), None)


def test_examples_name_packaged_jobs() -> None:
    assert len([command for _, command in COMMANDS if named_job(command)]) > 10


@pytest.mark.parametrize("command", [c for c in examples("submit") if named_job(c) and "--sync" not in c])
def test_an_example_of_submit_is_a_job_that_fits_its_hosts(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLM_DIST_RUNS", str(tmp_path / "runs"))
    words = ["registry.example/clm-dist:0.1.0" if word == "..." else word for word in words_of(command)]
    said = clm_dist(capsys, monkeypatch, *words, *(() if "--dry-run" in words else ("--dry-run",)))
    assert said.code == 0, said.err
    assert "#SBATCH" in said.out or "kind: RayJob" in said.out or "kind: Job" in said.out
    assert not list(tmp_path.iterdir())


def test_examples_of_prepare_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, write_job: WriteJob, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLM_DIST_STORE", str(tmp_path / "stores"))
    store = clm_dist(capsys, monkeypatch, "prepare", write_job()).out.split()[-1]
    shown = [
        command for command in examples("prepare") if "JOB" in command or "STORE" in command or "--prune" in command
    ]
    assert len(shown) >= 4
    for command in shown:
        words = [{"JOB": str(write_job()), "STORE": store}.get(word, word) for word in words_of(command)]
        said = clm_dist(capsys, monkeypatch, *words)
        assert said.code == 0, f"{command}: {said.err}"


def test_examples_with_a_run_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run: RunDir, tmp_path: Path
) -> None:
    monkeypatch.setenv("CLM_DIST_STORE", str(tmp_path / "stores"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("The\n")
    shown = [
        command
        for name in ("report", "evaluate", "generate")
        for command in examples(name)
        if "runs/quickstart" in command or (name == "generate" and " RUN " in command)
    ]
    assert len(shown) >= 5
    for command in shown:
        words = [str(run.root) if word in ("RUN", "runs/quickstart") else word for word in words_of(command)]
        said = clm_dist(capsys, monkeypatch, *words)
        assert said.code == 0, f"{command}: {said.err}"


@pytest.mark.parametrize("command", [c for c in (*examples("run"), *examples("prepare")) if named_job(c)])
def test_an_example_is_a_job(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    words = words_of(command)
    data = load_job(Path(words[1]), [setting for word, setting in pairwise(words) if word == "--set"]).config.data
    # The quickstart's own field is not one of files.
    assert (data.text == "paragraphs") == (data.source == "builtin")


@pytest.mark.parametrize(
    "snippet",
    [
        # A whole run takes half a minute.
        pytest.param(block, marks=pytest.mark.slow if "clm_dist.run(" in block else ())
        for page in sorted(PAGES)
        for block in blocks_of(PAGES[page], "python")
    ],
    ids=lambda s: s[:30],
)
def test_python_examples_run(
    snippet: str, run: RunDir, prepared: Any, stores: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CLM_DIST_STORE", str(stores))
    monkeypatch.setenv("MPLBACKEND", "agg")
    exec(compile(snippet, "example", "exec"), {"store": prepared(read_saved_job(run.job)), "run": run.root})
