"""transformers' tokenizers without torch, which takes more CPU to load than all else that prepares a small corpus."""

import contextlib
import importlib
import sys
from importlib.util import find_spec
from types import ModuleType
from typing import Any

# It imports torch at its top and uses it inside functions; configurations, and so AutoTokenizer, import it.
_USES_TORCH = "transformers.modeling_rope_utils"


class _LateTorch(ModuleType):
    """Stands for torch in one module, and gives way to it at the first use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get("torch") is self:
            del sys.modules["torch"]
        torch = importlib.import_module("torch")
        if _USES_TORCH in sys.modules:
            vars(sys.modules[_USES_TORCH])["torch"] = torch
        return getattr(torch, name)


def import_without_torch() -> None:
    """Import the module of transformers that loads torch, without torch; do nothing where torch is loaded already.

    torch is loaded when something uses it. If a version of transformers needs torch for the import, the module is not
    imported here, and AutoTokenizer loads torch.
    """
    if "torch" in sys.modules or (spec := find_spec("torch")) is None:
        return
    import transformers.utils  # noqa: F401  # not while torch is replaced

    late = _LateTorch("torch")
    late.__spec__ = spec
    sys.modules["torch"] = late
    try:
        with contextlib.suppress(ImportError):
            importlib.import_module(_USES_TORCH)
    finally:
        if sys.modules.get("torch") is late:
            del sys.modules["torch"]
