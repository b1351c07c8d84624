"""Optimizers of other packages: exact resumes, every strategy that may have them, and what is refused."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from clm_dist.config.job import JobConfig, TrainConfig
from clm_dist.errors import CheckpointError, ConfigError
from clm_dist.files.run_dir import RunDir
from clm_dist.train.optim import build_optimizer
from clm_dist.train.optimizers import check_optimizer
from tests.conftest import ROOT, MakeJob
from tests.support.plugins import install_package
from tests.support.runs import checkpoints_of, metrics_of
from tests.support.training import SOME_SLOW, forget_after, leave_only, losses_of, train_one, train_one_here
from tests.support.workers import run_workers

Install = Callable[..., None]
SETTINGS = ("train.max_steps=8", "train.epochs=9", "checkpoint.every=4", "checkpoint.keep=9", "batch.micro_size=2")
DROPOUT = ("model.config.resid_pdrop=0.2", "model.config.attn_pdrop=0.2")
RTOL = 1e-5
SHAPES = {"wte.weight": (64, 8), "h.0.attn.weight": (8, 24), "h.0.attn.bias": (24,), "ln.weight": (8,)}


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Installs a package of one module with optimizers, also for the processes that are started."""
    site = tmp_path / "site"
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH")))))
    installed = []

    def install(module: str, code: str, **entries: str) -> None:
        install_package(site, module, code, "clm_dist.optimizers", **entries)
        installed.append(module)

    yield install
    for module in installed:
        sys.modules.pop(module, None)


@pytest.fixture
def documented(install: Install) -> None:
    """The worked examples, installed."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.S)
    (code,) = (block for block in blocks if "class Lion" in block)
    install("clm_dist_optimizers", code, lion="lion", muon="muon")


@pytest.fixture
def few_blocks(make_job: MakeJob, prepared: Callable[[JobConfig], Path]) -> Path:
    return prepared(make_job(*SETTINGS))


RUNS = [
    pytest.param("muon", "ddp"),
    *(pytest.param("lion", *strategy.values, marks=strategy.marks) for strategy in SOME_SLOW),
]


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize(("optimizer", "strategy"), RUNS)
def test_a_resume_is_exact_with_dropout(
    optimizer: str, strategy: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    job = make_job(
        *(*SETTINGS, *DROPOUT, "cluster.workers=2", f"cluster.strategy={strategy}", f"train.optimizer={optimizer}")
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run_workers(train_and_resume, 2, job, whole, cut, few_blocks)
    assert losses_of(cut) == losses_of(whole)
    # The whole weights, also where ranks hold pieces of them.
    assert weights_of(cut) == weights_of(whole)
    assert losses_of(whole)[-1] < losses_of(whole)[0]


def weights_of(run: Path) -> bytes:
    return (run / "final.unverified" / "model.safetensors").read_bytes()


def train_and_resume(rank: int, world_size: int, job: JobConfig, whole: Path, cut: Path, store: Path) -> None:
    """Train to the end; then once more from the checkpoint of step 4, in another run."""
    train_one(job, RunDir(whole), store, rank, world_size)
    if rank == 0:
        leave_only(RunDir(whole), step=4, target=RunDir(cut))
    torch.distributed.barrier()
    assert train_one(job, RunDir(cut), store, rank, world_size).status == "done"


@pytest.mark.usefixtures("documented")
@pytest.mark.parametrize("strategy", SOME_SLOW)
def test_every_strategy_has_the_losses_of_one_process(
    strategy: str, make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    lion = ("train.optimizer=lion", "train.optimizer_options={betas: [0.5, 0.75]}", "train.decay_bias_and_norm=false")
    job = make_job(*SETTINGS, *lion, "cluster.workers=2", f"cluster.strategy={strategy}")
    run_workers(train_one_here, 2, job, RunDir(tmp_path / "two"), few_blocks)
    alone = make_job(*SETTINGS, *lion)
    train_one(alone, RunDir(tmp_path / "one"), few_blocks)
    # The sign of what is about 0 may be another where sums are rounded otherwise.
    np.testing.assert_allclose(losses_of(tmp_path / "two"), losses_of(tmp_path / "one"), rtol=RTOL)
    for name, settings in (("adamw", ()), ("other", lion[:1])):
        train_one(make_job(*SETTINGS, *settings), RunDir(tmp_path / name), few_blocks)
        assert abs(losses_of(tmp_path / name)[-1] / losses_of(tmp_path / "one")[-1] - 1) > 10 * RTOL


@pytest.mark.usefixtures("documented")
def test_resumes_with_other_strategies_and_numbers_of_workers_change_nothing(
    make_job: MakeJob, few_blocks: Path, tmp_path: Path
) -> None:
    job = make_job(*SETTINGS, "train.optimizer=lion", "train.max_steps=12", "cluster.workers=2")
    whole, cut = RunDir(tmp_path / "whole"), RunDir(tmp_path / "cut")
    run_workers(train_one_here, 2, job, whole, few_blocks)
    leave_only(whole, step=4, target=cut)
    for step, strategy, world_size in ((4, "fsdp2", 2), (8, "zero2", 1)):
        forget_after(cut, step)
        cluster = job.cluster.model_copy(update={"strategy": strategy, "workers": world_size})
        job = job.model_copy(update={"cluster": cluster})
        assert run_workers(train_one_here, world_size, job, cut, few_blocks)[0].status == "done"
    starts = [(r["step"], r["strategy"], r["workers"]) for r in metrics_of(cut.metrics) if r["kind"] == "start"]
    assert starts == [(0, "ddp", 2), (4, "fsdp2", 2), (8, "zero2", 1)]
    np.testing.assert_allclose(losses_of(cut.root), losses_of(whole.root), rtol=RTOL)


@pytest.mark.usefixtures("documented")
def test_muon_takes_the_matrices_of_blocks_and_adamw_the_rest(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"wte": torch.nn.Embedding(4, 4)})
    model["h"] = torch.nn.ModuleList([torch.nn.ModuleDict({"attn": torch.nn.Linear(4, 4)})])
    train = TrainConfig(optimizer="muon", decay_bias_and_norm=False, weight_decay=0.25, learning_rate=0.5)
    optimizer = build_optimizer(model, train)
    groups = [(len(g["params"]), g["states"], g["weight_decay"], g["lr"]) for g in optimizer.param_groups]
    adamw = ["step", "exp_avg", "exp_avg_sq"]
    assert groups == [(1, ["momentum_buffer"], 0.25, 0.5), (1, adamw, 0.25, 0.5), (1, adamw, 0.0, 0.5)]
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert all(not torch.equal(weights[name], p) for name, p in model.named_parameters())
    # As Accelerate does, after which the rate of the schedule still reaches both.
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert all(int(state.get("step", 2)) == 2 for state in optimizer.state.values())


@pytest.mark.usefixtures("documented")
def test_a_checkpoint_of_another_optimizer_is_refused(make_job: MakeJob, few_blocks: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    train_one(make_job(*SETTINGS, "train.optimizer=lion", "train.max_steps=4"), run, few_blocks)
    (name,) = checkpoints_of(run).committed()
    assert checkpoints_of(run).read(name).state.optimizer == "lion"
    with pytest.raises(CheckpointError, match=r"saved with train.optimizer lion, the job has adamw.*--set train.optim"):
        train_one(make_job(*SETTINGS), run, few_blocks)


# The trial before a run.

OPTIMIZERS = """
import torch

