"""Weights are loaded whole, or refused: nothing that a library would only warn of is trained or measured."""

import errno
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    GPTBigCodeConfig,
    GPTNeoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OpenAIGPTConfig,
)

from clm_dist.errors import ConfigError, StorageError
from clm_dist.pretrained.weights import check_pretrained, load_pretrained
from tests.conftest import MakeJob

Weights = dict[str, torch.Tensor]
GATE = "model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose embedding is its head."""
    directory = tmp_path_factory.mktemp("models") / "whole"
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=40, max_position_embeddings=32, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


Change = Callable[..., Path]
Edit = Callable[[Weights], Weights | None]


@pytest.fixture
def change(whole: Path, tmp_path: Path) -> Change:
    def changed(edit: Edit = lambda weights: None, **config: Any) -> Path:
        directory = tmp_path / "model"
        shutil.copytree(whole, directory)
        weights = load_file(directory / "model.safetensors")
        save_file(edit(weights) or weights, directory / "model.safetensors", {"format": "pt"})
        values = json.loads((directory / "config.json").read_text()) | config
        (directory / "config.json").write_text(json.dumps(values))
        return directory

    return changed


def refused(directory: Path, words: str, *, unread: bool = True) -> str:
    """The error over a directory, which also comes where no weight is read."""
    messages = set()
    for load in (load_pretrained, check_pretrained) if unread else (load_pretrained,):
        with pytest.raises(ConfigError, match=words) as caught:
            load(directory, field="model.path")
        assert caught.value.field == "model.path"
        messages.add(str(caught.value))
    (message,) = messages
    assert message.startswith(f"model.path {directory}: ")
    return message


def test_a_whole_model_has_the_weights_that_were_written(whole: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_pretrained(whole)
    model = load_pretrained(whole)
    written = load_file(whole / "model.safetensors")
    assert model.state_dict().keys() == {*written, "lm_head.weight"}
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in written.items())
    assert not caplog.records


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_forward_module.", "base_model.model."])
def test_names_with_a_prefix_are_refused_with_the_command_that_mends_them(
    change: Change, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = change(lambda weights: {prefix + name: weight for name, weight in weights.items()})
    message = refused(directory, "its files lack lm_head.weight, model.embed_tokens.weight, .* and 18 more; ")
    assert f"the names in them begin with {prefix}" in message
    found = re.search(r'python -c "(.*)"$', message)
    assert found
    monkeypatch.chdir(directory)
    exec(found[1])
    check_pretrained(directory)


def test_a_head_of_its_own_that_is_missing_is_not_made_up(change: Change) -> None:
    message = refused(change(tie_word_embeddings=False), "its files lack lm_head.weight; ")
    assert "set tie_word_embeddings to true" in message


@pytest.mark.parametrize(
    ("edit", "config", "words"),
    [
        (lambda w: {name: w[name] for name in w if name != GATE}, {}, f"its files lack {GATE}; get the model again"),
        (None, {"num_hidden_layers": 3}, "its files lack model.layers.2.* and 6 more; get the model again, or put"),
        (None, {"num_hidden_layers": 1}, "its files hold model.layers.1.* and 6 more, which the model of its config"),
        (
            lambda w: w | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)},
            {},
            "its files hold model.layers.0.self_attn.q_proj.bias, which the model of its config",
        ),
        (lambda w: w | {GATE: w[GATE][:5].clone()}, {}, f"{GATE} is 5 x 16 in its files, and 24 x 16 by its config"),
        (None, {"vocab_size": 41}, "model.embed_tokens.weight is 40 x 16 in its files, and 41 x 16 by its config"),
        (None, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"it is quantised \(gptq\), and quantis"),
    ],
)
def test_weights_that_are_not_those_of_the_configuration_are_refused(
    change: Change, edit: Edit | None, config: dict[str, Any], words: str
) -> None:
    refused(change(edit or (lambda weights: None), **config), words)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_where_they_are_read(change: Change, value: float) -> None:
    def edit(weights: Weights) -> None:
        weights[GATE][3, 3] = value

    directory = change(edit)
    check_pretrained(directory)
    refused(directory, f"{GATE} has values that are not finite; get the model again", unread=False)


