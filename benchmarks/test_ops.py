"""Operators against eager torch, one thread: `pytest benchmarks --benchmark-only`.

A case first checks that both give the same numbers; its time means nothing otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import diwa.ops


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def mish_pair(rows: int) -> tuple[Callable, Callable]:
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(0))
    return lambda: diwa.ops.mish(x), lambda: F.mish(x)


def gru_pair(rows: int) -> tuple[Callable, Callable]:
    cell = torch.nn.GRUCell(512, 512).requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    x, h = torch.randn(rows, 512, generator=g), torch.randn(rows, 512, generator=g)
    weights = (cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh)
    return lambda: diwa.ops.gru_cell(x, h, *weights), lambda: cell(x, h)


PAIRS = {"mish": mish_pair, "gru_cell": gru_pair}


@pytest.mark.benchmark(timer=time.process_time)
@pytest.mark.parametrize("variant", ["diwa", "eager"])
@pytest.mark.parametrize("rows", [64, 1024])
@pytest.mark.parametrize("op", PAIRS)
def test_op(benchmark, op, rows, variant):
    ours, eager = PAIRS[op](rows)
    torch.testing.assert_close(ours(), eager(), rtol=1e-5, atol=1e-5)
    benchmark.group = f"{op} B={rows}"
    benchmark.extra_info.update(torch=torch.__version__, threads=1)
    benchmark(ours if variant == "diwa" else eager)
