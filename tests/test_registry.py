import os
import subprocess
import sys

import pytest
import torch

import diwa
from diwa.ops import BackendError, gru_cell, registry


@pytest.fixture
def op(monkeypatch):
    """An operator whose CPU variant is missing and whose CUDA variant is there."""
    f32 = (torch.float32,)
    monkeypatch.setitem(
        registry._ops,
        "toy",
        (
            registry.Variant("cpu", ("cpu",), f32, "libdiwa_cpu.so: not built"),
            registry.Variant("cuda", ("cuda",), f32),
            registry.reference(),
        ),
    )
    monkeypatch.setattr(registry, "_said", set())
    return "toy"


def test_auto_falls_back_and_says_so_once(op, caplog):
    for _ in range(2):
        assert registry.choose(op, torch.zeros(1)) == "reference"
    assert [r.getMessage() for r in caplog.records] == [
        "diwa: toy runs on the reference backend (cpu: libdiwa_cpu.so: not built)"
    ]


def test_forced_raises_with_the_reason(op):
    with pytest.raises(BackendError, match="libdiwa_cpu.so: not built"):
        registry.choose(op, torch.zeros(1), "cpu")
    with pytest.raises(BackendError, match="runs on cuda tensors, not cpu"):
        registry.choose(op, torch.zeros(1), "cuda")
    with pytest.raises(BackendError, match="no 'triton' backend"):
        registry.choose(op, torch.zeros(1), "triton")
    with pytest.raises(BackendError, match="no backend takes int64"):
        registry.choose(op, torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown backend 'gpu'"):
        registry.choose(op, torch.zeros(1), "gpu")


def test_a_call_can_rule_a_backend_out(op, caplog):
    with pytest.raises(BackendError, match="H is odd"):
        registry.choose(op, torch.zeros(1), "reference", unfit={"reference": "H is odd"})


def test_use_backend_nests_and_restores(op):
    with diwa.use_backend("cpu"):
        with pytest.raises(BackendError):
            registry.choose(op, torch.zeros(1))
        with diwa.use_backend("reference"):
            assert registry.choose(op, torch.zeros(1)) == "reference"
        assert registry._forced == "cpu"
    assert registry._forced == "auto"
    with pytest.raises(ValueError, match="unknown backend"), diwa.use_backend("fast"):
        pass


def test_forced_dtype_is_refused():
    args = [torch.zeros(s, dtype=torch.double) for s in ((1, 2), (1, 3), (9, 2), (9, 3))]
    with pytest.raises(BackendError, match="takes float32, not float64"):
        gru_cell(*args, backend="cpu")
    assert gru_cell(*args).dtype == torch.double


@pytest.mark.parametrize("value, code", [("reference", 0), ("cuda", 1), ("nonsense", 1)])
def test_environment_variable(value, code):
    if value == "cuda" and torch.cuda.is_available():
        pytest.skip("the forced backend can run here")
    script = (
        "import torch, diwa.ops\n"
        "args = [torch.zeros(s) for s in ((1, 2), (1, 3), (9, 2), (9, 3))]\n"
        "diwa.ops.gru_cell(*args)"
    )
    env = {**os.environ, "DIWA_BACKEND": value}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert bool(done.returncode) == bool(code), done.stderr
    if code:
        assert "DIWA_BACKEND" in done.stderr or "gru_cell: backend 'cuda'" in done.stderr


def test_support_table_covers_every_variant():
    rows = [r for r in diwa.support_table() if r["op"] == "gru_cell"]
    assert [r["backend"] for r in rows] == ["cpu", "cuda", "triton", "reference"]
    assert all(bool(r["reason"]) != r["available"] for r in rows)
    assert sum("cpu" in str(r["chosen"]).split(", ") for r in rows) == 1