def of(kind, states, **options):
    def make(groups, learning_rate, **more):
        return kind([{**group, "states": states} for group in groups], lr=learning_rate, **options, **more)
    return make

sgd = of(torch.optim.SGD, ["momentum_buffer"], momentum=0.9)
sgd.element_wise = True
adam = of(torch.optim.Adam, ["step", "exp_avg", "exp_avg_sq"])
forgetful = of(torch.optim.SGD, [], momentum=0.9)
dampened = of(torch.optim.SGD, ["momentum_buffer"], momentum=0.9, dampening=0.5)
nadam = of(torch.optim.NAdam, ["step", "exp_avg", "exp_avg_sq"])
adafactor = of(torch.optim.Adafactor, ["step"])

class Lookahead(torch.optim.SGD):
    # Keeps slow weights, and looks at them beyond what is tried.
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("slow", p.detach().clone())
                state["n"] = state.get("n", 0) + 1

lookahead = of(Lookahead, [])

class Compressed(torch.optim.SGD):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["mean"] = p.detach().mean()

compressed = of(Compressed, ["mean"])

def undecayed(groups, learning_rate):
    plain = [{"params": group["params"], "states": ["momentum_buffer"]} for group in groups]
    return torch.optim.SGD(plain, lr=learning_rate, momentum=0.9)

def mixed(groups, learning_rate):
    own = {**groups[0], "states": ["momentum_buffer"]}
    name = own["params"][0][0].partition("#")[0]
    chosen = [p for p in own["params"] if p[0].partition("#")[0] == name]
    others = [p for p in own["params"] if p[0].partition("#")[0] != name]
    adam = {**own, "params": others, "states": ["step", "exp_avg", "exp_avg_sq"]}
    return [
        torch.optim.SGD([{**own, "params": chosen}], lr=learning_rate, momentum=0.9),
        torch.optim.Adam([adam], lr=learning_rate),
    ]

