"""With `data.document_mask` a block is its documents, each as if it were alone."""

import dataclasses
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.evaluation import evaluate_store
from clm_dist.files.blocks import Blocks, Manifest
from clm_dist.files.run_dir import RunDir
from clm_dist.files.shards import write_shards
from clm_dist.metrics import combine
from clm_dist.progress import Silent
from clm_dist.train.batches import BatchOrder
from clm_dist.train.documents import document_end_of, document_positions
from clm_dist.train.evaluate import EvalSplit, evaluate_micros
from clm_dist.train.forward import WithLoss, block_logits, block_losses
from clm_dist.train.loop import Outcome
from clm_dist.train.mixing import find_mixing
from clm_dist.train.model import check_model, load_model
from tests.conftest import MakeJob
from tests.support.runs import metrics_of
from tests.support.training import STRATEGIES, losses_of, train_one, train_several
from tests.support.workers import run_workers

END, VOCAB, SIZE = 0, 300, 32
CPU = torch.device("cpu")
GPT2 = {"model_type": "gpt2", "n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# It has learned positions that restart, and a mask that does not look at them.
OPT = {
    "model_type": "opt",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
MASKED = ("data.document_mask=true", "train.max_steps=6", "checkpoint.every=1000")


def build(config: dict[str, Any], attention: str = "sdpa") -> Any:
    """A model with random weights that are large enough for every token to matter."""
    values = dict(config)
    torch.manual_seed(0)
    kind = AutoConfig.for_model(values.pop("model_type"), vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **values)
    kind._attn_implementation = "eager" if "flash" in attention else attention
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(kind)](kind).eval()
    # What is not installed cannot be asked for when the model is built.
    model.config._attn_implementation = attention
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    return model


def packed() -> Tensor:
    """Blocks of which no two have the same boundaries."""
    ids_BT = torch.randint(1, VOCAB, (6, SIZE), generator=torch.Generator().manual_seed(0))
    for row, ends in enumerate([(9,), (3, 4, 20, 31), (0, 15), (), (30,), (0, 1, 2, 29, 30, 31)]):
        ids_BT[row, list(ends)] = END
    return ids_BT


def documents_of(ids_T: Tensor) -> list[slice]:
    starts = [0, *(place + 1 for place, token in enumerate(ids_T[:-1].tolist()) if token == END)]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], len(ids_T)], strict=True)]


def losses_alone(model: Any, ids_BT: Tensor) -> Tensor:
    """Losses of every document in a pass of its own, by transformers alone; 0 for a document's first token."""
    rows = []
    for ids_T in ids_BT:
        losses = [torch.zeros(0)]
        for document in documents_of(ids_T):
            logits_TV = model(input_ids=ids_T[None, document], use_cache=False).logits[0]
            within = cross_entropy(logits_TV[:-1], ids_T[document][1:], reduction="none")
            losses += [torch.zeros(1), within]
        rows.append(torch.cat(losses)[1:])
    return torch.stack(rows)


def losses_packed(model: Any, ids_BT: Tensor) -> Tensor:
    return block_losses(WithLoss(model), ids_BT, END)


