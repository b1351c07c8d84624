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

_OLD_NAMES = {
    "gpt2": {"n_ctx": "n_positions"},
    "gpt_neox": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "gpt_neox_japanese": {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"},
    "modernbert-decoder": {"global_rope_theta": "rope_theta", "local_rope_theta": "rope_local_base_freq"},
    "qwen3_moe": {"num_experts": "num_local_experts"},
}
"""For a type, the names of transformers 4, and where the values are now."""


def make_portable(directory: Path) -> None:
    """Add to a written model what other programs read; transformers 5 reads the same model as before."""
    _edit(directory / "config.json", _with_old_names)
    _edit(directory / "tokenizer_config.json", lambda config: _with_old_class(config, directory / "tokenizer.json"))
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
    old = _old_rope_names(config.get("rope_parameters") or {})
    found = config | old
    old |= {name: found[new] for name, new in _OLD_NAMES.get(config.get("model_type", ""), {}).items() if new in found}
    if isinstance(config.get("text_config"), dict):
        old["text_config"] = _with_old_names(config["text_config"])
    return config | old


def _old_rope_names(rope: dict[str, Any]) -> dict[str, Any]:
    """The rotary embedding as transformers 4 names it: its base, and what scales it."""
    local = rope.get("sliding_attention")
    if isinstance(local, dict) and isinstance(rope.get("full_attention"), dict):
        # Gemma 3: another base where attention slides.
        return _old_rope_names(rope["full_attention"]) | {"rope_local_base_freq": local.get("rope_theta")}
    old: dict[str, Any] = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in old}
    if scaling.get("rope_type", "default") != "default":
        old["rope_scaling"] = scaling
    return old


def _with_old_class(config: dict[str, Any], tokenizer: Path) -> dict[str, Any]:
    """The configuration of a tokenizer in words that both versions know."""
    config = dict(config)
    pre_tokenizer = json.loads(tokenizer.read_text("utf-8"))["pre_tokenizer"] if tokenizer.is_file() else None
    if (pre_tokenizer or {}).get("add_prefix_space"):
        # Where it is not said here, transformers 4 turns it off in what it reads there.
        config.setdefault("add_prefix_space", True)
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
