"""Writing whole files, and what a full or unwritable disk says."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from clm_dist.config.paths import local_dir
from clm_dist.errors import ConfigError, StorageError
from clm_dist.files.atomic import make_dir, read_json, replace_dir, whole_file, write_json, write_text, writing
from tests.support.disks import mode, mounted
from tests.support.runs import metrics_of


def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "result.json"
    write_text(file, "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"no space left while writing .*result.json .* MiB free there"):
        write_text(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_really_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        with pytest.raises(StorageError, match=r"no space left .* run the same command again") as caught:
            write_text(disk / "metrics.jsonl", "x" * 2**20)
        assert caught.value.exit_code == 75
        assert list(disk.iterdir()) == []


def save_safetensors(file: Path, source: Path) -> None:
    save_file({"a": torch.zeros(2**18)}, file)


def save_tokenizer(file: Path, source: Path) -> None:
    Tokenizer(models.WordLevel({str(i): i for i in range(2**15)}, "0")).save(str(file))


def save_numpy(file: Path, source: Path) -> None:
    with file.open("wb") as opened:
        np.save(opened, np.zeros(2**17))


def copy_tree(file: Path, source: Path) -> None:
    (source / "tree").mkdir()
    (source / "tree" / "file").write_bytes(bytes(2**20))
    try:
        shutil.copytree(source / "tree", file.parent / "tree")
    finally:
        shutil.rmtree(file.parent / "tree")


@pytest.mark.parametrize("save", [save_safetensors, save_tokenizer, save_numpy, copy_tree])
def test_a_full_disk_is_told_whatever_library_writes(save: Callable[[Path, Path], None], tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "size=64k") as disk:
        with (
            pytest.raises(StorageError, match=r"no space left while writing .*a.file"),
            whole_file(disk / "a.file") as part,
        ):
            save(part, tmp_path)
        assert list(disk.iterdir()) == []


def test_an_unwritable_directory_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write .*: Not a directory; .* --runs or --store"):
        make_dir(tmp_path / "file" / "runs")
    with pytest.raises(ConfigError, match=r"cannot write .*file: File exists"):
        make_dir(tmp_path / "file")


def test_a_read_only_disk_says_so(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "ro") as disk, pytest.raises(ConfigError, match=r"cannot write .*Read-only file"):
        make_dir(disk / "runs")


def test_other_errors_are_not_dressed_up(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), writing(tmp_path):
        (tmp_path / "none").read_text()


def test_urls_are_refused_and_home_is_spelled_out() -> None:
    with pytest.raises(ConfigError, match="no URLs"):
        local_dir("s3://bucket/runs", "--runs")
    for path, reason in (("~nouser/x", "Could not determine home directory"), ("x" * 5000, "File name too long")):
        with pytest.raises(ConfigError, match=f"--runs .* cannot be used as a path: {reason}; name another"):
            local_dir(path, "--runs")
    assert local_dir("~/x", "--runs") == Path.home() / "x"
    assert local_dir("runs", "--runs") == Path.cwd() / "runs"


def test_records_end_where_a_crash_cut_the_file(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = '{"kind": "step", "step": 1}\n'
    file.write_text(good + good + '{"st')
    assert [record["step"] for record in metrics_of(file)] == [1, 1]
    assert metrics_of(tmp_path / "none") == []
    for bad in (b"{", b"42", b"{}", b"\xff", b""):
        file.write_bytes(good.encode() + bad + b"\n")
        with pytest.raises(ConfigError, match=r"metrics.jsonl:2: not a record of a run; remove this line"):
            metrics_of(file)


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    for bad in (b"", b'{"a": ', b"\xff", b"null", b"[]", b'"a"', b"3"):
        (tmp_path / "hub.json").write_bytes(bad)
        with pytest.raises(ConfigError, match=r"hub.json is damaged: .*; remove it, and the command that wrote it wri"):
            read_json(tmp_path / "hub.json")


def test_not_a_number_is_never_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))


def test_a_directory_replaces_another(tmp_path: Path) -> None:
    for name in ("new", "old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    replace_dir(tmp_path / "new", tmp_path / "old")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert [p.name for p in (tmp_path / "old").iterdir()] == ["new"]


def test_what_may_hold_a_secret_is_private_and_the_rest_is_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "public", "1")
        write_text(tmp_path / "private", "1", private=True)
        (tmp_path / "old").touch(0o644)
        write_json(tmp_path / "old", {}, private=True)
        (tmp_path / "directory").mkdir()
        make_dir(tmp_path / "directory", private=True)
    finally:
        os.umask(before)
    modes = {path.name: mode(path) for path in tmp_path.iterdir()}
    assert modes == {"public": 0o640, "private": 0o600, "old": 0o600, "directory": 0o700}
