"""Compiles every CUDA kernel file for sm_80 and sm_90; needs nvcc but no GPU and no torch.

    python tools/nvcc_check.py [STEM ...]

Prints registers, stack and spills of every kernel as ptxas reports them and fails if one spills or
uses local memory (a stack frame).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("80", "90")
REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)


def find_nvcc():
    for folder in (os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"):
        found = shutil.which("nvcc", path=os.path.join(folder, "bin") if folder else None)
        if found:
            return found
    raise SystemExit("no nvcc found; set CUDA_HOME")


def demangle(name):
    tool = shutil.which("c++filt")
    if not tool:
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True, check=True).stdout.strip()
    text = text.replace("(anonymous namespace)::", "").removeprefix("void ")
    return text.split("(")[0].replace("diwa::cuda::", "")


def check(nvcc, source, arch, folder):
    """Number of kernels in `source` and how many of them spill."""
    command = [
        nvcc,
        "-std=c++17",
        "-O3",
        "-Xptxas=-v",
        f"-gencode=arch=compute_{arch},code=sm_{arch}",
    ]
    command += ["-I", ROOT / "csrc/include", "-cubin", source, "-o", Path(folder) / "kernel.cubin"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{source.name} does not compile for sm_{arch}:\n{done.stderr}")
    kernels = list(REPORT.finditer(done.stdout + done.stderr))
    bad = 0
    for k in kernels:
        spills = int(k["stores"]) + int(k["loads"])
        verdict = "SPILLS" if spills or int(k["stack"]) else "ok"
        bad += verdict != "ok"
        print(
            f"{source.stem}:{demangle(k['name'])} {k['arch']}: {k['registers']} registers, "
            f"{k['stack']} B stack, {spills} B spills: {verdict}"
        )
    return len(kernels), bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stems", nargs="*", help="files of csrc/cuda; all if none is given")
    stems = parser.parse_args().stems or sorted(p.stem for p in (ROOT / "csrc/cuda").glob("*.cu"))
    nvcc, total, bad = find_nvcc(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for stem in stems:
            for arch in ARCHITECTURES:
                n, b = check(nvcc, ROOT / "csrc/cuda" / f"{stem}.cu", arch, folder)
                if not n:
                    raise SystemExit(f"{stem}: no kernel found in ptxas' report for sm_{arch}")
                total, bad = total + n, bad + b
    print(f"{total} kernels compiled, {bad} with spills or local memory")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
