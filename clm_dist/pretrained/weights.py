"""Weights of a model, from its directory or from the Hub: all of them as they were written, or an error.

transformers warns about tensors that are missing, and goes on with random ones. Here that is an error, because every
number of such a model is wrong.
"""

import contextlib
import logging
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import nn

from clm_dist.errors import ConfigError, first_line
from clm_dist.files.hub_errors import describe_hub_error, downloading
from clm_dist.files.lfs import is_lfs_pointer
from clm_dist.pretrained.passing import raise_if_passing

logger = logging.getLogger(__name__)

_PREFIXES = {
    "_orig_mod.": "as a model that torch.compile has wrapped writes them",
    "module.": "as a model that DistributedDataParallel or DeepSpeed has wrapped writes them",
    "_forward_module.": "as Lightning Fabric writes them",
    "base_model.model.": "as PEFT writes them",
    "transformer.": "",
    "model.": "",
}
_ADAPTER = (
    "it is an adapter of PEFT, not a model; merge it first, with `AutoPeftModelForCausalLM.from_pretrained(...)"
    ".merge_and_unload().save_pretrained(...)` of the package peft, and name what that writes"
)
_SHOWN_KEYS = 3
_BUFFERS = re.compile(r"\.(attn|attention)\.(masked_bias|bias)$|^cls\.seq_relationship\.")
"""Masks that older versions of transformers saved as if they were weights, and BERT's head for pairs of sentences."""


def load_pretrained(path: Path | str, *, field: str | None = None, **options: Any) -> Any:
    """A causal language model with all of its weights, on the CPU.

    Args:
        path: directory or Hub id.
        field: field of the job that named it, for the message.
        options: of `from_pretrained`; without `dtype` the weights keep the precision they were written in.

    Raises:
        ConfigError: the model is not there or damaged, or lacks weights, or has others than its configuration says, or
            one that is not finite; or it is an adapter, quantised, or needs code of its own.
        HubError: the Hub is away.
    """
    model = _load(path, field, {"dtype": "auto"} | options)
    broken = next((name for name, weight in model.named_parameters() if not weight.isfinite().all()), None)
    if broken is not None:
        raise _wrong(path, f"{broken} has values that are not finite; get the model again, or take another", field)
    return model


def check_pretrained(path: Path, *, field: str | None = None, **options: Any) -> None:
    """Raise ConfigError where `load_pretrained` would refuse a directory; reads names and shapes, no weights.

    So it does not see weights that are not finite.
    """
    _load(path, field, options | {"device_map": "meta"})


def load_pretrained_config(path: Path | str, *, revision: str | None = None, field: str | None = None) -> Any:
    """The transformers configuration of a model; raises what `load_pretrained` raises."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = downloading(AutoConfig.from_pretrained, path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise _not_loaded(path, error, field) from None
    _refuse_other_kinds(config, path, field)
    return config


def _refuse_other_kinds(config: Any, path: Path | str, field: str | None) -> None:
    """Raise ConfigError for weights of a kind that cannot be trained: an adapter, or a quantised model."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        method = getattr(method, "value", method)
        raise _wrong(
            path,
            f"it is quantised ({method}), and quantised weights can be neither trained nor evaluated exactly; take the "
            "model that it was made from",
            field,
        )
    if (Path(path) / "adapter_config.json").is_file():
        raise _wrong(path, _ADAPTER, field)


def _load(path: Path | str, field: str | None, options: dict[str, Any]) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if "config" not in options:
        options["config"] = load_pretrained_config(path, revision=options.get("revision"), field=field)
    try:
        model, info = downloading(
            AutoModelForCausalLM.from_pretrained,
            path,
            output_loading_info=True,
            # So that the shapes are listed; they are refused below.
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
            **options,
        )
    except UnpicklingError:
        files = ", ".join(map(str, sorted(Path(path).glob("*.bin")))) or "its weights"
        problem = f"{files} cannot be read as tensors alone, and anything else in it could run code"
        raise _wrong(path, f"{problem}; get the model as *.safetensors", field) from None
    except (SafetensorError, RuntimeError, EOFError) as error:
        raise_if_passing(error, f"the model {path}")
        raise _wrong(path, f"{_unread(path, error)}; get the model again", field) from error
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise _not_loaded(path, error, field) from None
    _check_tensors(path, model, info, field)
    return model


def _not_loaded(path: Path | str, error: Exception, field: str | None) -> Exception:
    raise_if_passing(error, f"the model {path}")
    directory = Path(path)
    with contextlib.suppress(OSError):
        if directory.is_dir():
            if (
                isinstance(error, OSError)
                and not any(directory.glob("*.safetensors"))
                and not any(directory.glob("*.bin"))
            ):
                gguf = "; GGUF files are not supported, take the model that they were made from"
                return _wrong(
                    path,
                    f"it holds no weights (*.safetensors, *.bin){gguf if any(directory.glob('*.gguf')) else ''}",
                    field,
                )
            return _wrong(path, _own_code(error) or f"{_unread(path, error)}; get the model again", field)
    if code := _own_code(error):
        return _wrong(path, code, field)
    if isinstance(error, (OSError, ValueError)):
        named = f"{field} {path}" if field else str(path)
        return describe_hub_error(
            error,
            f"{named} is neither a model's directory nor reachable on the Hub: {first_line(error)}; check the "
            "spelling, your network and, for a gated model, `hf auth login`",
            field=field,
        )
    return _wrong(path, first_line(error), field)


