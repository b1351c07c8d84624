"""Fields that decide what a run computes or where it runs: for each a probe that fails where the field is ignored."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoTokenizer, GPT2Config

from clm_dist.config.data import DataConfig
from clm_dist.config.job import ClusterConfig, JobConfig, TrainConfig
from clm_dist.files.run_dir import RunDir
from clm_dist.files.stores import Store
from clm_dist.pretrained.tokenizer import load_tokenizer
from clm_dist.pretrained.weights import load_pretrained
from clm_dist.train.batches import BatchOrder
from clm_dist.train.forward import WithLoss
from clm_dist.train.model import load_config, load_model
from clm_dist.train.optim import build_optimizer
from clm_dist.train.ray.cluster import Cluster, _check_resources
from clm_dist.train.ray.trainer import build_trainer
from clm_dist.train.ray.watch import WorkerWatch
from clm_dist.train.strategies.fsdp2 import FullyShard
from clm_dist.train.strategies.zero import Zero
from tests.conftest import MakeJob
from tests.support.reading import load_records
from tests.support.runs import metrics_of, saved_steps
from tests.support.training import losses_of, train_one


@dataclass(frozen=True)
class Bench:
    """What probes work with."""

    make_job: MakeJob
    prepared: Callable[[JobConfig], Path]
    tmp_path: Path
    monkeypatch: pytest.MonkeyPatch

    def train(self, name: str, *settings: str) -> RunDir:
        """A run in this process."""
        job = self.make_job("checkpoint.every=1000", "eval.every=1000", "checkpoint.keep=9", *settings)
        run = RunDir(self.tmp_path / name)
        assert train_one(job, run, self.prepared(job)).status == "done"
        return run

    def record_calls(self, name: str) -> list[SimpleNamespace]:
        """The arguments of each call of what a dotted name stands for, which does nothing any more."""
        calls: list[SimpleNamespace] = []
        self.monkeypatch.setattr(name, lambda *args, **kwargs: calls.append(SimpleNamespace(args=args, **kwargs)))
        return calls


Probe = Callable[[Bench], None]


def _order(bench: Bench, *settings: str) -> BatchOrder:
    return BatchOrder.of_job(bench.make_job("train.max_steps=null", *settings), num_blocks=100)


def check_batch_size(bench: Bench) -> None:
    order = _order(bench, "batch.global_size=12", "batch.micro_size=3")
    assert (len(order.global_batch(0)), order.steps_per_epoch) == (12, 9)


def check_micro_size(bench: Bench) -> None:
    order = _order(bench, "batch.global_size=12", "batch.micro_size=3")
    assert [len(micro.blocks) for micro in order.micro_batches(order.global_batch(0), 0, 1)] == [3, 3, 3, 3]


def check_epochs(bench: Bench) -> None:
    assert _order(bench, "train.epochs=5").num_steps == 5 * 13


def check_max_steps(bench: Bench) -> None:
    assert BatchOrder.of_job(bench.make_job("train.max_steps=7"), 100).num_steps == 7


def check_seed(bench: Bench) -> None:
    one, other = (_order(bench, f"train.seed={seed}") for seed in (1, 2))
    assert list(one.global_batch(0)) != list(other.global_batch(0))
    jobs = [bench.make_job(f"train.seed={seed}") for seed in (1, 2)]
    tokenizer = AutoTokenizer.from_pretrained(bench.prepared(jobs[0]) / "tokenizer")
    first, second = (next(load_model(job, tokenizer).parameters()) for job in jobs)
    assert not first.equal(second)


def check_weight_decay(bench: Bench) -> None:
    (group,) = build_optimizer(nn.Linear(1, 1), TrainConfig(weight_decay=0.5)).param_groups
    assert group["weight_decay"] == 0.5


def check_max_grad_norm(bench: Bench) -> None:
    # AdamW takes only the direction of a gradient far above its epsilon.
    settings = ("train.max_steps=3", "train.adam_epsilon=1.0", "train.learning_rate=0.1")
    free, tight = (bench.train(norm, *settings, f"train.max_grad_norm={norm}") for norm in ("null", "0.001"))
    assert losses_of(free.root)[0] == losses_of(tight.root)[0]
    assert losses_of(free.root)[2] < losses_of(tight.root)[2]
    assert _zero(bench, "train.max_grad_norm=0.25")["gradient_clipping"] == 0.25


def check_gradient_checkpointing(bench: Bench) -> None:
    job = bench.make_job("train.gradient_checkpointing=true")
    tokenizer = AutoTokenizer.from_pretrained(bench.prepared(job) / "tokenizer")
    model: Any = load_model(job, tokenizer)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def check_compile(bench: Bench) -> None:
    bench.monkeypatch.setattr("clm_dist.train.forward.compile_function", lambda function: function)
    runs = [bench.train(on, "train.max_steps=1", f"train.compile={on}") for on in ("true", "false")]
    starts = [next(record for record in metrics_of(run.metrics) if record["kind"] == "start") for run in runs]
    assert [start["compiled"] for start in starts] == [True, False]


def check_hang_timeout(bench: Bench) -> None:
    watches = bench.record_calls("clm_dist.train.ray.watch.Watch")
    bench.record_calls("clm_dist.train.ray.watch.NodeWatch")
    job: Any = bench.make_job("train.hang_timeout_s=77")
    nothing: Any = None
    WorkerWatch(job, RunDir(bench.tmp_path), Cluster(0), nothing)
    assert watches[0].args[1] == 77


def check_eval_every(bench: Bench) -> None:
    run = bench.train("run", "train.max_steps=5", "eval.every=2")
    assert [record["step"] for record in metrics_of(run.metrics) if record["kind"] == "eval"] == [0, 2, 4, 5]


def check_document_mask(bench: Bench) -> None:
    plain, masked = (bench.train(mask, "train.max_steps=1", f"data.document_mask={mask}") for mask in ("false", "true"))
    assert losses_of(plain.root) != losses_of(masked.root)


def check_eval_micro_size(bench: Bench) -> None:
    # The recorder, which knows the size from the job, refuses an evaluation with other micro-batches.
    run = bench.train("run", "train.max_steps=1", "eval.micro_size=3")
    assert [record["step"] for record in metrics_of(run.metrics) if record["kind"] == "eval"] == [0, 1]


def check_checkpoint_every(bench: Bench) -> None:
    assert saved_steps(bench.train("run", "train.max_steps=5", "checkpoint.every=2")) == [2, 4, 5]


def check_checkpoint_keep(bench: Bench) -> None:
    run = bench.train("run", "train.max_steps=5", "checkpoint.every=1", "checkpoint.keep=3")
    assert saved_steps(run) == [3, 4, 5]


def check_model_path(bench: Bench) -> None:
    call = _loaded(bench)
    assert call.args[0] == "alice/model"


def check_model_attention(bench: Bench) -> None:
    models: list[Any] = []

    def keep(load: Any) -> Any:
        def kept(*arguments: Any, **options: Any) -> Any:
            models.append(load(*arguments, **options))
            return models[-1]

        return kept

    bench.monkeypatch.setattr("clm_dist.train.loop.load_model", keep(load_model))
    bench.monkeypatch.setattr("clm_dist.train.export.load_pretrained", keep(load_pretrained))
    bench.train("eager", "model.attention=eager", "train.max_steps=1")
    # The one that is trained, and the one that is read back.
    assert [model.transformer.h[0].attn.config._attn_implementation for model in models] == ["eager", "eager"]


def check_model_revision(bench: Bench) -> None:
    assert _loaded(bench).revision == "abc"


def _loaded(bench: Bench) -> SimpleNamespace:
    """How transformers was asked for the job's model and its configuration; both were asked for alike."""
    job = bench.make_job("model={path: alice/model, revision: abc, config: null}")
    calls: list[SimpleNamespace] = []

    def configuration(path: str, **options: Any) -> Any:
        calls.append(SimpleNamespace(args=(path,), **options))
        return GPT2Config(n_layer=1, n_embd=8, n_head=1)

    def model(path: str, **options: Any) -> Any:
        calls.append(SimpleNamespace(args=(path,), **options))
        return nn.Linear(1, 1), {"missing_keys": (), "unexpected_keys": (), "mismatched_keys": ()}

    bench.monkeypatch.setattr("transformers.AutoConfig.from_pretrained", configuration)
    bench.monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", model)
    load_model(job, None)
    configured, loaded = calls
    assert (configured.args, configured.revision) == (loaded.args, loaded.revision)
    return loaded