def test_parts_beside_the_language_model_are_left_out_and_said(
    change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {"value_head.weight": torch.zeros(2), "model.vision_tower.layers.0.weight": torch.zeros(2)}
    directory = change(lambda weights: weights | extra)
    with caplog.at_level(logging.WARNING, "clm_dist"):
        load_pretrained(directory)
    (record,) = [record for record in caplog.records if record.name.startswith("clm_dist")]
    assert record.getMessage() == (
        f"{directory}: its files also hold model.vision_tower.layers.0.weight, value_head.weight, which the language "
        "model does not have; they are not used"
    )


@pytest.mark.parametrize(
    ("config", "old"),
    [
        (
            GPTNeoConfig(num_layers=1, attention_types=[[["global"], 1]], hidden_size=8, num_heads=1, vocab_size=9),
            ("transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"),
        ),
        (OpenAIGPTConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=9), ("transformer.h.0.attn.bias",)),
        (GPTBigCodeConfig(n_layer=1, n_embd=8, n_head=1, vocab_size=9), ("transformer.h.0.attn.bias",)),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_masks_that_older_versions_saved_are_no_weights(config: Any, old: tuple[str, ...], tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(
        weights | {name: torch.ones(1, 1, 4, 4) for name in old}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    check_pretrained(tmp_path)
    load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.EIO, "Input/output error"), StorageError),
        (OSError(errno.ESTALE, "Stale file handle"), StorageError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError),
    ],
)
def test_faults_of_a_machine_are_no_faults_of_a_model(
    error: Exception, raised: type[Exception], whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fail)
    with pytest.raises(raised):
        load_pretrained(whole)


def test_a_shard_that_is_missing_is_named(whole: Path, tmp_path: Path) -> None:
    LlamaForCausalLM.from_pretrained(whole).save_pretrained(tmp_path / "model", max_shard_size="3KB")
    second = sorted((tmp_path / "model").glob("model-*.safetensors"))[1]
    second.unlink()
    refused(tmp_path / "model", f"No such file or directory: .*{second.name}; get the model again")


def test_an_adapter_is_no_model(change: Change) -> None:
    directory = change()
    (directory / "adapter_config.json").write_text("{}")
    refused(directory, "it is an adapter of PEFT, not a model; merge it first, with .*merge_and_unload")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"it holds no weights \(\*.safetensors, \*.bin\)$"),
        (b"", r"model.safetensors is damaged \(.*\); get the model again"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "model.safetensors is a pointer of Git LFS, .*`git lfs pull`",
        ),
    ],
)
def test_a_file_that_holds_no_weights_is_named(change: Change, content: bytes | None, words: str) -> None:
    directory = change()
    if content is None:
        (directory / "model.safetensors").unlink()
    else:
        (directory / "model.safetensors").write_bytes(content)
    refused(directory, words)


def test_gguf_alone_is_not_read(change: Change) -> None:
    directory = change()
    (directory / "model.safetensors").rename(directory / "model.gguf")
    refused(directory, "it holds no weights .*; GGUF files are not supported")


def test_a_damaged_bin_file_is_named(change: Change) -> None:
    directory = change()
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    check_pretrained(directory)
    content = (directory / "pytorch_model.bin").read_bytes()
    (directory / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    refused(directory, "pytorch_model.bin cannot be read")
    torch.save({"a": Path("other things than tensors")}, directory / "pytorch_model.bin")
    refused(directory, r"pytorch_model.bin cannot be read as tensors alone, .*; get the model as \*.safetensors")


def test_code_of_a_model_is_never_run(change: Change) -> None:
    directory = change(model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    refused(directory, "it needs code of its own, which clm-dist does not run")
    assert not (directory / "ran").exists()


def test_a_model_whose_type_is_known_is_loaded_without_the_code_beside_it(change: Change) -> None:
    directory = change(auto_map={"AutoModelForCausalLM": "own.M"})
    (directory / "own.py").write_text(f"open({str(directory / 'ran')!r}, 'w')\n")
    assert type(load_pretrained(directory)) is LlamaForCausalLM
    assert not (directory / "ran").exists()


def test_a_run_begins_with_this_check(change: Change, make_job: MakeJob) -> None:
    from clm_dist.train.model import check_model, load_model

    directory = change(lambda weights: {name: w for name, w in weights.items() if name != GATE})
    job = make_job("model.config=null", f"model.path={directory}", "data.block_size=32")
    for check in (check_model, lambda job: load_model(job, None)):
        with pytest.raises(ConfigError, match=f"its files lack {GATE}"):
            check(job)
