import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diwa

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(diwa.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("libdiwa_*.so"))
OBJECTS = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/diwa_cpu_*.dir/csrc/cpu/*.o"))


def output(*command, **kwargs):
    return subprocess.run(command, check=True, capture_output=True, text=True, **kwargs).stdout


def has_nvcc():
    return shutil.which("nvcc") or os.path.exists("/usr/local/cuda/bin/nvcc")


def test_what_should_be_built_is_there():
    """Import never fails, so a broken build would show only as slowness: it is asserted here."""
    wrong = dict(diwa.LOAD_ERRORS)
    if not has_nvcc() or os.environ.get("DIWA_CUDA", "").upper() == "OFF":
        wrong.pop("libdiwa_cuda.so", None)
    assert not wrong


def test_import_is_light():
    """Nothing beyond what torch itself loads, and no compiler."""
    script = (
        "import sys, torch; before = set(sys.modules); import diwa, diwa.ops, diwa.nn\n"
        "heavy = {'gymnasium', 'pybullet', 'triton', 'matplotlib', 'imageio', 'tyro', 'rich',"
        " 'diwa.kernels'}\n"
        "print(sorted(heavy & (set(sys.modules) - before)))"
    )
    assert output(sys.executable, "-c", script).strip() == "[]"


def test_without_libraries_the_reference_runs(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "diwa", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    script = (
        "import torch, diwa, diwa.ops\n"
        "args = [torch.ones(s) for s in ((1, 2), (1, 3), (9, 2), (9, 3))]\n"
        "for _ in range(2): out = diwa.ops.gru_cell(*args)\n"
        "print(diwa.LOAD_ERRORS['libdiwa_cpu.so'], torch.equal(out, torch.gru_cell(*args)))"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.stdout.startswith("not built"), done.stderr
    said = "diwa: gru_cell runs on the reference backend (cpu: libdiwa_cpu.so: not built)"
    assert done.stderr.splitlines() == [said]


def test_native_module_switches_instruction_sets():
    native = pytest.importorskip("diwa._C")
    before = native.cpu_isa()
    try:
        native.set_cpu_isa("base")
        assert native.cpu_isa() == "base"
    finally:
        native.set_cpu_isa(before)
    with pytest.raises(ValueError, match="base, avx2, avx512 or avx512_bf16"):
        native.set_cpu_isa("sse9")
    assert native.build_info()["cxx"] >= 202002


def test_environment_lowers_the_instruction_set():
    pytest.importorskip("diwa._C")
    script = "import diwa._C; print(diwa._C.cpu_isa())"
    env = {**os.environ, "DIWA_CPU": "base"}
    assert output(sys.executable, "-c", script, env=env).strip() == "base"


@pytest.mark.skipif(not OBJECTS, reason="no object files: not built in this checkout")
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: f"{p.parts[-4]}-{p.stem}")
def test_kernel_objects_have_no_weak_symbols(path):
    """A weak function compiled for AVX-512 may be the copy the linker keeps for all processors."""
    symbols = output("nm", "-C", path).splitlines()
    assert not [s for s in symbols if re.search(r" [WVu] ", s)]


@pytest.mark.parametrize("path", LIBRARIES, ids=lambda p: p.stem)
def test_libraries_need_only_the_stable_abi(path):
    wanted = output("nm", "-DC", "--undefined-only", path)
    assert "torch" in wanted
    assert not re.search(r"\b(at|c10)::", wanted)
    assert not re.search(r"\bPy[A-Z_]", wanted)
    dynamic = output("readelf", "-d", path)
    assert "RUNPATH" not in dynamic and "RPATH" not in dynamic
    assert "libcudart" not in dynamic and "libtorch_cuda" not in dynamic


@pytest.mark.parametrize(
    "path", sorted([*(ROOT / "csrc/cpu").glob("*"), *(ROOT / "csrc/cuda").glob("*")]), ids=str
)
def test_kernel_files_know_nothing_of_torch(path):
    includes = re.findall(r"#include .*", path.read_text())
    assert not [i for i in includes if "torch" in i or "ATen" in i or "binding" in i]


def test_new_memory_is_poisoned():
    """The other tests rely on it: also memory allocated by the operators is NaN until written."""
    assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
