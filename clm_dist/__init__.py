"""Fine-tune a causal language model on a cluster, and trust what it says.

The Python interface is `clm_dist.interface`; its names are here too, and load when they are used.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clm_dist.interface import Run, evaluate, load_job, prepare, run

__version__ = "0.1.0"
__all__ = ["Run", "evaluate", "load_job", "prepare", "run"]
_ROOMS = ("prepare", "run")
"""Names of the interface that are also modules of the package: they let themselves be called."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'clm_dist' has no attribute {name!r}")
    import importlib

    if name in _ROOMS:
        return importlib.import_module(f"clm_dist.{name}")
    return getattr(importlib.import_module("clm_dist.interface"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Room(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from clm_dist import interface

        return getattr(interface, self.__name__.rpartition(".")[2])(*arguments, **options)

    @property
    def __signature__(self) -> Any:
        """What an editor or a notebook shows of it."""
        import inspect

        from clm_dist import interface

        return inspect.signature(getattr(interface, self.__name__.rpartition(".")[2]))

    def __reduce__(self) -> Any:
        """By its name, so that another process can be given it."""
        import importlib

        return importlib.import_module, (self.__name__,)


def make_callable(name: str) -> None:
    """Let a module of the package be called as the function of its name in `clm_dist.interface`."""
    sys.modules[name].__class__ = _Room
