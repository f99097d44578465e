"""Builds the native part with CMake; everything else about the package is in pyproject.toml.

Environment: DIWA_CUDA=AUTO|ON|OFF, DIWA_CUDA_ARCH (CMake syntax), DIWA_TORCH_DIR, DIWA_BUILD_TYPE,
MAX_JOBS, CUDA_HOME.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))
from diwa_build import find_torch  # noqa: E402

VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "diwa/__init__.py").read_text()).group(1)


def say(message):
    print(f"diwa: {message}", file=sys.stderr)


def drop_if_stale(build, args):
    """Empties a build folder made with another nvcc: CMake would start over and forget `args`."""
    cache = build / "CMakeCache.txt"
    wanted = [a for a in args if a.startswith("-DCMAKE_CUDA_COMPILER=")]
    if wanted and cache.exists():
        before = re.search(r"^CMAKE_CUDA_COMPILER:\w+=(.+)$", cache.read_text(), re.M)
        if before and before.group(1) != wanted[0].split("=", 1)[1]:
            shutil.rmtree(build)


def find_nvcc():
    """Path of nvcc, or None: CUDA_HOME, then PATH, then the usual place."""
    for folder in (os.environ.get("CUDA_HOME"), None, "/usr/local/cuda"):
        found = shutil.which("nvcc", path=os.path.join(folder, "bin") if folder else None)
        if found:
            return found
    return None


class CMakeExtension(Extension):
    """One file that CMake makes: diwa._C (pybind11) or a plain libdiwa_*.so without Python."""

    def __init__(self, name, optional=False):
        super().__init__(name, sources=[], optional=optional)


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname):
        folder, leaf = os.path.split(super().get_ext_filename(fullname))
        return os.path.join(folder, leaf.split(".")[0] + ".so" if leaf.startswith("lib") else leaf)

    def cmake_args(self, out):
        torch_dir = find_torch()
        if torch_dir is None:
            raise SystemExit(
                "diwa: no torch to build against; `pip install torch` first, or set DIWA_TORCH_DIR"
            )
        build_type = "Debug" if self.debug else os.environ.get("DIWA_BUILD_TYPE", "Release")
        args = [
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DDIWA_TORCH_DIR={torch_dir}",
            f"-DCMAKE_BUILD_TYPE={build_type}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}",
        ]
        if importlib.util.find_spec("pybind11"):
            import pybind11

            args += ["-DDIWA_MODULE=ON", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        else:
            say("pybind11 is not installed: building without diwa._C (build_info, set_cpu_isa)")
            args.append("-DDIWA_MODULE=OFF")
        cuda, nvcc = os.environ.get("DIWA_CUDA", "AUTO").upper(), find_nvcc()
        if cuda == "ON" and not nvcc:
            raise SystemExit("diwa: DIWA_CUDA=ON, but there is no nvcc; set CUDA_HOME")
        if cuda == "AUTO" and not nvcc:
            say("no nvcc found, building for CPU only (set CUDA_HOME to build the CUDA kernels)")
        if cuda != "OFF" and nvcc:
            args += ["-DDIWA_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
            if os.environ.get("DIWA_CUDA_ARCH"):
                args.append(f"-DCMAKE_CUDA_ARCHITECTURES={os.environ['DIWA_CUDA_ARCH']}")
        else:
            args.append("-DDIWA_CUDA=OFF")
        ninja = shutil.which("ninja")
        if ninja:  # given each time: a path cached from a deleted build environment is dead
            args += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        return args

    def run(self):
        # A fixed folder: setuptools' own is a fresh temporary one in editable builds.
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        out = build / "out"
        args = self.cmake_args(out)
        drop_if_stale(build, args)
        shutil.rmtree(out, ignore_errors=True)  # a library switched off since must not survive
        build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        subprocess.check_call(["cmake", "-S", str(ROOT), "-B", str(build), *args])
        subprocess.check_call(["cmake", "--build", str(build), "-j", jobs])
        built = {p.name.split(".")[0]: p for p in out.glob("*.so")}
        for ext in self.extensions:
            leaf = ext.name.rsplit(".", 1)[-1]
            target = Path(self.get_ext_fullpath(ext.name))  # in the source tree when editable
            if leaf not in built:
                if not ext.optional:
                    raise SystemExit(f"diwa: {leaf} was not built")
                target.unlink(missing_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Replaced, not overwritten: a running process may have the old file mapped.
            shutil.copy2(built[leaf], f"{target}.new")
            os.replace(f"{target}.new", target)

    def get_outputs(self):
        return [p for p in super().get_outputs() if os.path.exists(p)]

    def get_output_mapping(self):
        return {k: v for k, v in super().get_output_mapping().items() if os.path.exists(k)}


setup(
    version=VERSION,
    packages=[
        *find_packages(include=["diwa", "diwa.*"]),
        "diwa.kernels",
        "diwa.benchmarks",
        "diwa.benchmarks.peers",
    ],
    package_dir={"diwa": "diwa", "diwa.kernels": "kernels", "diwa.benchmarks": "benchmarks"},
    package_data={"diwa": ["py.typed", "*.pyi"]},
    ext_modules=[
        CMakeExtension("diwa.libdiwa_cpu"),
        CMakeExtension("diwa.libdiwa_cuda", optional=True),
        CMakeExtension("diwa._C", optional=True),
    ],
    cmdclass={"build_ext": CMakeBuild},
)
