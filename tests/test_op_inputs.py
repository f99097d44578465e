"""Fuzz of every operator's input checks: whatever it is given, it returns a correct result or
raises a Python exception that says why. It never crashes and never answers with something else.

Each operator is a row of the table below; the fuzz changes one argument at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import diwa.ops
from diwa.ops import reference

REASONS = (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError)
"""What an operator may raise; BackendError is a RuntimeError. OverflowError and the like are not
reasons, and a failed assertion is a defect."""
B, H, IN = 3, 10, 7


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def rand(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Op:
    """An operator with valid arguments.

    Attributes:
        run: called with the tensors by name.
        expected: the same from the specification.
        tensors: makes valid arguments, name -> tensor.
        differentiable: names of tensors whose gradients are checked as well.
    """

    run: Callable
    expected: Callable
    tensors: Callable[[], dict]


OPS = {
    "gru_cell": Op(
        diwa.ops.gru_cell,
        reference.gru_cell,
        lambda: {
            "x": randn(B, IN),
            "h": randn(B, H),
            "w_ih": randn(3 * H, IN),
            "w_hh": randn(3 * H, H),
            "b_ih": randn(3 * H),
            "b_hh": randn(3 * H),
        },
    ),
    "mish": Op(diwa.ops.mish, reference.mish, lambda: {"x": randn(B, H)}),
}


def _add(name, run, tensors):
    """An operator of a later version; its specification has the same name and arguments."""
    if hasattr(diwa.ops, name) and hasattr(reference, name):
        OPS[name] = Op(run(getattr(diwa.ops, name)), run(getattr(reference, name)), tensors)


T, S, C = 4, 3, 5
_add(
    "onehot_st",
    lambda f: f,
    lambda: {"logits": randn(B, S, C), "uniform": rand(B, S)},
)
_add(
    "balanced_kl",
    lambda f: lambda **t: f(balance=0.8, **t),
    lambda: {"post": randn(B, S, C), "prior": randn(B, S, C)},
)
_add(
    "gae",
    lambda f: lambda **t: f(gamma=0.9, gae_lambda=0.8, **t),
    lambda: {
        "reward": randn(T, B),
        "value": randn(T, B),
        "next_value": randn(T, B),
        "terminated": (rand(T, B) < 0.2).float(),
        "done": (rand(T, B) < 0.3).float(),
    },
)
NAMES = [(op, name) for op, entry in OPS.items() for name in entry.tensors()]
each_argument = pytest.mark.parametrize(("op", "name"), NAMES, ids=lambda v: v)


def outcome(op, tensors):
    """The result as a tuple of tensors, or None when the operator refused with a reason."""
    try:
        out = OPS[op].run(**tensors)
    except REASONS as error:
        assert len(str(error)) > 10, f"{op}: {error!r} gives no reason"
        return None
    return out if isinstance(out, tuple) else (out,)


def assert_correct(op, tensors, out):
    """Equal to the specification on the same arguments (NaN where that has NaN)."""
    expected = OPS[op].expected(**tensors)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(out, expected, strict=True):
        assert got.shape == want.shape
        half = got.dtype in (torch.bfloat16, torch.float16)
        tolerance = 3e-2 if half else 1e-4  # of storage in half precision; of float32 sums
        torch.testing.assert_close(
            got, want.to(got.dtype), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("op", OPS)
def test_valid_arguments_are_right(op):
    tensors = OPS[op].tensors()
    assert_correct(op, tensors, outcome(op, tensors))


@each_argument
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=st.lists(st.integers(0, 12), max_size=4))
def test_any_shape(op, name, shape):
    tensors = OPS[op].tensors()
    valid = tensors[name].shape
    tensors[name] = torch.zeros(shape)
    out = outcome(op, tensors)
    if out is not None:
        assert_correct(op, tensors, out)
    elif list(valid) == shape:
        pytest.fail("refused a valid shape")


@each_argument
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex64],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_any_dtype(op, name, dtype):
    tensors = OPS[op].tensors()
    tensors[name] = tensors[name].to(dtype)
    out = outcome(op, tensors)
    if out is not None:
        assert_correct(op, tensors, out)


@each_argument
def test_another_device(op, name):
    """A meta tensor among CPU ones is refused, unless it is the only argument."""
    tensors = OPS[op].tensors()
    tensors[name] = tensors[name].to("meta")
    out = outcome(op, tensors)
    assert out is None or all(t.device.type == "meta" for t in out)


@each_argument
@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "offset", "sparse"])
def test_any_layout(op, name, layout):
    tensors = OPS[op].tensors()
    x = tensors[name]
    if layout == "transposed":
        tensors[name] = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided":
        tensors[name] = torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]
    elif layout == "expanded":
        tensors[name] = x[:1].expand_as(x)
    elif layout == "offset":
        wide = torch.cat([torch.full((1,), torch.nan), x.flatten()])
        tensors[name] = wide[1:].view(x.shape)
    else:
        tensors[name] = x.to_sparse()
    out = outcome(op, tensors)
    if layout != "sparse":
        assert out is not None
        assert_correct(op, tensors, out)


@each_argument
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e18], ids=str)
def test_any_value(op, name, value):
    """NaN stays NaN. With infinities the results agree wherever both are numbers: 0 times infinity
    depends on whether a gate saturates to 0 or to nearly 0."""
    tensors = OPS[op].tensors()
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[1] = value
    out = outcome(op, tensors)
    if out is not None and value != value and name not in ("uniform", "terminated", "done"):
        assert any(t.isnan().any() for t in out), "NaN has disappeared"
    if out is not None and value == value:
        expected = OPS[op].expected(**tensors)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for got, want in zip(out, expected, strict=True):
            both = ~(got.isnan() | want.isnan())
            torch.testing.assert_close(got[both], want[both], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_zero_batch(op):
    tensors = OPS[op].tensors()
    size = next(iter(tensors.values())).shape[0]
    batched = {n: t[:0] if t.shape[0] == size else t for n, t in tensors.items()}
    out = outcome(op, batched)
    assert out is not None
    assert_correct(op, batched, out)


@each_argument
def test_huge_sizes_are_refused(op, name):
    """2^40 elements that exist only as a stride-0 view: a size that overflows 32 bits."""
    tensors = OPS[op].tensors()
    x = tensors[name]
    tensors[name] = torch.zeros(1).expand(2**40, *x.shape[1:])
    try:
        out = outcome(op, tensors)
    except MemoryError:
        return
    assert out is None or len(tensors) == 1


@each_argument
@pytest.mark.parametrize("wrong", [None, 1.0, "text", [1.0], object()], ids=repr)
def test_no_tensor_at_all(op, name, wrong):
    tensors = OPS[op].tensors()
    tensors[name] = wrong
    optional = name.startswith("b_") and wrong is None
    try:
        out = outcome(op, tensors)
    except AttributeError:  # Python's own reason: it has no shape
        return
    assert out is None or optional
