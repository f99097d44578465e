"""Loads the compiled operator libraries; records instead of raising when one cannot be loaded."""

import importlib
from pathlib import Path

import torch  # first: its libtorch_cpu and libgomp must be the ones in the process

LOAD_ERRORS: dict[str, str] = {}
"""Library -> why it could not be loaded; shown by `diwa info` and when a backend is forced."""


def _load(folder: Path) -> None:
    # libdiwa_cpu.so first: it defines the operator schemas, the CUDA library only implements them.
    for name in ("libdiwa_cpu.so", "libdiwa_cuda.so"):
        if not (folder / name).exists():
            LOAD_ERRORS[name] = "not built"
        elif name != "libdiwa_cpu.so" and "libdiwa_cpu.so" in LOAD_ERRORS:
            LOAD_ERRORS[name] = "libdiwa_cpu.so is missing"
        else:
            try:
                torch.ops.load_library(folder / name)
            except OSError as error:  # its own message drops the reason: that is in __cause__
                LOAD_ERRORS[name] = str(error.__cause__ or error)
    try:
        importlib.import_module("diwa._C")
    except ImportError as error:
        LOAD_ERRORS["_C"] = str(error)


def cpu_isa() -> str | None:
    """Instruction set that the native operators use now; None without them."""
    if "_C" in LOAD_ERRORS:
        return None
    return importlib.import_module("diwa._C").cpu_isa()


_load(Path(__file__).parent)
