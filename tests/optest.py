"""What operator tests share: the list of variants and the rule by which an error is judged."""

import importlib.util
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

import diwa

GPU = torch.cuda.is_available()
HALVES = (torch.bfloat16, torch.float16)
CPU_ISAS = [f"cpu-{isa}" for isa in ("base", "avx2", "avx512", "avx512_bf16")]


@dataclass(frozen=True)
class Variant:
    """A backend, and the device its tensors live on in this run."""

    backend: str
    device: str

    @classmethod
    @contextmanager
    def activated(cls, name):
        """Skips by name where `name` cannot run; a library that should be there but is not fails in
        test_build.py."""
        backend, _, isa = name.partition("-")
        if backend == "triton" and importlib.util.find_spec("triton") is None:
            pytest.skip("triton is not installed")
        library = f"libdiwa_{backend}.so"
        if library in diwa.LOAD_ERRORS:
            pytest.skip(f"{library}: {diwa.LOAD_ERRORS[library]}")
        if not isa:
            yield cls(backend, "cuda" if GPU else "cpu")
            return
        native = pytest.importorskip("diwa._C")
        before = native.cpu_isa()
        try:
            native.set_cpu_isa(isa)
        except ValueError:
            pytest.skip(f"this processor has no {isa}")
        yield cls(backend, "cpu")
        native.set_cpu_isa(before)


def variants(*gpu_dtypes):
    """Parameters (variant, dtype): the CPU paths in float32, CUDA and Triton in float32 and
    `gpu_dtypes`. Use with `indirect=["variant"]`."""
    cases = [(f"cpu-{isa}", torch.float32, ()) for isa in ("base", "avx2", "avx512")]
    for dtype in (torch.float32, *gpu_dtypes):
        cases.append(("cuda", dtype, pytest.mark.gpu))
        cases.append(("triton", dtype, pytest.mark.gpu if GPU else ()))
    return [
        pytest.param(name, dtype, marks=marks, id=f"{name}-{str(dtype).removeprefix('torch.')}")
        for name, dtype, marks in cases
    ]


def assert_accurate(name, actual, eager, exact):
    """The error against float64 is at most twice that of eager torch in the same dtype.

    Floor: four units in the last place of the largest value, because in a tensor of a few elements
    eager torch can be exact by luck.
    """
    assert actual.dtype == eager.dtype and actual.shape == exact.shape, name
    if not exact.numel():
        return
    exact = exact.to(actual.device)
    assert not actual.isnan().any(), f"{name}: NaN"
    error = (actual.double() - exact).abs().max().item()
    allowed = 2 * (eager.double() - exact).abs().max().item()
    floor = 4 * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    assert error <= allowed + floor, f"{name}: error {error:.2e} > {allowed:.2e} + {floor:.2e}"
