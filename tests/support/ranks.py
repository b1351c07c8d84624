"""What the ranks of tests share: multiprocessing's fork server imports this module once, and forks each rank from it.

A rank needs 0.02 s of CPU to start, but a short training in it was slow for two other reasons. It loaded 300 modules
(ZeRO: 1,000) that torch, pandas and DeepSpeed import late. And each `gc.collect` at the end of a training walked over
every module, which took a quarter (ZeRO-3: a third) of the training.
"""

import gc
from importlib import import_module

for name in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.runtime.zero.stage3",
    "pandas",
    "torch._inductor.compile_fx",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.trainer_pt_utils",
):
    import_module(name)
gc.collect()
# No module becomes garbage. Python's manual advises to freeze before a fork.
gc.freeze()
