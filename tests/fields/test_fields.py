"""Every field of the job file has a test that fails where the field is ignored; a new field needs an entry here."""

import ast
from collections.abc import Callable
from pathlib import Path

import pytest

from clm_dist.config.job import JobConfig
from clm_dist.config.schema import field_names
from tests.conftest import ROOT, MakeJob
from tests.fields.computed import PROBES, Bench
from tests.fields.rendered import K8S, SLURM, check_k8s, check_slurm

_BLOCKS = "tests/pins/test_prepare.py::test_shards_are_those_of_the_golden_file"
_PUSH = "tests/test_push.py::test_the_repository_is_the_one_of_the_job"
_RUN = "tests/train/test_driver.py::test_a_run_leaves_what_the_design_promises"
_FINGERPRINT = "tests/prepare/test_fingerprint.py::test_a_field_that_can_change_a_byte_changes_the_fingerprint"
_ADAM = "tests/train/test_optim.py::test_the_constants_of_adam_are_the_jobs"
_RATE = "tests/train/test_optim.py::test_the_rate_of_a_step_is_that_of_the_schedule_stepped_so_often"
_OPTIMIZER = "tests/train/test_optimizers.py::test_every_strategy_has_the_losses_of_one_process"
COVERED: dict[str, str] = {
    "checkpoint.path": "tests/test_checkpoints.py::test_a_job_says_where_its_checkpoints_lie",
    "cluster.strategy": "tests/train/test_strategy.py::test_a_run_whose_ranks_do_not_share_gradients_is_impossible",
    "data.append_eos": _BLOCKS,
    "data.block_size": _BLOCKS,
    "data.deduplicate": _BLOCKS,
    "data.delimiter": "tests/prepare/test_shapes_of_files.py::test_csv_has_the_delimiter_that_is_named",
    "data.encoding": "tests/prepare/test_decoding.py::test_every_kind_of_text_is_read_in_its_encoding",
    "data.eval_fraction": _BLOCKS,
    "data.eval_path": "tests/prepare/test_own_eval.py::test_files_of_their_own_are_the_eval_split",
    "data.eval_split": "tests/prepare/test_own_eval.py::test_a_split_of_a_directory_is_the_eval_split",
    "data.field": "tests/prepare/test_shapes_of_files.py::test_records_are_read_from_the_field_of_an_object",
    "data.grouping": _BLOCKS,
    "data.id": _BLOCKS,
    "data.join": _BLOCKS,
    "data.min_score": _BLOCKS,
    "data.path": _BLOCKS,
    "data.records": "tests/prepare/test_records.py::test_a_file_is_one_record_with_its_line_breaks",
    "data.score": _BLOCKS,
    "data.seed": _BLOCKS,
    "data.options": "tests/prepare/test_plugin.py::test_a_plugin_s_records_give_the_blocks_of_a_file_with_them",
    "data.plugin": "tests/prepare/test_plugin.py::test_a_plugin_s_records_give_the_blocks_of_a_file_with_them",
    "data.source": "tests/prepare/test_sources.py::test_the_built_in_corpus_is_python_s_reference",
    "data.split": _BLOCKS,
    "data.split_method": _BLOCKS,
    "data.streaming": "tests/prepare/test_eli5_shapes.py::test_a_streamed_data_set_has_no_end_to_count_from",
    "data.text": _BLOCKS,
    "hub.language": "tests/report/test_card.py::test_the_hub_s_own_reader_finds_the_figures",
    "hub.license": "tests/report/test_card.py::test_the_hub_s_own_reader_finds_the_figures",
    "hub.limitations": "tests/report/test_card.py::test_a_card_tells_what_the_job_says_and_shows",
    "hub.private": _PUSH,
    "hub.push": _RUN,
    "hub.repo": _PUSH,
    "name": _PUSH,
    "tokenizer.engine": _BLOCKS,
    "tokenizer.path": _FINGERPRINT,
    "tokenizer.train.vocab_size": _BLOCKS,
    "tracking": _RUN,
    "train.adam_beta1": _ADAM,
    "train.adam_beta2": _ADAM,
    "train.adam_epsilon": _ADAM,
    "train.decay_ratio": "tests/train/test_optim.py::test_wsd_rises_holds_and_falls_to_nothing",
    "train.decay_bias_and_norm": (
        "tests/train/test_optim.py::test_biases_and_norms_are_decayed_unless_the_job_says_otherwise"
    ),
    "train.keep": "tests/train/test_keep.py::test_the_model_of_the_best_evaluation_is_that_of_a_run_that_ends_there",
    "train.learning_rate": _RATE,
    "train.on_nan": "tests/train/test_outliers.py::test_a_step_that_is_not_finite_can_be_left_out",
    "train.on_spike": "tests/train/test_outliers.py::test_a_loss_that_stands_out_is_reported_and_skipped_if_asked",
    "train.optimizer": _OPTIMIZER,
    "train.optimizer_options": _OPTIMIZER,
    "train.precision": "tests/train/test_strategy.py::test_bf16_trains_close_to_fp32",
    "train.schedule": _RATE,
    "train.schedule_steps": (
        "tests/train/test_optim.py::test_a_schedule_for_more_steps_does_not_depend_on_where_the_run_ends"
    ),
    "train.start_timeout_s": "tests/train/test_nodes.py::test_a_run_says_what_it_waits_for_and_for_how_long",
    "train.stop_after": "tests/train/test_keep.py::test_training_ends_after_evaluations_that_are_no_better",
    "train.warmup_ratio": "tests/train/test_optim.py::test_wsd_rises_holds_and_falls_to_nothing",
    "train.warmup_steps": _RATE,
}
"""The test that fails where the field is ignored."""


def entries() -> list[str]:
    """The fields of all tables."""
    slurm, k8s = (f"cluster.slurm.{name}" for name in SLURM), (f"cluster.k8s.{name}" for name in K8S)
    return [*COVERED, *PROBES, *slurm, *k8s]


def test_every_field_of_the_job_file_has_one_entry() -> None:
    assert sorted(entries()) == sorted(field_names(JobConfig)), "a new field needs a probe that fails if it is ignored"


@pytest.mark.parametrize("test", sorted(set(COVERED.values())))
def test_a_test_that_an_entry_names_is_there(test: str) -> None:
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("field", PROBES)
def test_a_field_is_heeded(
    field: str,
    make_job: MakeJob,
    prepared: Callable[[JobConfig], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    PROBES[field](Bench(make_job, prepared, tmp_path, monkeypatch))


@pytest.mark.parametrize("field", SLURM)
def test_a_field_of_slurm_is_in_the_scripts(field: str) -> None:
    check_slurm(field)


@pytest.mark.parametrize("field", K8S)
def test_a_field_of_kubernetes_is_in_the_objects(field: str) -> None:
    check_k8s(field)
