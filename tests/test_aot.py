import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def tool(name, *args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / name, *args], env=env, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


def test_triton_kernels_compile_for_hopper_without_spills():
    pytest.importorskip("triton")
    code, output = tool("aot_check.py")
    assert code == 0, output
    for path in (ROOT / "kernels").glob("*.py"):
        if "@triton.jit" in path.read_text() and path.stem != "common":
            assert f"{path.stem}:" in output, f"{path.stem} has no aot_examples()"


def test_cuda_kernels_compile_without_spills():
    code, output = tool("nvcc_check.py")
    if "no nvcc found" in output:
        pytest.skip("no nvcc here")
    assert code == 0, output


@pytest.mark.parametrize("name", ["aot_check.py", "nvcc_check.py"])
def test_unknown_stem_fails(name):
    if name == "aot_check.py":
        pytest.importorskip("triton")
    code, _ = tool(name, "no_such_kernel")
    assert code != 0