def check_model_resize(bench: Bench) -> None:
    path, tokenizer = trained_with_an_added_token(bench)
    for resize, rows in (("false", 300), ("true", 301)):
        job = bench.make_job(f"model={{path: {path}, config: null, resize: {resize}}}")
        model, same = (load_model(job, tokenizer).get_parameter("transformer.wte.weight") for _ in range(2))
        assert len(model) == rows
        # Every rank draws the same rows.
        assert torch.equal(model, same)


def trained_with_an_added_token(bench: Bench) -> tuple[Path, Any]:
    """A model, and a tokenizer with one id above its embedding."""
    model = bench.train("run", "train.max_steps=1").root / "final.unverified"
    tokenizer = load_tokenizer(model)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return model, tokenizer


def check_model_config(bench: Bench) -> None:
    assert load_config(bench.make_job("model.config.n_layer=7")).n_layer == 7


def _trainer(bench: Bench, *settings: str, num_gpus: int = 0) -> SimpleNamespace:
    """What Ray Train is told of a job."""
    calls = bench.record_calls("clm_dist.train.ray.trainer.LeanTrainer")
    build_trainer(bench.make_job(*settings), RunDir(bench.tmp_path), Store(bench.tmp_path), Cluster(num_gpus), [])
    return calls[0]


