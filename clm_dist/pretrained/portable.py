"""What other programs read of a model's directory, beside the files and words of transformers 5.

transformers 4 (4.57 is its last), KerasHub and the converters to GGUF know neither the names of its tokenizer classes
nor where its configurations keep the base of the rotary embedding; without that they take the default, and say nothing.
"""

import json
from pathlib import Path
from typing import Any

from clm_dist.files.atomic import write_text

_OWN_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Classes of transformers 5, and those of both that read the same files."""


def make_portable(directory: Path) -> None:
    """Add to a written model what other programs read; transformers 5 reads the same model as before."""
    _edit(directory / "config.json", _with_old_names)
    _edit(directory / "tokenizer_config.json", _with_old_class)
    _write_bpe_files(directory)


def _edit(file: Path, change: Any) -> None:
    if not file.is_file():
        return
    found = json.loads(file.read_text("utf-8"))
    changed = change(found)
    if changed != found:
        write_text(file, json.dumps(changed, indent=2, ensure_ascii=False) + "\n")


def _with_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that has the older names of its values too."""
    model_type = config.get("model_type")
    old = _old_rope_names(config.get("rope_parameters") or {})
    if model_type == "gpt2":
        old["n_ctx"] = config["n_positions"]
    if model_type == "qwen3_moe":
        old["num_experts"] = config["num_local_experts"]
    if model_type in ("modernbert", "modernbert-decoder"):
        old |= {"global_rope_theta": old["rope_theta"], "local_rope_theta": old["rope_local_base_freq"]}
    if isinstance(config.get("text_config"), dict):
        old["text_config"] = _with_old_names(config["text_config"])
    return config | old


def _old_rope_names(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding as transformers 4 names it: its base, and what scales it."""
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and isinstance(rope.get("full_attention"), dict):
        # Gemma 3: another base where attention slides.
        return _old_rope_names(rope["full_attention"]) | {"rope_local_base_freq": local["rope_theta"]}
    old: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in old}
    if scaling.get("rope_type", "default") != "default":
        old["rope_scaling"] = scaling
    return old


def _with_old_class(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a tokenizer in words that both versions know."""
    config = dict(config)
    if config.get("tokenizer_class") in _OWN_CLASSES:
        config["tokenizer_class"] = _OWN_CLASSES[config["tokenizer_class"]]
    if isinstance(config.get("extra_special_tokens"), list):
        # A list of that name is an error in transformers 4.
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _write_bpe_files(directory: Path) -> None:
    """Write vocab.json and merges.txt, as GPT-2 had them, beside the tokenizer.json of a byte-level BPE."""
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file() or (directory / "merges.txt").exists():
        return
    tokenizer = Tokenizer.from_file(str(file))
    if type(tokenizer.model).__name__ == "BPE" and "ByteLevel" in str(tokenizer.decoder):
        tokenizer.model.save(str(directory))
