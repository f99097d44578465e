"""Cases of the suite under pytest-benchmark: `pytest benchmarks --benchmark-only`.

The same inputs, peers and correctness gates as `diwa bench`, for pytest-benchmark's own tables and
its comparison of saved runs. Ratios on a busy machine are better taken by `diwa bench`, which
interleaves.
"""

from __future__ import annotations

import importlib
import time

import pytest
import torch

from diwa import bench

bench.suite()
harness = importlib.import_module("diwa.benchmarks.harness")
operators = importlib.import_module("diwa.benchmarks.operators")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("form", ["diwa", "original"])
@pytest.mark.parametrize("entry", [e for e in operators.entries() if e.quick], ids=lambda e: e.name)
def test_op(benchmark, entry, form):
    try:
        operators.check_native(entry.op)
        case = entry.build(False)
    except harness.Skip as reason:
        pytest.skip(str(reason))
    error, _, bound = case.errors()
    assert error <= bound
    benchmark.group = entry.name
    benchmark.extra_info.update(torch=torch.__version__, threads=1, error_vs_fp64=error)
    with torch.set_grad_enabled(case.grad):
        benchmark(case.ours if form == "diwa" else case.peers["original"])
