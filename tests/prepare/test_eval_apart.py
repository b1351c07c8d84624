"""Records that would be trained on and evaluated are refused."""

from pathlib import Path
from typing import Any

import pytest

from clm_dist.config.data import DataConfig
from clm_dist.errors import ConfigError
from clm_dist.progress import Silent
from tests.conftest import MakeJob
from tests.prepare.test_own_eval import SMALL, assert_splits, error_of, expected, write
from tests.support.stores import prepare


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"source": "hub", "dataset": "a/b", "eval_path": "x"}, "data.eval_path is for data.source files, not hub"),
        ({"source": "builtin", "eval_path": "x"}, "data.eval_path is for data.source files, not builtin"),
        ({"source": "files", "path": "a", "eval_path": ""}, "data.eval_path is empty"),
        ({"source": "files", "path": "a", "eval_path": []}, "data.eval_path is empty"),
        ({"source": "files", "path": "a", "eval_path": ["b", ""]}, "data.eval_path has an empty name in its list"),
        ({"source": "files", "path": "a", "records": "file", "eval_path": "e/*.jsonl.gz"}, "as text, with its quotes"),
        *(
            ({"source": "builtin", "split": split, "eval_split": evaluated}, "which would be trained on and evaluated")
            for split, evaluated in (
                ("train", "train"),
                ("train", "train[90%:]"),
                ("train[-9:]", "train"),
                ("train[:80%]", "train[50%:]"),
                ("train[:100]", "train[99:]"),
                ("train[:]", "train[5:10]"),
                ("train[-5:]", "train[-5:]"),
                ("train[:90%]", "train[100:]"),
                ("train[10:20%]", "train[15%:]"),
                ("train[:9000]", "train[-1000:]"),
                ("train[:90%]", "train[-11%:]"),
                ("train[:90%](pct1_dropremainder)", "train[90%:]"),
            )
        ),
        ({"source": "files", "path": "a", "eval_split": ""}, "data.eval_split is empty; name a split, or null"),
    ],
)
def test_eval_paths_that_cannot_be(settings: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        DataConfig.model_validate(settings)


@pytest.mark.parametrize(("split", "evaluated"), [("train", "train"), ("train[:9]", "train"), ("train", "train[2:]")])
def test_a_file_that_both_paths_name_is_refused(make_job: MakeJob, tmp_path: Path, split: str, evaluated: str) -> None:
    write(tmp_path / "in" / "a.jsonl", range(20))
    other = write(tmp_path / "in" / "b.jsonl", range(20, 30))
    linked = tmp_path / "linked.jsonl"
    linked.symlink_to(other)
    settings = (*SMALL, f"data.path={tmp_path}/in/*.jsonl", f"data.split='{split}'", f"data.eval_split='{evaluated}'")
    error = error_of(make_job(*settings, f"data.eval_path={linked}"), tmp_path)
    assert str(error) == (
        f"{other} would be trained on and evaluated: data.path and data.eval_path name it; name files of their own, "
        "or set data.deduplicate to true, which takes the eval split's documents out of the train split"
    )
    assert (type(error), error.field) == (ConfigError, "data.eval_path")
    assert prepare(make_job(*settings, f"data.eval_path={linked}", "data.deduplicate=true"), tmp_path, Silent())


def test_slices_of_the_same_files_are_apart(make_job: MakeJob, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", range(30))
    settings = (*SMALL, f"data.path={path}", f"data.eval_path={path}", "data.split='train[:20]'")
    store = prepare(make_job(*settings, "data.eval_split='train[20:]'"), tmp_path, Silent())
    assert_splits(store, expected(range(20)), expected(range(20, 30)))
    error = error_of(make_job(*settings, "data.eval_split='train[19:]'"), tmp_path)
    assert "would be trained on and evaluated" in str(error)


@pytest.mark.parametrize(
    ("split", "evaluated"),
    [
        ("train[:90%]", "train[90%:]"),
        ("train[:90%]", "train[-10%:]"),
        ("train[10%:]", "train[:10%]"),
        ("train[:90%](pct1_dropremainder)", "train[90%:](pct1_dropremainder)"),
        ("train[:5]", "train[5:]"),
        ("train[5:9]", "train[:5]"),
        ("train[10:20%]", "train[:10%]"),
        ("train[:1_000]", "train[1000:]"),
        ("train", "test"),
        ("train[:-5]", "train[-5:]"),
    ],
)
def test_splits_beside_each_other_are_taken(split: str, evaluated: str) -> None:
    assert DataConfig(source="builtin", split=split, eval_split=evaluated).has_own_eval
    assert DataConfig(source="builtin", split="train", eval_split="train[5:]", deduplicate=True).has_own_eval
