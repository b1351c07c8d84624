"""Whether the torch of this machine can use its GPUs; imports neither torch nor Ray, which take seconds."""

import ctypes
import importlib.util
import os
import runpy
from pathlib import Path


def find_problem() -> str | None:
    """What keeps this node's torch from its GPUs; None where nothing does. Loads no torch, which takes seconds."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return "torch is not installed"
    built = runpy.run_path(str(Path(found.origin).parent / "version.py"))
    torch = f"torch {built['__version__']}"
    if built.get("hip"):
        return None
    if not built.get("cuda"):
        return f"{torch} has no CUDA"
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return f"{torch} needs NVIDIA's driver, and libcuda.so.1 is not there"
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    if code := driver.cuInit(0):
        return f"NVIDIA's driver does not start (cuInit returns {code})"
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))
    # A driver runs programs of every release of its major version.
    if version.value // 1000 < int(built["cuda"].partition(".")[0]):
        runs = f"{version.value // 1000}.{version.value % 1000 // 10}"
        return f"{torch} needs a driver for CUDA {built['cuda']}, and this one is for {runs}"
    return None