def _own_code(error: Exception) -> str | None:
    if "trust_remote_code" not in str(error):
        return None
    return "it needs code of its own, which clm-dist does not run; take a model of a type that transformers has"


def _check_tensors(path: Path | str, model: nn.Module, info: dict[str, Any], field: str | None) -> None:
    """Raise ConfigError where the tensors of the files are not those of the model; tell of parts that it has not."""
    if getattr(model, "_hf_peft_config_loaded", False):
        # With peft installed, transformers loads the model that the adapter names, and puts it on top.
        raise _wrong(path, _ADAPTER, field)
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if info["mismatched_keys"]:
        name, there, wanted = min(info["mismatched_keys"])
        raise _wrong(
            path,
            f"{name} is {_shape(there)} in its files, and {_shape(wanted)} by its config.json; put the right values "
            "into config.json, or get the model again",
            field,
        )
    if errors := info.get("error_msgs") or info.get("conversion_errors"):
        raise _wrong(path, first_line(errors[0] if isinstance(errors, list) else next(iter(errors.values()))), field)
    if missing:
        raise _wrong(path, f"its files lack {_listed(missing)}; {_mend(path, missing, unexpected)}", field)
    unexpected = [key for key in unexpected if not _BUFFERS.search(key)]
    inner = [key for key in unexpected if _is_inner(model, key)]
    if inner:
        raise _wrong(
            path,
            f"its files hold {_listed(inner)}, which the model of its config.json does not have; put the right "
            "values into config.json (the number of layers, biases), or get the model again",
            field,
        )
    if unexpected:
        logger.warning(
            "%s: its files also hold %s, which the language model does not have; they are not used",
            path,
            _listed(unexpected),
        )


def _mend(path: Path | str, missing: list[str], unexpected: list[str]) -> str:
    """What to do about tensors that are missing, from the names of those that are there instead."""
    lacking = set(missing)
    for prefix, origin in _PREFIXES.items():
        bare = {key.removeprefix(prefix) for key in unexpected if key.startswith(prefix)}
        if bare and len(bare & lacking) == len(bare):
            begin = f"the names in them begin with {prefix}{', ' if origin else ''}{origin}"
            if not (Path(path) / "model.safetensors").is_file():
                return f"{begin}; write them again without"
            code = (
                "from safetensors.torch import load_file, save_file; t = load_file('model.safetensors'); "
                f"save_file({{k.removeprefix('{prefix}'): v for k, v in t.items()}}, 'model.safetensors', "
                "{'format': 'pt'})"
            )
            return f'{begin}. Write the file again without: cd {shlex.quote(str(path))} && python -c "{code}"'
    if "model.shared.weight" in unexpected:
        return "it is an encoder with a decoder, whose embedding is model.shared.weight; take a decoder such as gpt2"
    if missing == ["lm_head.weight"]:
        return (
            "if the model was trained with the embedding as its head, set tie_word_embeddings to true in its "
            "config.json; otherwise get the model again"
        )
    if unexpected:
        return f"they hold {_listed(unexpected)} instead; get the model that its config.json describes"
    return "get the model again, or put the right values into its config.json"


def _is_inner(model: nn.Module, key: str) -> bool:
    """Whether a tensor belongs into a layer, or a list of layers, that the model has, and not beside them."""
    base = getattr(model, getattr(model, "base_model_prefix", ""), model)
    module: Any = model
    for part in key.split(".")[:-1]:
        child = module._modules.get(part)
        if child is None:
            break
        module = child
    return module is not model and module is not base


def _unread(path: Path | str, error: Exception) -> str:
    """The file of a directory that cannot be read, and why."""
    from safetensors import SafetensorError, safe_open

    files = sorted(Path(path).glob("*.safetensors"))
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as damage:
            if is_lfs_pointer(file):
                return f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull`"
            return f"{file} is damaged ({first_line(damage)})"
    pickled = [] if files else sorted(Path(path).glob("*.bin"))
    return f"{', '.join(map(str, pickled))} cannot be read ({first_line(error)})" if pickled else first_line(error)


def _listed(keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else ""
    return f"{', '.join(keys[:_SHOWN_KEYS])}{more}"


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))


def _wrong(path: Path | str, problem: str, field: str | None) -> ConfigError:
    return ConfigError(f"{field or 'the model'} {path}: {problem}", field=field)