def flash_in_torch(name: str | None, *_: Any) -> Any:
    """What transformers imports of flash attention, in plain torch: a batch, or one row of sequences of any length."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    def attend_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, **_: Any) -> Tensor:
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        sizes = cu_seqlens_q.diff().tolist()
        parts = zip(*(torch.split(x, sizes) for x in (q, k, v)), strict=True)
        return torch.cat([attend(*(x[None] for x in part))[0] for part in parts])

    return (attend, attend_varlen, None, None, None), (lambda **_: {}, None)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import modeling_flash_attention_utils
    from transformers.integrations import flash_attention

    # The real one takes half precision only, and asks the model which.
    monkeypatch.setattr(flash_attention, "get_target_dtype", lambda query, module: None)
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", flash_in_torch)


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_a_block_has_the_losses_of_its_documents_alone(config: dict[str, Any], attention: str, flash: None) -> None:
    model, ids_BT = build(config, attention), packed()
    together = losses_packed(model, ids_BT)
    torch.testing.assert_close(together, losses_alone(model, ids_BT), rtol=0, atol=1e-5)
    assert torch.equal(together == 0, ids_BT[:, :-1] == END)
    # Without the mask they are others.
    plain = block_losses(WithLoss(model), ids_BT, None)
    assert (plain[ids_BT[:, :-1] != END] - together[ids_BT[:, :-1] != END]).abs().max() > 0.1


@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
@torch.no_grad()
def test_the_tokens_of_one_document_change_nothing_in_another(
    config: dict[str, Any], attention: str, flash: None
) -> None:
    model, ids_BT = build(config, attention), packed()
    before = losses_packed(model, ids_BT)
    for row, ids_T in enumerate(ids_BT):
        for document in documents_of(ids_T):
            changed_BT = ids_BT.clone()
            inside = changed_BT[row, document]
            changed_BT[row, document] = torch.where(inside == END, END, inside % (VOCAB - 1) + 1)
            after = losses_packed(model, changed_BT)
            own = torch.zeros_like(before, dtype=torch.bool)
            own[row, document.start : document.stop - 1] = True
            assert torch.equal(after[~own], before[~own])
            assert not own.any() or not torch.equal(after[own], before[own]) or ids_T[document.start] == END


def test_positions_restart_at_documents_and_at_the_rest_of_one() -> None:
    ids_BT = torch.tensor([[7, 0, 5, 6, 0, 9], [0, 0, 1, 2, 3, 0], [1, 2, 3, 4, 5, 6]])
    expected = [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]
    assert document_positions(ids_BT, 0).tolist() == expected


def test_without_the_mask_the_model_is_given_the_ids_alone() -> None:
    given: dict[str, Any] = {}

    class Model(nn.Module):
        def forward(self, **arguments: Any) -> Any:
            given.update(arguments)
            return build(GPT2)(**arguments)

    ids_BT = packed()
    block_logits(WithLoss(Model()), ids_BT, None)
    assert given == {"input_ids": ids_BT, "use_cache": False}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("config", "attention", "apart"),
    [
        (GPT2, "sdpa", True),
        (LLAMA, "eager", True),
        (LLAMA, "flash_attention_2", True),
        (OPT, "sdpa", False),
        (OPT, "eager", False),
    ],
)
@pytest.mark.parametrize("block_size", [2, 8, 64])
def test_a_model_that_mixes_documents_is_found(
    config: dict[str, Any], attention: str, apart: bool, precision: str, block_size: int, flash: None
) -> None:
    model = build(config, attention).train()
    if precision == "bf16":
        model.bfloat16()
    # The weights of a model that nobody trained: the losses hardly depend on what a token sees.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.div_(5)
    problem = find_mixing(WithLoss(model), END, block_size=block_size, device=CPU, precision=precision)
    assert model.training
    # In a block of two tokens no document has two that are predicted.
    if apart or block_size == 2:
        assert problem is None
    else:
        assert problem
        assert f"does not work with OPTForCausalLM ({attention} attention)" in problem
        assert "set data.document_mask to false" in problem


def test_ranks_refuse_a_model_together() -> None:
    asked = []

    def another_rank_found_it(found: bool) -> bool:
        asked.append(found)
        return True

    arguments: dict[str, Any] = {"block_size": SIZE, "device": CPU, "precision": "fp32"}
    assert find_mixing(WithLoss(build(GPT2)), END, any_rank=another_rank_found_it, **arguments)
    assert asked == [False]
    assert find_mixing(WithLoss(build(OPT)), END, any_rank=lambda found: found, **arguments)


@pytest.mark.parametrize("lost", ["mask", "positions"])
def test_half_of_what_the_mask_does_is_not_enough(lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.gpt2 import modeling_gpt2

    model = build(GPT2)
    if lost == "mask":
        create = modeling_gpt2.create_causal_mask
        monkeypatch.setattr(
            modeling_gpt2, "create_causal_mask", lambda **given: create(**given | {"position_ids": None})
        )
    else:
        places = torch.arange(64)
        model.transformer.wpe.register_forward_pre_hook(lambda _, given: (places[: given[0].shape[1]][None],))
    problem = find_mixing(WithLoss(model), END, block_size=SIZE, device=CPU, precision="fp32")
    assert problem
    assert "does not work with GPT2LMHeadModel" in problem


def test_broken_weights_are_not_taken_for_mixed_documents() -> None:
    model = build(GPT2)
    model.transformer.wpe.weight.data[0, 0] = math.nan
    assert find_mixing(WithLoss(model), END, block_size=SIZE, device=CPU, precision="fp32") is None


@pytest.mark.parametrize("model_type", ["mamba", "rwkv", "bloom"])
def test_a_model_without_positions_is_refused_before_workers_start(make_job: MakeJob, model_type: str) -> None:
    settings = f"model.config={{model_type: {model_type}, hidden_size: 64}}"
    check_model(make_job(settings))
    with pytest.raises(ConfigError, match=r"data\.document_mask is not supported by \w+LM, which takes no position"):
        check_model(make_job(settings, "data.document_mask=true"))


def test_the_mask_needs_documents_with_ends(make_job: MakeJob) -> None:
    with pytest.raises(ConfigError, match=r"--set data\.document_mask=true: data\.document_mask is true, but with"):
        make_job("data.document_mask=true", "data.append_eos=false")


def test_the_mask_changes_no_block(make_job: MakeJob, prepared: Callable[[JobConfig], Path]) -> None:
    assert prepared(make_job("data.document_mask=true")) == prepared(make_job())


def test_an_evaluation_adds_up_what_documents_have_alone(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path]
) -> None:
    job = make_job(*MASKED, "eval.micro_size=3")
    store = prepared(job)
    end = document_end_of(store)
    assert end == END
    model = load_model(job, AutoTokenizer.from_pretrained(store / "tokenizer"))
    split = EvalSplit.of_store(store, 3, end)
    parts = evaluate_micros(WithLoss(model), split, device=CPU)
    evaluation = combine(parts, step=0, epoch=0, num_micros=split.num_micros, num_tokens=split.num_tokens)
    ids_BT = torch.from_numpy(split.blocks[np.arange(len(split.blocks))])
    assert evaluation.num_tokens == (ids_BT[:, :-1] != end).sum() < ids_BT[:, 1:].numel()
    with torch.no_grad():
        alone = losses_alone(model, ids_BT).double().sum().item()
    assert evaluation.loss == pytest.approx(alone / evaluation.num_tokens, rel=1e-6)
    num_bytes = np.load(store / "eval" / "bytes.npy")[:, 1]
    assert [part.num_bytes for part in parts] == [num_bytes[i : i + 3].sum() for i in range(0, len(num_bytes), 3)]
    assert evaluation.bits_per_byte == pytest.approx(alone / math.log(2) / num_bytes.sum(), rel=1e-6)


def reference_losses(job: JobConfig, store: Path) -> list[float]:
    """The losses of a loop in plain torch, whose model never sees more than one document."""
    blocks, end = Blocks(store, "train"), document_end_of(store)
    assert end == END
    order = BatchOrder.of_job(job, len(blocks))
    model = load_model(job, AutoTokenizer.from_pretrained(store / "tokenizer"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.learning_rate, weight_decay=0.01)
    losses = []
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = job.train.learning_rate * (1 - step / 6)
        ids_BT = torch.from_numpy(blocks[order.global_batch(step)])
        loss = losses_alone(model, ids_BT).sum() / (ids_BT[:, :-1] != end).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_every_strategy_trains_as_on_documents_alone(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    two = ("cluster.workers=2", "batch.micro_size=2")
    jobs = [make_job(*MASKED, *two, f"cluster.strategy={strategy}") for strategy in STRATEGIES]
    jobs.append(make_job(*MASKED, *two, "train.gradient_checkpointing=true"))
    store = prepared(jobs[0])
    runs = [tmp_path / str(number) for number in range(len(jobs))]
    outcomes = run_workers(train_several, 2, jobs, runs, store)[0]
    assert [outcome.status for outcome in outcomes] == ["done"] * len(jobs)
    expected = reference_losses(jobs[0], store)
    for run in runs:
        np.testing.assert_allclose(losses_of(run), expected, rtol=1e-5)
    # One worker in four passes, on another number of tokens in each of them.
    alone = make_job(*MASKED, "batch.micro_size=2")
    assert train_one(alone, RunDir(tmp_path / "alone"), store).status == "done"
    np.testing.assert_allclose(losses_of(tmp_path / "alone"), losses_of(runs[0]), rtol=1e-6)
    # The written model, evaluated by the loop and by the command.
    records = {r["kind"]: r for r in metrics_of(tmp_path / "alone" / "metrics.jsonl")}
    evaluated = evaluate_store(str(tmp_path / "alone" / "final.unverified"), alone, store, Silent())
    for loss in (records["eval"]["loss"], records["verify"]["loss"]):
        assert evaluated.figures["loss"] == pytest.approx(loss, rel=1e-6)
    assert evaluated.figures["num_tokens"] == records["eval"]["num_tokens"]
    assert evaluated.figures["bits_per_byte"] == pytest.approx(records["eval"]["bits_per_byte"], rel=1e-6)


def outcomes_of(rank: int, world_size: int, jobs: list[JobConfig], run: Path, store: Path) -> list[Outcome]:
    return [train_one(job, RunDir(run / str(i)), store, rank, world_size) for i, job in enumerate(jobs)]


def test_a_run_with_a_model_that_mixes_documents_ends_before_its_first_step(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    config = "{" + ", ".join(f"{key}: {value}" for key, value in OPT.items()) + "}"
    settings = (*MASKED, f"model.config={config}", "cluster.workers=2", "batch.micro_size=2")
    jobs = [
        make_job(*settings, f"cluster.strategy={strategy}", f"train.precision={precision}")
        for strategy, precision in (("ddp", "fp32"), ("ddp", "bf16"), ("zero3", "fp32"), ("fsdp2", "bf16"))
    ]
    store = prepared(jobs[0])
    for outcomes in run_workers(outcomes_of, 2, jobs, tmp_path, store):
        for outcome in outcomes:
            assert (outcome.status, outcome.step) == ("failed", 0)
            assert "data.document_mask does not work with OPTForCausalLM" in str(outcome.error)
    # The command refuses it too.
    load_model(jobs[0], AutoTokenizer.from_pretrained(store / "tokenizer")).save_pretrained(tmp_path / "opt")  # type: ignore[operator]
    with pytest.raises(ConfigError, match=r"data\.document_mask does not work with OPTForCausalLM") as caught:
        evaluate_store(str(tmp_path / "opt"), jobs[0], store, Silent())
    assert caught.value.field == "data.document_mask"


def test_a_step_with_nothing_to_predict_has_loss_0(
    make_job: MakeJob, prepared: Callable[[JobConfig], Path], tmp_path: Path
) -> None:
    job = make_job(*MASKED, "train.max_steps=2")
    store = Path(shutil.copytree(prepared(job), tmp_path / "store"))
    manifest = Manifest.read(store / "manifest.json")
    ends = np.full((12, 32), document_end_of(store), np.uint16)
    train = dataclasses.replace(
        manifest.splits["train"],
        num_blocks=12,
        num_document_ends=12 * 31,
        shards=tuple(write_shards(store, "train", [ends], 32, ends.dtype)),
    )
    dataclasses.replace(manifest, splits=manifest.splits | {"train": train}).write(store / "manifest.json")
    assert train_one(job, RunDir(tmp_path / "run"), store).status == "done"
    assert losses_of(tmp_path / "run") == [0.0, 0.0]
    # An evaluation of nothing is none.
    empty = dataclasses.replace(manifest.splits["eval"], num_document_ends=manifest.splits["eval"].num_blocks * 31)
    dataclasses.replace(manifest, splits=manifest.splits | {"eval": empty}).write(store / "manifest.json")
    with pytest.raises(ConfigError, match=r"with data\.document_mask there is nothing to evaluate"):
        EvalSplit.of_store(store, 3, document_end_of(store))


def test_old_jobs_say_nothing_of_the_mask_and_have_none(make_job: MakeJob, tmp_path: Path) -> None:
    job = make_job()
    assert not job.data.document_mask
    assert not JobConfig.model_validate(job.model_dump(exclude={"data": {"document_mask"}})).data.document_mask
