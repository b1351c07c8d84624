"""The loss of tokens that is computed for a few at a time: equal to the last bit, in the memory of the logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import CONFIG_MAPPING

from clm_dist.config.job import JobConfig
from clm_dist.files.run_dir import RunDir
from clm_dist.train import loss, loss_parts
from clm_dist.train.forward import WithLoss
from clm_dist.train.loss import next_token_loss
from clm_dist.train.loss_parts import tokens_at_once
from clm_dist.train.model import build_model
from tests.conftest import MakeJob
from tests.support.architectures import ARCHITECTURES
from tests.support.runs import metrics_of
from tests.support.training import SOME_SLOW, train_one, train_several
from tests.support.workers import run_workers

BLOCKS, SIZE, HIDDEN, VOCAB = 3, 17, 8, 1000
_SIZE_OF_REFORMER = 32


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four tokens at a time, which does not divide 51."""
    monkeypatch.setattr(loss_parts, "_LOGITS_ON_CPU", 4 * VOCAB)


def random_ids(size: int = SIZE) -> Tensor:
    return torch.randint(VOCAB, (BLOCKS, size), generator=torch.Generator().manual_seed(1))


def head(dtype: torch.dtype, *, bias: bool = False) -> tuple[nn.Linear, Tensor]:
    """A head, and what it is given, (B, T, C)."""
    torch.manual_seed(0)
    linear = nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)
    return linear, torch.randn(BLOCKS, SIZE, HIDDEN).to(dtype).requires_grad_()


def of_all_at_once(logits_BTV: Tensor, ids_BT: Tensor, end: int | None) -> Tensor:
    """What the loss is defined as."""
    labels_BT = ids_BT[:, 1:].clone()
    if end is not None:
        labels_BT[ids_BT[:, :-1] == end] = -100
    losses = cross_entropy(logits_BTV[:, :-1].float().flatten(0, 1), labels_BT.flatten(), reduction="none")
    return losses.view_as(labels_BT)


def gradients(
    compute: Callable[[Tensor, Tensor, int | None], Tensor], dtype: torch.dtype, *, bias: bool, end: int | None
) -> list[Tensor]:
    """Losses, and gradients of the head and its input where each token counts otherwise."""
    linear, hidden_BTC = head(dtype, bias=bias)
    losses_BT = compute(linear(hidden_BTC), random_ids(), end)
    weights_BT = torch.linspace(-1, 2, losses_BT.numel()).view_as(losses_BT)
    return [losses_BT, *torch.autograd.grad((losses_BT * weights_BT).sum(), [hidden_BTC, *linear.parameters()])]