def check_workers(bench: Bench) -> None:
    assert _trainer(bench, "cluster.workers=2").scaling_config.num_workers == 2


def check_cpus_per_worker(bench: Bench) -> None:
    trainer = _trainer(bench, "cluster.cpus_per_worker=3")
    assert trainer.scaling_config.resources_per_worker == {"CPU": 3}
    assert trainer.train_loop_config["num_threads"] == 3


def check_gpus_per_worker(bench: Bench) -> None:
    nodes = [{"CPU": 8.0, "GPU": 2.0}]
    clusters = [ClusterConfig.model_validate({"gpus_per_worker": gpus}) for gpus in (0, 1, "auto")]
    assert [_check_resources(cluster, nodes, local=False) for cluster in clusters] == [0, 1, 1]


def check_max_failures(bench: Bench) -> None:
    assert _trainer(bench, "train.max_failures=9").run_config.failure_config.max_failures == 9


def _zero(bench: Bench, *settings: str) -> dict[str, Any]:
    """What DeepSpeed is told of a job."""
    strategy = Zero.__new__(Zero)
    strategy._job, strategy.world_size = bench.make_job("cluster.strategy=zero3", *settings), 1
    return strategy._deepspeed_config()


def check_offload(bench: Bench) -> None:
    on_cpu = {"device": "cpu"}
    zero = [_zero(bench, f"cluster.offload={what}")["zero_optimization"] for what in ("none", "optimizer", "all")]
    assert [one.get("offload_optimizer") for one in zero] == [None, on_cpu, on_cpu]
    assert [one.get("offload_param") for one in zero] == [None, None, on_cpu]
    sharded: list[bool] = []

    def record(model: nn.Module, *_: Any, offload: bool, **__: Any) -> nn.Module:
        sharded.append(offload)
        return model

    bench.monkeypatch.setattr("clm_dist.train.strategies.fsdp2.shard", record)
    for what in ("none", "all"):
        strategy: Any = FullyShard.__new__(FullyShard)
        strategy._job = bench.make_job("cluster.strategy=fsdp2", f"cluster.offload={what}")
        strategy.device, strategy.world_size = None, 1
        strategy.prepare(WithLoss(nn.Linear(1, 1)), lambda model: None)
    assert sharded == [False, True]


def _asked_of_datasets(bench: Bench) -> SimpleNamespace:
    """How the library `datasets` is asked for a job's data set."""
    calls: list[SimpleNamespace] = []

    def load_dataset(*args: Any, **options: Any) -> Dataset:
        calls.append(SimpleNamespace(args=args, **options))
        return Dataset.from_dict({"text": ["one"]})

    bench.monkeypatch.setattr("datasets.load_dataset", load_dataset)
    load_records(DataConfig(dataset="alice/texts", config="en", revision="abc"))
    return calls[0]


def check_dataset(bench: Bench) -> None:
    assert _asked_of_datasets(bench).args[0] == "alice/texts"


def check_data_config(bench: Bench) -> None:
    assert _asked_of_datasets(bench).args[1] == "en"


def check_data_revision(bench: Bench) -> None:
    assert _asked_of_datasets(bench).revision == "abc"


PROBES: dict[str, Probe] = {
    "batch.global_size": check_batch_size,
    "batch.micro_size": check_micro_size,
    "checkpoint.every": check_checkpoint_every,
    "checkpoint.keep": check_checkpoint_keep,
    "cluster.cpus_per_worker": check_cpus_per_worker,
    "cluster.gpus_per_worker": check_gpus_per_worker,
    "cluster.offload": check_offload,
    "cluster.workers": check_workers,
    "data.config": check_data_config,
    "data.dataset": check_dataset,
    "data.document_mask": check_document_mask,
    "data.revision": check_data_revision,
    "eval.every": check_eval_every,
    "eval.micro_size": check_eval_micro_size,
    "model.attention": check_model_attention,
    "model.config": check_model_config,
    "model.path": check_model_path,
    "model.resize": check_model_resize,
    "model.revision": check_model_revision,
    "train.compile": check_compile,
    "train.epochs": check_epochs,
    "train.gradient_checkpointing": check_gradient_checkpointing,
    "train.hang_timeout_s": check_hang_timeout,
    "train.max_failures": check_max_failures,
    "train.max_grad_norm": check_max_grad_norm,
    "train.max_steps": check_max_steps,
    "train.seed": check_seed,
    "train.weight_decay": check_weight_decay,
}
