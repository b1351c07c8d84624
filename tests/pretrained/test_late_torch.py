"""Tokenizers are loaded without torch, and what needs torch afterwards has it."""

import subprocess
import sys

_LOADED = """
import sys
from clm_dist.pretrained.late_torch import import_without_torch
import_without_torch()
from transformers import AutoTokenizer
assert "torch" not in sys.modules
import transformers.modeling_rope_utils as rope
from transformers import LlamaConfig
config = LlamaConfig(hidden_size=8, num_attention_heads=2, rope_parameters={"rope_type": "linear", "factor": 2.0})
"""
_USED = """
values, _ = rope.ROPE_INIT_FUNCTIONS["linear"](config, "cpu")
import torch
assert rope.torch is torch is sys.modules["torch"]
assert values.tolist() == torch.tensor([0.5, 0.005]).tolist(), values
"""
_MODEL = """
from transformers import LlamaForCausalLM
import torch
config.vocab_size, config.num_hidden_layers, config.intermediate_size = 8, 1, 8
assert LlamaForCausalLM(config)(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)
"""


def ran(code: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_functions_that_use_torch_load_it() -> None:
    ran(_LOADED + _USED)


def test_a_model_is_built_after_a_tokenizer() -> None:
    ran(_LOADED + _MODEL)


def test_torch_that_is_loaded_already_stays() -> None:
    ran("import torch\n" + _LOADED.replace('assert "torch" not in sys.modules\n', "") + _USED)


def test_a_module_that_needs_torch_for_its_import_is_left_to_transformers() -> None:
    code = """
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

class Newer(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "transformers.modeling_rope_utils" else None

    def exec_module(self, module):
        import torch.nn
        module.linear = torch.nn.Linear

sys.meta_path.insert(0, Newer())
from clm_dist.pretrained.late_torch import import_without_torch
import_without_torch()
assert not {"torch", "torch.nn", "transformers.modeling_rope_utils"} & sys.modules.keys()
import transformers.modeling_rope_utils as rope
import torch
assert rope.linear is torch.nn.Linear is sys.modules["torch.nn"].Linear
"""
    ran(code)