@contextmanager
def saved() -> Iterator[dict[int, int]]:
    """Yields the bytes of each storage that autograd keeps, by its address."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("end", [None, int(random_ids()[0, 3])])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_what_all_at_once_give(dtype: torch.dtype, bias: bool, end: int | None) -> None:
    in_parts = gradients(next_token_loss, dtype, bias=bias, end=end)
    defined = gradients(of_all_at_once, dtype, bias=bias, end=end)
    for one, other in zip(in_parts, defined, strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_model_has_the_gradient_that_it_has_of_all_at_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With logits that are capped or scaled, too; it takes the place of the logits of each."""
    values = {"pad_token_id": 0, **ARCHITECTURES[kind], "vocab_size": VOCAB}
    ids_BT = random_ids(_SIZE_OF_REFORMER)

    def compute() -> list[Tensor]:
        torch.manual_seed(0)
        model: Any = WithLoss(build_model(CONFIG_MAPPING[kind](**values))).train()
        losses_BT = model(ids_BT)[0]
        torch.autograd.backward(losses_BT.sum())
        return [losses_BT.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    overwritten: list[bool] = []
    find = loss._may_be_overwritten

    def spy(logits: Tensor) -> bool:
        overwritten.append(find(logits))
        return overwritten[-1]

    monkeypatch.setattr(loss, "_may_be_overwritten", spy)
    in_parts = compute()
    assert overwritten == [True]
    monkeypatch.setattr(loss_parts, "_LOGITS_ON_CPU", 2 * ids_BT.numel() * VOCAB)
    for one, other in zip(in_parts, compute(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_the_logits_nothing_else_is_kept_and_their_gradient_takes_their_place(
    dtype: torch.dtype, bias: bool
) -> None:
    linear, hidden_BTC = head(dtype, bias=bias)
    with saved() as kept:
        logits_BTV = linear(hidden_BTC)
        losses_BT = next_token_loss(logits_BTV, random_ids())
    size = BLOCKS * SIZE * VOCAB * dtype.itemsize
    assert [address for address, nbytes in kept.items() if nbytes >= size] == [logits_BTV.data_ptr()]
    gradient: list[Tensor] = []
    logits_BTV.register_hook(gradient.append)
    torch.autograd.backward(losses_BT.sum())
    assert gradient[0].data_ptr() == logits_BTV.data_ptr()


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("last", [lambda logits: logits, torch.tanh], ids=["overwritten", "kept"])
def test_a_second_derivative_is_refused(last: Callable[[Tensor], Tensor]) -> None:
    linear, hidden_BTC = head(torch.float32)
    loss_sum = next_token_loss(last(linear(hidden_BTC)), random_ids()).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss_sum, linear.weight, create_graph=True)


@pytest.mark.usefixtures("few_at_once")
def test_a_second_gradient_is_an_error() -> None:
    linear, hidden_BTC = head(torch.float32)
    loss_sum = next_token_loss(linear(hidden_BTC), random_ids()).sum()
    torch.autograd.backward(loss_sum, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.backward(loss_sum)


@pytest.mark.usefixtures("few_at_once")
@pytest.mark.parametrize("last", [torch.tanh, torch.sigmoid, lambda logits: torch.tanh(logits).view(logits.shape)])
def test_logits_that_the_model_needs_for_its_own_gradient_stay(last: Callable[[Tensor], Tensor]) -> None:
    def of(compute: Callable[[Tensor, Tensor, int | None], Tensor]) -> list[Tensor]:
        linear, hidden_BTC = head(torch.float32)
        losses_BT = compute(last(linear(hidden_BTC)), random_ids(), None)
        return [losses_BT, *torch.autograd.grad(losses_BT.sum(), [hidden_BTC, linear.weight])]

    for one, other in zip(of(next_token_loss), of(of_all_at_once), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("few_at_once")
def test_logits_that_are_given_stay() -> None:
    logits_BTV = torch.randn(BLOCKS, SIZE, VOCAB, requires_grad=True)
    before = logits_BTV.detach().clone()
    torch.autograd.backward(next_token_loss(logits_BTV, random_ids()).sum())
    assert torch.equal(logits_BTV.detach(), before)
    with torch.no_grad():
        next_token_loss(logits_BTV, random_ids())
    assert torch.equal(logits_BTV.detach(), before)


@pytest.mark.parametrize(
    ("vocab_size", "on_cpu", "expected"),
    [(50257, True, 8), (50257, False, 256), (300, True, 1024), (2**18, True, 2), (2**20, True, 1), (2**25, False, 1)],
)
def test_how_many_tokens_are_computed_at_once(vocab_size: int, on_cpu: bool, expected: int) -> None:
    assert tokens_at_once(vocab_size, on_cpu=on_cpu) == expected


@pytest.mark.usefixtures("few_at_once")
def test_a_compiler_sees_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(loss, "_InParts")
    linear, hidden_BTC = head(torch.float32)
    ids_BT = random_ids()
    compiled = torch.compile(lambda: next_token_loss(linear(hidden_BTC), ids_BT), fullgraph=True, backend="eager")
    assert torch.equal(compiled(), of_all_at_once(linear(hidden_BTC), ids_BT, None))


def test_few_logits_are_computed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(loss, "_InParts")
    linear, hidden_BTC = head(torch.float32)
    assert next_token_loss(linear(hidden_BTC), random_ids()).shape == (BLOCKS, SIZE - 1)


def train_in_parts(rank: int, world_size: int, jobs: list[JobConfig], runs: list[Path], store: Path) -> list[bool]:
    """Trains in this process with 2 tokens at a time. Return for each pass whether it overwrites its logits."""
    loss_parts._LOGITS_ON_CPU = 2 * 300
    find = loss._may_be_overwritten
    overwritten: list[bool] = []

    def spy(logits: Tensor) -> bool:
        if logits.requires_grad:
            overwritten.append(find(logits))
        return find(logits)

    loss._may_be_overwritten = spy
    for job, run in zip(jobs, runs, strict=True):
        train_one(job, RunDir(run), store, rank, world_size)
    return overwritten


@pytest.mark.parametrize("strategy", SOME_SLOW)
def test_every_strategy_trains_and_evaluates_as_with_all_at_once(
    strategy: str, make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    settings = ("train.max_steps=3", "checkpoint.every=1000", f"cluster.strategy={strategy}", "cluster.workers=2")
    jobs = [make_job(*settings, f"train.precision={precision}") for precision in ("fp32", "bf16")]
    store, names = prepared(jobs[0]), ("fp32", "bf16")
    overwritten = run_workers(train_in_parts, 2, jobs, [tmp_path / "parts" / name for name in names], store)
    run_workers(train_several, 2, jobs, [tmp_path / "whole" / name for name in names], store)
    for of_rank in overwritten:
        assert len(of_rank) >= 2 * 3
        assert all(of_rank)
    for name in names:
        parts, whole = (
            [
                {key: record.get(key) for key in ("kind", "step", "loss", "grad_norm")}
                for record in metrics_of(tmp_path / kind / name / "metrics.jsonl")
                if record["kind"] in ("step", "eval")
            ]
            for kind in ("parts", "whole")
        )
        assert len(parts) == 5
        assert parts == whole
