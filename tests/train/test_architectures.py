"""Every architecture of docs/models.md trains as in a plain loop, with every strategy; what cannot be is refused.

Each is a tiny model with random weights. The matrix takes minutes and is `long`; a row of each kind is `slow`.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from clm_dist.config.job import JobConfig
from clm_dist.errors import ConfigError
from clm_dist.files.blocks import Blocks
from clm_dist.files.run_dir import RunDir
from clm_dist.train.batches import BatchOrder, pass_seed
from clm_dist.train.forward import WithLoss, predict
from clm_dist.train.mixing import find_future
from clm_dist.train.model import build_model, check_model, load_config, load_model
from clm_dist.train.unused import describe_unused, find_unused
from tests.conftest import MakeJob
from tests.support.architectures import ARCHITECTURES
from tests.support.runs import metrics_of
from tests.support.training import train_one, train_one_here
from tests.support.workers import run_workers

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
STEPS = 3
OF_EACH_KIND = [
    ("bert", "fsdp2"),  # an embedding that is shared across blocks
    ("gemma3", "ddp"),  # a vision tower
    ("gemma3", "zero3"),
    ("mbart", "fsdp2"),  # cross-attention, and blocks that lie in each other
    ("mixtral", "ddp"),  # the loss of a router
    ("mixtral", "fsdp2"),
    ("zamba", "zero3"),  # layers that are shared
]


def job_of(make_job: MakeJob, model_type: str, *settings: str, **values: Any) -> JobConfig:
    config = {"model_type": model_type, **ARCHITECTURES.get(model_type, {}), **values}
    return make_job(f"model.config={json.dumps(config)}", f"train.max_steps={STEPS}", "eval.every=100", *settings)


def plain_training(job: JobConfig, store: Path) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """The losses, the router's losses and the weights of a loop in plain torch; transformers' own objective."""
    blocks = Blocks(store, "train")
    order = BatchOrder.of_job(job, len(blocks))
    model: Any = load_model(job, AutoTokenizer.from_pretrained(store / "tokenizer")).train()
    text = model.config.get_text_config()
    coefficient = getattr(text, "router_aux_loss_coef", getattr(text, "aux_loss_coef", 0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.train.learning_rate, weight_decay=job.train.weight_decay)
    losses, router_losses = [], []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = job.train.learning_rate * (1 - step / STEPS)
        batch = order.global_batch(step)
        micros = list(order.micro_batches(batch, 0, 1))
        loss = router_loss = 0.0
        for micro in micros:
            share = len(micro.blocks) / len(batch)
            ids = torch.from_numpy(blocks[micro.blocks])
            torch.manual_seed(pass_seed(job.train.seed, step, micro.index))
            output = model(input_ids=ids, use_cache=False)
            own = cross_entropy(output.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
            extra = (
                coefficient * output.aux_loss if getattr(output, "aux_loss", None) is not None else own.new_zeros(())
            )
            objective: Any = (own + extra) * share
            objective.backward()
            loss, router_loss = loss + own.item() * share, router_loss + extra.item() * share
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
        router_losses.append(router_loss)
    return losses, router_losses, {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def check_training(model_type: str, strategy: str, make_job: MakeJob, prepared: Any, run: Path) -> None:
    job = job_of(make_job, model_type, f"cluster.strategy={strategy}", "cluster.workers=2")
    store = prepared(job)
    losses, router_losses, weights = plain_training(job, store)
    outcome = run_workers(train_one_here, 2, job, RunDir(run), store)[0]
    assert outcome.status == "done", outcome.error
    steps = [record for record in metrics_of(run / "metrics.jsonl") if record["kind"] == "step"]
    np.testing.assert_allclose([step["loss"] for step in steps], losses, rtol=1e-5)
    np.testing.assert_allclose([step.get("router_loss", 0.0) for step in steps], router_losses, rtol=1e-5)
    written = AutoModelForCausalLM.from_pretrained(run / "final.unverified").state_dict()
    assert written.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_allclose(written[name], weight, rtol=0, atol=1e-5, err_msg=name)
    evaluations = [r["loss"] for r in metrics_of(run / "metrics.jsonl") if r["kind"] in ("eval", "verify")]
    assert evaluations[-1] == pytest.approx(evaluations[-2], rel=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_matrix(model_type: str, strategy: str, make_job: MakeJob, prepared: Any, tmp_path: Path) -> None:
    check_training(model_type, strategy, make_job, prepared, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "strategy"), OF_EACH_KIND)
def test_an_architecture_of_each_kind(
    model_type: str, strategy: str, make_job: MakeJob, prepared: Any, tmp_path: Path
) -> None:
    check_training(model_type, strategy, make_job, prepared, tmp_path / "run")


def test_the_page_lists_what_is_tried() -> None:
    (table,) = re.findall(r"(?m)^\| type \|.*\n\|[ -|]+\n((?:\|.*\n)+)", PAGE.read_text("utf-8"))
    listed = {row.split("|")[1].strip(" `"): row.split("|")[2].strip() for row in table.splitlines()}
    assert list(listed) == sorted(ARCHITECTURES)


@pytest.mark.slow
def test_unused_parameters_are_found_without_values(make_job: MakeJob, prepared: Any) -> None:
    store = prepared(make_job())
    tokenizer = AutoTokenizer.from_pretrained(store / "tokenizer")
    ids_BT = torch.from_numpy(Blocks(store, "train")[np.arange(2)])
    for model_type in ARCHITECTURES:
        job = job_of(make_job, model_type)
        config = load_config(job, tokenizer)
        unused = find_unused(config, ids_BT.shape[1])
        model: Any = load_model(job, tokenizer).train()
        model(input_ids=ids_BT, use_cache=False).logits.float().mean().backward()
        assert list(unused) == [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None], (
            model_type
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("seed", range(3))
def test_what_experts_round_is_no_sight_of_the_future(seed: int, precision: str, make_job: MakeJob) -> None:
    def problem(config: dict[str, Any]) -> str | None:
        torch.manual_seed(seed)
        model = build_model(load_config(make_job(f"model.config={json.dumps(config)}")))
        return find_future(
            WithLoss(model),
            block_size=64,
            device=torch.device("cpu"),
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        )

    mixture = ARCHITECTURES["mixtral"] | {"hidden_size": 128, "num_hidden_layers": 6, "num_local_experts": 16}
    assert problem({"model_type": "mixtral", **mixture}) is None
    xlnet = problem({"model_type": "xlnet", "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 32})
    assert "XLNetLMHeadModel sees the tokens that it is to predict" in str(xlnet)


def test_a_router_loss_has_its_coefficient_from_the_model(make_job: MakeJob) -> None:
    class Dbrx(nn.Module):
        """It keeps the coefficient in a part of its configuration that no other model has."""

        config = load_config(job_of(make_job, "gpt2"))
        router_aux_loss_coef = 0.25

        def forward(self, **inputs: Any) -> Any:
            return MoeCausalLMOutputWithPast(logits=torch.zeros(1, 8, 5), aux_loss=torch.tensor(2.0))

    assert predict(Dbrx(), torch.zeros(1, 8, dtype=torch.int64), None).router_loss == 0.5
    del Dbrx.router_aux_loss_coef
    with pytest.raises(ConfigError, match="Dbrx has a loss for its router and no coefficient"):
        predict(Dbrx(), torch.zeros(1, 8, dtype=torch.int64), None)


def test_unused_parameters_are_told(make_job: MakeJob) -> None:
    unused = find_unused(load_config(job_of(make_job, "bart")), 32)
    text = describe_unused(unused)
    assert "8,576 parameters of the model have no effect on its loss over text" in text
    assert "model.decoder.layers.0.encoder_attn.k_proj" in text


def test_a_parameter_without_a_gradient_that_was_not_found_ends_the_run(
    make_job: MakeJob, prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("clm_dist.train.loop.find_unused", lambda config, block_size: {})
    job = job_of(make_job, "bart")
    with pytest.raises(
        ConfigError, match=r"no gradient reaches, model\.decoder\.layers\.0\.encoder_attn\S+ and 19 more"
    ):
        train_one(job, RunDir(tmp_path / "run"), prepared(job))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "xlnet", "d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 32}, "sees the tokens that it"),
        ({"model_type": "cpmant", "hidden_size": 32, "num_hidden_layers": 1}, "sees the tokens that it is to predict"),
        (
            {**ARCHITECTURES["llama4_text"], "model_type": "llama4_text", "output_router_logits": True},
            "llama4_text has no loss for its router; set it to false",
        ),
        (
            {**ARCHITECTURES["reformer"], "model_type": "reformer", "axial_pos_shape": [8, 8]},
            "ReformerModelWithLMHead cannot compute a block: .*axial_pos_shape",
        ),
        (
            {**ARCHITECTURES["mixtral"], "model_type": "mixtral", "num_experts_per_tok": 5},
            "MixtralForCausalLM cannot compute a block: selected index k out of range",
        ),
        (
            {**ARCHITECTURES["reformer"], "model_type": "reformer", "hidden_dropout_prob": 0.1},
            "ReformerModelWithLMHead computes another loss of the same block each time",
        ),
    ],
)
def test_what_would_be_wrong_is_refused_before_the_first_step(
    config: dict[str, Any], message: str, make_job: MakeJob, prepared: Any, tmp_path: Path
) -> None:
    job = make_job(f"model.config={json.dumps(config)}")
    check_model(job)
    with pytest.raises(ConfigError, match=message):
        train_one(job, RunDir(tmp_path / "run"), prepared(job))
    assert not any(record["kind"] == "eval" for record in metrics_of(tmp_path / "run" / "metrics.jsonl"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma3", "hidden_size": 32}, r"hidden_size of Gemma3Config; it belongs into text_config"),
        (
            {"model_type": "gemma3", "text_config": {"hidden_siz": 32}},
            r"model\.config\.text_config\.hidden_siz of Gemma3TextConfig; did you mean hidden_size\?",
        ),
        ({"model_type": "bart", "decoder_layerdrop": 0.1}, "decoder_layerdrop is 0.1, so every pass leaves out other"),
        ({"model_type": "mistral3"}, "mistral3 is no causal language model"),
        ({"model_type": "zamba2", "num_hidden_layers": 2}, r"`num_hidden_layers` \(2\) must be equal to the number"),
    ],
)
def test_a_configuration_that_cannot_be_has_a_true_reason(
    config: dict[str, Any], message: str, make_job: MakeJob
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_model(make_job(f"model.config={json.dumps(config)}"))


@pytest.mark.parametrize("model_type", ["gemma3", "glm4", "pegasus"])
def test_the_tokenizer_decides_the_vocabulary_of_every_type(model_type: str, make_job: MakeJob, prepared: Any) -> None:
    job = job_of(make_job, model_type)
    tokenizer = AutoTokenizer.from_pretrained(prepared(job) / "tokenizer")
    config = load_config(job, tokenizer)
    text = config.get_text_config()
    assert (text.vocab_size, text.eos_token_id) == (len(tokenizer), tokenizer.eos_token_id)
    load_model(job, tokenizer)


def test_a_written_model_that_cannot_be_sharded_is_kept(
    make_job: MakeJob, prepared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shard(*arguments: Any, **options: Any) -> nn.Module:
        raise ValueError("no such group")

    monkeypatch.setattr("clm_dist.train.export.shard", shard)
    job = make_job("cluster.strategy=fsdp2", "train.max_steps=1")
    outcome = train_one(job, RunDir(tmp_path / "run"), prepared(job))
    assert outcome.status == "failed"
    assert re.search("is trained and written to .*final.unverified, and cannot be evaluated there", str(outcome.error))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final.unverified")
