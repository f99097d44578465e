"""Builds the CPU library with address and undefined-behaviour checks and tests its operators.

    python tools/sanitize.py [pytest arguments]

A copy of the package with the checked library lies under build/sanitize; nothing else is touched.
Any finding ends the run with an error. Tests that only concern torch.compile are left out: they run
the same kernels, and tracing is slow under these checks.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from diwa_build import find_torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "sanitize"
STEMS = ("mish", "gru_cell", "denoise_chain", "chain_log_prob", "rssm_imagine", "rssm_observe")
LEFT_OUT = "not compile and not opcheck and not gradcheck and not doctest"


def build() -> Path:
    """Folder that holds the package with the checked library."""
    site, out = BUILD / "site", BUILD / "out"
    options = {
        "DIWA_SANITIZE": "address,undefined",
        "DIWA_TORCH_DIR": find_torch(),
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": out,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    BUILD.mkdir(parents=True, exist_ok=True)
    defined = [f"-D{key}={value}" for key, value in options.items()]
    subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(BUILD), *defined])
    jobs = os.environ.get("MAX_JOBS", "2")
    subprocess.check_call(["cmake", "--build", str(BUILD), "-j", jobs])
    shutil.rmtree(site, ignore_errors=True)
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "diwa", site / "diwa", ignore=skip)
    for library in out.glob("*.so"):
        shutil.copy2(library, site / "diwa")
    return site


def runtime(name: str) -> str:
    """Path of a sanitizer's runtime library, which must be loaded before all others."""
    return subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()


def main() -> int:
    """Build, test; the exit status of the tests."""
    site = build()
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch leave memory to the end of the process
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(site),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-k", LEFT_OUT, "-p", "no:cacheprovider"]
    tests = [str(ROOT / "tests" / f"test_{stem}.py") for stem in STEMS]
    return subprocess.call([*command, *tests, *sys.argv[1:]], cwd=site, env=environment)


if __name__ == "__main__":
    sys.exit(main())
