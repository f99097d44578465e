"""What every test runs under: one thread, NaN in unwritten memory, GPU tests skipped by name."""

import os

import pytest
import torch

# Without a GPU the Triton kernels run under the interpreter. It must be chosen before Triton loads.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)  # the cores of a CI machine are shared; waiting threads cost 30 times more


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="gpu: no CUDA device here"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch fills every new tensor with NaN, also those allocated in C++: an output that a kernel
    forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def variant(request):
    """A compiled implementation, by parameter: cpu-base, cpu-avx2, cpu-avx512, cuda or triton."""
    from optest import Variant

    with Variant.activated(request.param) as variant:
        yield variant
