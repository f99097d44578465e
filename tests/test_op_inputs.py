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

import diwa.nn
import diwa.ops
from diwa.config import PolicyConfig
from diwa.ops import reference

REASONS = (ValueError, TypeError, RuntimeError, IndexError)
"""What an operator may raise; BackendError is a RuntimeError. OverflowError and the like are not
reasons, and a failed assertion is a defect."""
B, H, IN = 11, 10, 7  # no other size is B


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
        exact: results for huge arguments are compared as well; the others sample classes or clamp,
            where the last bit of a huge sum decides.
    """

    run: Callable
    expected: Callable
    tensors: Callable[[], dict]
    exact: bool = True


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
    """An operator of plain torch; its specification has the same name and arguments."""
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
K, P, F, W, A, E = 4, 6, 18, 9, 2, 8
STEPS = diwa.nn.NoiseSchedule(K).tables(PolicyConfig(denoising_steps=K), True)


def weights(*shapes):
    return {f"w{i}": 0.3 * randn(*shape) for i, shape in enumerate(shapes)}


NETWORK = ((W, P), (W, F), (W,), (K, W), (W, W), (W,), (W, W), (W,), (P, W), (P,))


def network(w):
    chunk, cond, bias, time, a, a_bias, b, b_bias, out, out_bias = w
    hidden = ((a, a_bias), (b, b_bias))
    return diwa.ops.Network(chunk, cond, bias, time, hidden, out, out_bias, True)


def by_weights(call, backend, count):
    """`call(weights, the other tensors, backend)`, taking all of them by name."""

    def run(**t):
        w = [t.pop(f"w{i}") for i in range(count)]
        return tuple(x for x in call(w, t, backend) if x is not None)

    return run


def _add_native(name, call, shapes, tensors):
    make = lambda: {**tensors(), **weights(*shapes)}  # noqa: E731
    ours, plain = (by_weights(call, b, len(shapes)) for b in ("auto", "reference"))
    OPS[name] = Op(ours, plain, make, exact=False)


RSSM_SHAPES = (
    *((W, S * C), (W,), (W, A), (W,), (W,)),
    *((3 * H, W), (3 * H, H), (3 * H,), (3 * H,)),
    *((W, H), (W,), (W,), (W,), (S * C, W), (S * C,)),
)


def _imagine(w, t, backend):
    packed = diwa.ops.pack_rssm(diwa.ops.RSSMWeights(*w), torch.float32)
    return diwa.ops.rssm_imagine(packed, **t, return_features=True, backend=backend)


def _observe(w, t, backend):
    return diwa.ops.rssm_observe(diwa.ops.RSSMWeights(*w), **t, backend=backend)


def _chain(w, t, backend):
    return diwa.ops.denoise_chain(network(w), steps=STEPS, ft_steps=2, backend=backend, **t)


def _log_prob(w, t, backend):
    return (diwa.ops.chain_log_prob(network(w), steps=STEPS, backend=backend, **t),)


def _indices(*shape):
    return torch.randint(C, shape, generator=torch.Generator().manual_seed(1))


_add_native(
    "rssm_imagine",
    _imagine,
    RSSM_SHAPES,
    lambda: {
        "h": randn(B, H),
        "z_idx": _indices(B, S),
        "actions": randn(T, B, A),
        "uniforms": rand(T, B, S),
    },
)
_add_native(
    "rssm_observe",
    _observe,
    (*RSSM_SHAPES, (W, E)),
    lambda: {
        "embed": randn(T, B, E),
        "action": randn(T, B, A),
        "reset": torch.zeros(T, B),
        "h": randn(B, H),
        "z": torch.nn.functional.one_hot(_indices(B, S), C).flatten(1).float(),
        "uniform": rand(T, B, S),
    },
)
_add_native(
    "denoise_chain",
    _chain,
    NETWORK,
    lambda: {"noise": randn(K + 1, B, P), "feature": randn(B, F)},
)
_add_native(
    "denoise_chain gathered",
    _chain,
    NETWORK,
    lambda: {"noise": randn(K + 1, B, P), "h": randn(B, F - S * C), "z_idx": _indices(B, S)},
)
_add_native(
    "chain_log_prob",
    _log_prob,
    NETWORK,
    lambda: {
        "feature": randn(B, F),
        "x": randn(B, 2, P),
        "x_next": randn(B, 2, P),
        "step": torch.tensor([1, 0]),
    },
)
NAMES = [(op, name) for op, entry in OPS.items() for name in entry.tensors()]
UNSEEN = ("uniform", "uniforms", "terminated", "done", "reset")
"""Arguments that are compared or masked: a NaN there selects something, it does not add up."""
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
    """Equal to the specification on the same arguments (NaN where that has NaN).

    An operator that packs its weights may take dtypes that plain torch does not mix; then the
    specification gets them in float32.
    """
    try:
        expected = OPS[op].expected(**tensors)
    except REASONS:
        single = {n: t if n in ("z_idx", "step") else t.float() for n, t in tensors.items()}
        expected = OPS[op].expected(**single)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for got, want in zip(out, expected, strict=True):
        assert got.shape == want.shape
        half = any(t.dtype in (torch.bfloat16, torch.float16) for t in (got, *tensors.values()))
        tolerance = 3e-2 if half else 1e-4  # of storage in half precision; of float32 sums
        torch.testing.assert_close(
            got, want.to(got.dtype), rtol=tolerance, atol=tolerance, equal_nan=True
        )


@pytest.mark.parametrize("op", OPS)
def test_valid_arguments_are_right(op):
    tensors = OPS[op].tensors()
    assert_correct(op, tensors, outcome(op, tensors))


@each_argument
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(shape=st.lists(st.integers(0, 12), max_size=4))
def test_any_shape(op, name, shape):
    tensors = OPS[op].tensors()
    valid = tensors[name].shape
    tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
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
    poison = torch.nan if x.dtype.is_floating_point else 2**40
    if layout == "transposed":
        tensors[name] = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided":
        tensors[name] = torch.stack([x, torch.full_like(x, poison)], -1)[..., 0]
    elif layout == "expanded":
        tensors[name] = x[:1].expand_as(x)
    elif layout == "offset":
        wide = torch.cat([x.new_full((1,), poison), x.flatten()])
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
    if not tensors[name].dtype.is_floating_point:
        pytest.skip("no such value among integers")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[1] = value
    out = outcome(op, tensors)
    if out is not None and value != value and name not in UNSEEN:
        assert any(t.isnan().any() for t in out), "NaN has disappeared"
    if out is not None and value == value and OPS[op].exact:
        expected = OPS[op].expected(**tensors)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for got, want in zip(out, expected, strict=True):
            both = ~(got.isnan() | want.isnan())
            torch.testing.assert_close(got[both], want[both], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", OPS)
def test_zero_batch(op):
    tensors = OPS[op].tensors()
    batched = {}
    for name, t in tensors.items():
        data = not name.startswith("w")
        batched[name] = t[tuple(slice(0) if data and n == B else slice(None) for n in t.shape)]
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