mixed.element_wise = True

def single(groups, learning_rate):
    (group,) = groups
    return torch.optim.SGD([{**group, "states": []}], lr=learning_rate)

class Unit(torch.optim.SGD):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad /= p.grad.norm()
        super().step()

unit = of(Unit, [])
unit.element_wise = True

def some(groups, learning_rate):
    return torch.optim.SGD([{**groups[0], "params": groups[0]["params"][:2], "states": []}], lr=learning_rate)

def unnamed(groups, learning_rate):
    return torch.optim.SGD(groups, lr=learning_rate)

def none(groups, learning_rate):
    return None
"""
NAMES = (
    *("sgd", "adam", "forgetful", "dampened", "nadam", "adafactor", "unit", "some", "unnamed", "none"),
    *("lookahead", "compressed", "undecayed", "mixed", "single"),
)


@pytest.fixture
def others(install: Install) -> None:
    install("other_optimizers", OPTIMIZERS, **{name: name for name in NAMES})


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(("name", "strategy"), [("sgd", "ddp"), ("sgd", "zero3"), ("sgd", "fsdp2"), ("adam", "ddp")])
def test_an_optimizer_that_goes_on_from_its_states_passes(name: str, strategy: str) -> None:
    check_optimizer(TrainConfig(optimizer=name), strategy, SHAPES)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("name", "strategy", "message"),
    [
        ("forgetful", "ddp", "does not go on from the tensors that its groups name in `states` as it was"),
        ("dampened", "ddp", "does not go on from the tensors that its groups name in `states` as it was"),
        ("nadam", "ddp", "fails in an update: KeyError: 'mu_product'"),
        ("adafactor", "ddp", "fails in an update: "),
        (
            "adam",
            "zero2",
            "adam may need whole tensors, and cluster.strategy zero2 cuts them into pieces; set cluster.",
        ),
        ("unit", "ddp", "says that it is element-wise, and updates pieces of a tensor otherwise than the whole"),
        ("some", "ddp", "some takes 2 parameters, not each of the 4 once"),
        ("unnamed", "ddp", "unnamed has a group of parameters without `states`"),
        ("none", "ddp", "none returns NoneType, not a torch.optim.Optimizer"),
        ("lookahead", "ddp", "keeps n, slow beside the tensors that its groups name in `states`; name all of them"),
        ("compressed", "ddp", "keeps mean in another shape than the parameter's"),
        ("undecayed", "ddp", "decays weights by 0, and not as the job says; it must take the `weight_decay`"),
        ("mixed", "zero3", "has groups with other `states`, which cluster.strategy zero3 does not keep apart"),
        ("sdg", "ddp", "train.optimizer sdg is offered by no installed package"),
    ],
)
def test_an_optimizer_that_would_not_resume_exactly_is_refused(name: str, strategy: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        check_optimizer(TrainConfig(optimizer=name), strategy, SHAPES)
    assert caught.value.field == "train.optimizer"


@pytest.mark.usefixtures("others")
def test_the_trial_has_the_groups_of_the_run() -> None:
    check_optimizer(TrainConfig(optimizer="single"), "ddp", SHAPES)
    with pytest.raises(ConfigError, match="single fails: ValueError: too many values to unpack"):
        check_optimizer(TrainConfig(optimizer="single", decay_bias_and_norm=False), "ddp", SHAPES)
    check_optimizer(TrainConfig(optimizer="mixed"), "fsdp2", SHAPES)


@pytest.mark.usefixtures("others")
def test_an_option_that_it_does_not_take_is_named() -> None:
    train = TrainConfig(optimizer="sgd", optimizer_options={"momentun": 0.5})
    with pytest.raises(
        ConfigError, match=r"train.optimizer sgd fails: TypeError: .*momentun.*; see train.optimizer_op"
    ):
        check_optimizer(train, "ddp", SHAPES)


def test_options_are_of_the_optimizer_that_the_job_names() -> None:
    for values, message in (
        ({"optimizer_options": {"momentum": 0.5}}, "train.optimizer_options is not for train.optimizer adamw"),
        ({"optimizer": "lion", "adam_beta2": 0.5}, "train.adam_beta2 is not for train.optimizer lion; remove it"),
    ):
        with pytest.raises(ValueError, match=message):
            TrainConfig.model_validate(values)
    # As a saved job has it.
    TrainConfig.model_validate(TrainConfig(optimizer="lion").model_dump())
