"""What imports what, and what --help costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import clm_dist
from tests.support.command import assert_starts_at_once, modules_of

PACKAGE = Path(__file__).resolve().parent.parent / "clm_dist"
# A module may import from its own layer's package and from what stands below it.
LAYERS = [
    {"errors", "signals"},
    {"config", "progress", "pace", "quantities", "timing"},
    {"against_plan", "devices", "extensions", "figures", "files", "machine", "metrics"},
    {"pretrained"},
    {"prepare", "train", "report", "hub", "generate", "perplexity", "submit"},
    {"doctor", "evaluation", "plan", "run", "samples"},
    {"cli", "interface"},
    {"__main__"},
]
STAGES = LAYERS[4]


def imports_of(file: Path) -> set[str]:
    """Modules that a file imports anywhere, late imports included, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def parts_of(file: Path) -> set[str]:
    """Top-level parts of the package that a file imports."""
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    names = {name.split(".")[1] for name in imports_of(file) if name.startswith("clm_dist.")}
    return names - {own, "__version__", "make_callable"}


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down_and_stages_do_not_import_each_other(file: Path) -> None:
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    if own == "__init__":
        # Which it loads late.
        assert parts_of(file) == {"interface"}
        return
    layer = next(number for number, names in enumerate(LAYERS) if own in names)
    for part in parts_of(file):
        other = next(number for number, names in enumerate(LAYERS) if part in names)
        assert other <= layer, f"{own} imports {part} from above"
        assert not (own in STAGES and part in STAGES), f"the stage {own} imports the stage {part}"


def test_ray_is_imported_in_its_room_and_by_the_pool_of_prepare_alone() -> None:
    with_ray = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imports_of(file))
    }
    assert "prepare/pools.py" in with_ray
    assert {name for name in with_ray if not name.startswith("train/ray/")} == {"prepare/pools.py"}


def test_what_trains_without_ray_imports_nothing_of_its_room() -> None:
    """The loop, the batches and the evaluation run where Ray is not installed."""
    for file in (PACKAGE / "train").rglob("*.py"):
        if file.relative_to(PACKAGE / "train").parts[0] != "ray":
            assert not any(name.startswith("clm_dist.train.ray") for name in imports_of(file)), file


def test_no_file_is_over_300_lines_without_a_reason_in_its_head() -> None:
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        docstring = ast.get_docstring(ast.parse(text)) or ""
        assert len(text.splitlines()) <= 300 or "300 lines" in docstring, file


def test_nothing_below_the_stages_and_nothing_that_submits_imports_torch() -> None:
    # What submits runs on a login node, and beside Ray on every host.
    for name in {*set().union(*LAYERS[:3]), "submit"}:
        files = [PACKAGE / f"{name}.py"] if (PACKAGE / f"{name}.py").exists() else (PACKAGE / name).rglob("*.py")
        for file in files:
            assert not {m.split(".")[0] for m in imports_of(file)} & {"torch", "transformers", "ray"}, file
    modules = [
        ".".join(("clm_dist", *file.relative_to(PACKAGE).with_suffix("").parts))
        for name in ("config", "submit")
        for file in (PACKAGE / name).rglob("*.py")
        if file.stem != "__init__"
    ]
    code = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    code += "print({'torch', 'transformers', 'ray', 'datasets', 'deepspeed'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "set()\n"


def test_help_loads_few_modules_and_none_that_is_heavy() -> None:
    out, modules = modules_of("--help")
    assert "COMMAND [ARGS]" in out
    assert_starts_at_once(modules)


_COLLECTIONS = """
import gc, sys
from clm_dist.cli.app import main
before = gc.get_stats()[0]["collections"]
sys.argv[1:] = ["schema"]
try:
    main()
finally:
    import transformers
    print(gc.get_stats()[0]["collections"] - before)
"""


def test_a_command_collects_no_garbage_while_it_imports() -> None:
    said = subprocess.run([sys.executable, "-c", _COLLECTIONS], capture_output=True, text=True, check=True)
    # With Python's own threshold there are hundreds.
    assert int(said.stdout.splitlines()[-1]) < 20


def test_every_job_file_is_a_job() -> None:
    from clm_dist.config.load import load_job
    from clm_dist.config.packaged import packaged_jobs

    jobs = {name: load_job(Path(name)).config for name in packaged_jobs()}
    assert {"quickstart", "eli5-guide", "eli5-subset", "eli5-full", "eli5-zero3"} <= jobs.keys()
    assert all(job.name == name for name, job in jobs.items())
    full, subset = jobs["eli5-full"], jobs["eli5-subset"]
    assert (full.data.split, full.data.split_method, full.cluster.strategy) == ("train", "hash", "zero2")
    assert (subset.data.dataset, full.model) == (full.data.dataset, subset.model)
    assert jobs["eli5-zero3"].cluster.strategy == "zero3"


def test_the_version_is_printed() -> None:
    said = subprocess.run([sys.executable, "-m", "clm_dist", "--version"], capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, f"{clm_dist.__version__}\n")
