"""Compiles the Triton kernels ahead of time for an H100 (sm_90); needs no GPU.

    python tools/aot_check.py [STEM ...]

Prints registers, shared memory and spills of every launch in the `aot_examples()` of each module of
`diwa.kernels` (only the stems given, if any) and fails if one spills or uses local memory.
"""

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # an interpreted kernel cannot be compiled
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default so far; Triton 3.9 asks

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402

import diwa.kernels  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class FakeHopper:
    """Stands for a CUDA driver, so that `warmup` specialises as a launch on an H100 does."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")

    def is_active(self):
        return True


def resources(cubin):
    """(registers, stack bytes, local bytes) of a compiled kernel; spills are on the stack."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [CUOBJDUMP, "--dump-resource-usage", path]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", log)
    return tuple(int(n) for n in found.groups())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", help="modules of diwa.kernels; all if none is given")
    wanted = parser.parse_args().stems
    triton.runtime.driver.set_active(FakeHopper())
    found = sorted(m.name for m in pkgutil.iter_modules(diwa.kernels.__path__))
    unknown = set(wanted) - set(found)
    if unknown:
        raise SystemExit(f"no such kernel module: {', '.join(sorted(unknown))}")
    checked, bad = 0, 0
    for stem in wanted or found:
        module = importlib.import_module(f"diwa.kernels.{stem}")
        if not hasattr(module, "aot_examples"):
            print(f"{stem}: no aot_examples(), nothing to compile")
            continue
        for name, kernel, args, options in module.aot_examples():
            compiled = kernel.warmup(*args, **options, grid=(1,))
            registers, stack, local = resources(compiled.asm["cubin"])
            verdict = "SPILLS" if stack or local else "ok"
            print(
                f"{stem}:{name}: {registers} registers, {compiled.metadata.shared} B shared, "
                f"{stack} B stack, {local} B local: {verdict}"
            )
            checked += 1
            bad += verdict != "ok"
    print(f"{checked} launches compiled for sm_90, {bad} with spills")
    return 1 if bad or not checked else 0


if __name__ == "__main__":
    sys.exit(main())
