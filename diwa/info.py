"""What a bug report needs: versions, device, and which operator runs on which backend."""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

OPTIONAL = (
    "triton",
    "gymnasium",
    "pybullet",
    "tensorboard",
    "matplotlib",
    "imageio",
    "pyarrow",
    "av",
)


def versions(device: str = "cpu") -> dict[str, Any]:
    """Versions, commit and machine: what a result or a bug report needs to name."""
    import diwa

    return {
        "diwa": diwa.__version__,
        "commit": _commit(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
    }


def device_name(device: str) -> str:
    """Device and its model, e.g. `cuda (NVIDIA H100)`."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({_cpu_model()}, {os.cpu_count()} cores)"


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()


def _commit() -> str | None:
    """Commit of the source tree diwa is imported from; None for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(arguments: Sequence[str]) -> int:
    """Run `diwa info`."""
    argparse.ArgumentParser(
        "diwa info", description="Versions, devices and operators, to be pasted in bug reports."
    ).parse_args(arguments)
    print(show())
    return 0


def show() -> str:
    """Text of `diwa info`: versions, devices, compiled libraries, operators x backends."""
    from . import LOAD_ERRORS, ops

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = versions(device)
    lines = [f"{name:<11} {value}" for name, value in found.items()]
    lines += [f"{name:<11} {_module_version(name)}" for name in OPTIONAL]
    lines += ["", "compiled libraries"]
    lines += [f"  {name}: {why}" for name, why in LOAD_ERRORS.items()] or ["  all loaded"]
    lines += ["", f"  {'operator':<16} {'backend':<10} {'chosen for':<10} {'dtypes or why not'}"]
    for row in ops.support_table():
        note = row["dtypes"] if row["available"] else f"not here: {row['reason']}"
        lines.append(f"  {row['op']:<16} {row['backend']:<10} {row['chosen'] or '-':<10} {note}")
    report = " | ".join(f"{name} {value}" for name, value in found.items())
    missing = "; ".join(f"{name}: {why}" for name, why in LOAD_ERRORS.items()) or "none"
    lines += ["", "For a bug report:", f"{report} | load errors: {missing}"]
    return "\n".join(lines)


def _module_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
